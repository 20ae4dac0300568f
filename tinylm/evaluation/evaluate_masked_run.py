"""Evaluate a masked language model on the run's own held-out or test text, or on other texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinylm import device as devices
from tinylm.data.shards import Shard
from tinylm.data.split_text import PART_NAMES
from tinylm.evaluation import masked
from tinylm.evaluation.evaluate_run import TextFormat, open_shard
from tinylm.evaluation.filling import require_head, require_masked_model
from tinylm.evaluation.intervals import PairedDifference, paired_difference
from tinylm.evaluation.masked import MaskedScores
from tinylm.model.base import Model
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Run
from tinylm.text.sources import describe


@dataclass(frozen=True)
class MaskedEvaluation:
    """The evaluation of a masked language model. `pseudo` contains the scores for masking one token at a time, if requested."""

    run: str
    checkpoint: str
    step: int
    text: str
    split: str | None
    scores: MaskedScores
    pseudo: MaskedScores | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document of `tinylm eval --json`."""
        scores = self.scores
        perplexity, interval = (None, None) if self.pseudo is None else masked.pseudo_perplexity(self.pseudo)
        return {
            "run": self.run,
            "checkpoint": self.checkpoint,
            "step": self.step,
            "text": self.text,
            "split": self.split,
            "documents": scores.documents,
            "tokens": scores.tokens,
            "bytes": scores.bytes,
            "rate": masked.RATE,
            "masked_tokens": scores.masked,
            "masked_accuracy": scores.accuracy,
            "masked_accuracy_ci95": list(scores.accuracy_ci95),
            "masked_loss": scores.loss,
            "masked_loss_ci95": list(scores.loss_ci95),
            "pseudo_perplexity": perplexity,
            "pseudo_perplexity_ci95": None if interval is None else list(interval),
        }


def evaluate_masked_run(
    run: Run,
    sources: Sequence[str] = (),
    *,
    split: str = "heldout",
    pseudo: bool = False,
    max_tokens: int | None = None,
    text_format: TextFormat = TextFormat(),
    checkpoint: str | None = None,
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> MaskedEvaluation:
    """Score `sources`, or the run's own text if there are no sources. With `pseudo`, also compute the pseudo-perplexity.

    If `max_tokens` is set, score only that many tokens from the start of the text. Raises `InputError` if a source or the
    checkpoint cannot be read.
    """
    chosen = run.checkpoint(checkpoint)
    with open_shard(run, sources, split, text_format, reporter) as shard:
        network = run.network(chosen, devices.resolve(device))
        require_masked_model(network)
        require_head(run)
        result = MaskedEvaluation(
            run=str(run.path),
            checkpoint=chosen.name,
            step=chosen.step,
            text=describe(sources) if sources else f"the run's {PART_NAMES[split]}",
            split=None if sources else split,
            scores=_score(run, network, shard, max_tokens, False, reporter),
            pseudo=_score(run, network, shard, max_tokens, True, reporter) if pseudo else None,
        )
        del shard  # Windows cannot remove a file while it is mapped
    return result


def mask_same_tokens(runs: Sequence[Run]) -> bool:
    """Whether evaluations of the runs on the same text mask the same tokens, so that their masked losses are comparable."""
    return len({(run.tokenizer.fingerprint, run.recipe.model.context_length) for run in runs}) == 1


def compare_masked_runs(
    runs: Sequence[Run],
    sources: Sequence[str] = (),
    *,
    split: str = "heldout",
    text_format: TextFormat = TextFormat(),
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> list[PairedDifference]:
    """Compare the masked loss of the first run's best checkpoint with that of each of the others.

    The text is that in `sources`, or the runs' common held-out or test text if there are no sources. All runs must mask the same
    tokens (see `mask_same_tokens`). Raises `InputError` if a source cannot be read.
    """
    nats: list[np.ndarray] = []
    with open_shard(runs[0], sources, split, text_format, reporter) as shard:
        for run in runs:
            network = run.network(run.checkpoint(), devices.resolve(device))
            with reporter.progress("evaluating", None, "tokens") as advance:
                rows, sums = masked.score_rows(network, shard, run.tokenizer, on_progress=advance)
            losses, _, weights = masked.sums_of_pieces(rows, sums)
            nats.append(losses)
        del shard  # Windows cannot remove a file while it is mapped
    return [paired_difference(nats[0], other, weights) for other in nats[1:]]


def _score(run: Run, network: Model, shard: Shard, max_tokens: int | None, pseudo: bool, reporter: Reporter) -> MaskedScores:
    with reporter.progress("pseudo-perplexity" if pseudo else "evaluating", None, "tokens") as advance:
        return masked.evaluate(network, shard, run.tokenizer, max_tokens=max_tokens, pseudo=pseudo, on_progress=advance)


def interval_text(bounds: tuple[float, float], spec: str) -> str:
    """Format a 95% confidence interval for display."""
    low, high = bounds
    return "too short for an interval" if math.isnan(low) else f"95% interval {low:{spec}} to {high:{spec}}"
