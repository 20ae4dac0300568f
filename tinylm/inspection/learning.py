"""Compare losses, attention and head scores at several checkpoints to see what a model learned and when."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinylm import device as devices
from tinylm.errors import InputError
from tinylm.inspection.forward import forward_pass, token_losses_of, truth_of
from tinylm.inspection.heads import HeadScores, pattern_names
from tinylm.inspection.overview import head_rows
from tinylm.reporting import SILENT, Reporter
from tinylm.run import MODEL_FILES, Checkpoint, Run


@dataclass(frozen=True)
class CheckpointView:
    """A checkpoint's losses and attention on a text.

    `losses` are in nats, one per token, or None for a token that is not predicted.
    """

    step: int
    losses: list[float | None]
    heads: HeadScores | None
    patterns: Tensor | None
    """(layer, head, query, key): the attention between the first tokens in the text."""

    def as_dict(self) -> dict[str, Any]:
        return {"step": self.step, "loss": self.mean_loss, "heads": head_rows(self.heads)}

    @property
    def mean_loss(self) -> float | None:
        """The mean loss of the predicted tokens in nats, or None if no token is predicted."""
        known = [loss for loss in self.losses if loss is not None]
        return sum(known) / len(known) if known else None


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
    source: Sequence[int] = (),
    *,
    pattern_tokens: int = 0,
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> list[CheckpointView]:
    """Run each checkpoint on the same ids. `source` contains a translator's source ids.

    Damaged checkpoints are skipped with a warning.
    """
    views = []
    with reporter.progress("checkpoints", len(checkpoints), "") as advance:
        for done, checkpoint in enumerate(checkpoints, 1):
            problem = checkpoint.problem(only=MODEL_FILES)
            if problem is None:
                views.append(_view(run, ids, source, checkpoint, pattern_tokens, device))
            else:
                reporter.warn(f"{checkpoint.path} is damaged ({problem}) and was skipped")
            advance(done)
    return views


def _view(
    run: Run, ids: list[int], source: Sequence[int], checkpoint: Checkpoint, pattern_tokens: int, device: str
) -> CheckpointView:
    model = run.network(checkpoint, devices.resolve(device))
    forward = forward_pass(run, model, ids, source, names=lambda name: name.endswith(".attn.pattern"))
    try:
        names = pattern_names(forward.network)
        scores = forward.head_scores()
    except InputError:  # the model has no attention, which `inspect_text` reports
        names, scores = [], None
    shown = [forward.cache[name][0, :, :pattern_tokens, :pattern_tokens] for name in names]
    losses = token_losses_of(forward, truth_of(run, forward))
    return CheckpointView(checkpoint.step, losses, scores, torch.stack(shown) if shown and pattern_tokens else None)


_PATTERN_VALUES = 900_000
"""Maximum number of attention weights on a page, over all checkpoints."""


def pattern_tokens(run: Run, tokens: int, checkpoints: int) -> int:
    """Return the number of tokens for which a page can store the attention at every checkpoint."""
    model = run.recipe.model
    layers = getattr(model, "decoder_layers", getattr(model, "n_layer", 0))
    heads = layers * getattr(model, "n_head", 0)
    return min(tokens, math.isqrt(_PATTERN_VALUES // max(1, heads * checkpoints)))
