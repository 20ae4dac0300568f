"""Compare losses, attention and head scores at several checkpoints to see what a model learned and when."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinylm import device as devices
from tinylm.errors import InputError
from tinylm.evaluation.scoring import token_losses
from tinylm.inspection.heads import HeadScores, head_scores, pattern_names
from tinylm.inspection.overview import head_rows
from tinylm.reporting import SILENT, Reporter
from tinylm.run import MODEL_FILES, Checkpoint, Run


@dataclass(frozen=True)
class CheckpointView:
    """A checkpoint's losses on a text and its attention.

    `losses` are in nats and cover every token except the first. For an encoder, the list is empty.
    """

    step: int
    losses: list[float]
    heads: HeadScores | None
    patterns: Tensor | None
    """(layer, head, query, key): the attention between the first tokens in the text."""

    def as_dict(self) -> dict[str, Any]:
        loss = sum(self.losses) / len(self.losses) if self.losses else None
        return {"step": self.step, "loss": loss, "heads": head_rows(self.heads)}


def select_checkpoints(run: Run, which: str) -> list[Checkpoint]:
    """Return the checkpoints selected by `all` or `last N`, sorted by step. Raises `InputError` if there are none."""
    match = re.fullmatch(r"all|(?:last\s*)?(\d{1,6})", which.strip())
    if match is None or match[1] == "0":
        raise InputError(f"must be all or last N, not {which!r}", where="--checkpoints", hint='for example --checkpoints "last 5"')
    checkpoints = run.checkpoints()
    if not checkpoints:
        raise InputError("this run has no checkpoints", where=str(run.path))
    return checkpoints if match[1] is None else checkpoints[-int(match[1]) :]


@torch.no_grad()
def view_checkpoints(
    run: Run,
    ids: list[int],
    checkpoints: list[Checkpoint],
    *,
    pattern_tokens: int = 0,
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> list[CheckpointView]:
    """Run each checkpoint on the same ids. Damaged checkpoints are skipped with a warning."""
    views = []
    with reporter.progress("checkpoints", len(checkpoints), "") as advance:
        for done, checkpoint in enumerate(checkpoints, 1):
            problem = checkpoint.problem(only=MODEL_FILES)
            if problem is None:
                views.append(_view(run, ids, checkpoint, pattern_tokens, device))
            else:
                reporter.warn(f"{checkpoint.path} is damaged ({problem}) and was skipped")
            advance(done)
    return views


def _view(run: Run, ids: list[int], checkpoint: Checkpoint, pattern_tokens: int, device: str) -> CheckpointView:
    network = run.network(checkpoint, devices.resolve(device))
    tokens = torch.tensor([ids], device=network.device)
    try:
        names = pattern_names(network)
        scores = head_scores(network)
    except InputError:  # the model has no attention, which `inspect_text` reports
        names, scores = [], None
    logits, cache = network.run_with_cache(tokens, names)
    shown = [cache[name][0, :, :pattern_tokens, :pattern_tokens] for name in names]
    losses = token_losses(logits[0, :-1], tokens[0, 1:]).tolist() if network.is_causal else []
    return CheckpointView(checkpoint.step, losses, scores, torch.stack(shown) if shown and pattern_tokens else None)


_PATTERN_VALUES = 900_000
"""Maximum number of attention weights on a page, over all checkpoints."""


def pattern_tokens(run: Run, tokens: int, checkpoints: int) -> int:
    """Return the number of tokens for which a page can store the attention at every checkpoint."""
    model = run.recipe.model
    heads = getattr(model, "n_layer", 0) * getattr(model, "n_head", 0)
    return min(tokens, math.isqrt(_PATTERN_VALUES // max(1, heads * checkpoints)))
