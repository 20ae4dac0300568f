"""Summarize a training run from its run folder: how the loss and samples changed, and how the model compares with baselines."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tinylm.data.prepare import prepare
from tinylm.evaluation import baselines
from tinylm.evaluation.evaluate_run import text_bytes
from tinylm.evaluation.metrics import BITS_PER_BYTE, LOSS
from tinylm.recipe.schema import DataSection
from tinylm.reporting import SILENT
from tinylm.run import Run

SECONDS_PER_TOKEN = 1e-5
"""Estimated time in seconds to compute all baselines, per training token."""
MAX_SHARE = 0.1
"""Compute the baselines only if this takes at most this fraction of the training time."""
_SAMPLE = re.compile(r"^## Step (\d+)\n\n(.*?)(?=^## Step |\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class SavedSample:
    step: int
    text: str
    """The prompt and its continuation."""


@dataclass(frozen=True)
class TrainingSummary:
    """The summary of a training run. Losses are in nats per token. None means that the run has no such value."""

    uniform_loss: float
    """The loss of a model that assigns the same probability to every token: ln of the vocabulary size."""
    first_loss: float | None
    """Training loss in the first step."""
    heldout_loss: float | None
    """Held-out loss in the last evaluation. None if the objective does not report a loss."""
    bits_per_byte: float | None
    samples: Sequence[SavedSample]
    """The first and the last sample for the first prompt, or a single sample if there is only one."""
    baselines: dict[str, float]
    """Bits per byte of n-gram models and compressors on the same held-out text. Empty if they are not comparable or take too
    long."""
    task: str = "causal_lm"
    """The name of the run's objective, or "chat" instead of "causal_lm" if the model was trained on conversations."""
    inspectable: bool = True
    """Whether `tinylm inspect` supports the model."""

    @property
    def equally_likely_tokens(self) -> float | None:
        """The perplexity: the model is as uncertain as if it chose among this many equally likely tokens."""
        return None if self.heldout_loss is None else math.exp(self.heldout_loss)


def task_of(run: Run) -> str:
    """Return the name of the run's objective, or "chat" if a language model was trained on conversations."""
    return "chat" if run.recipe.data.format == "chat" else run.recipe.objective.name


def summarize(run: Run, seconds: float) -> TrainingSummary:
    """Read the metrics and samples of a run. `seconds` is the training time, which limits the time for baselines."""
    first_loss, last_evaluation = None, {}
    for line in run.metrics():
        if line["kind"] == "step" and first_loss is None:
            first_loss = line["loss"]
        elif line["kind"] == "eval":
            last_evaluation = line
    bits = last_evaluation.get(BITS_PER_BYTE.key)
    return TrainingSummary(
        uniform_loss=math.log(run.tokenizer.vocab_size),
        first_loss=first_loss,
        heldout_loss=last_evaluation.get(LOSS.key),
        bits_per_byte=bits,
        samples=_first_and_last(read_samples(run)),
        baselines={} if bits is None else _baselines(run, seconds),
        task=task_of(run),
        inspectable=run.recipe.model.inspectable,
    )


def read_samples(run: Run) -> list[SavedSample]:
    """Return the samples in samples.md, oldest first. A step may have several samples."""
    file = run.path / "samples.md"
    if not file.exists():
        return []
    written = file.read_bytes().decode("utf-8", errors="replace")
    return [SavedSample(int(step), _unindented(text)) for step, text in _SAMPLE.findall(written)]


def _unindented(text: str) -> str:
    return "\n".join(line.removeprefix("    ") for line in text.removesuffix("\n\n").split("\n"))


def _first_and_last(samples: Sequence[SavedSample]) -> list[SavedSample]:
    """Return the first sample from the first step and from the last step. Each step samples the same prompts in the same order."""
    if not samples:
        return []
    last = next(sample for sample in samples if sample.step == samples[-1].step)
    return [samples[0]] if last.step == samples[0].step else [samples[0], last]


def _baselines(run: Run, seconds: float) -> dict[str, float]:
    """Return the baselines, or no baselines if they would take too long or the evaluation used only part of the held-out text."""
    data, tokenizer, heldout = run.recipe.data, run.tokenizer, run.heldout()
    limit = run.recipe.evaluation.max_tokens
    if not isinstance(data, DataSection) or (limit is not None and limit < len(heldout)):
        return {}
    train = prepare(data, run.recipe.tokenizer, SILENT).train
    if len(train) * SECONDS_PER_TOKEN > MAX_SHARE * seconds:
        return {}
    size = int(tokenizer.token_byte_lengths[heldout.tokens[:]].sum())
    bits = baselines.kneser_ney_bits(train, heldout, tokenizer.vocab_size, size)
    return bits | baselines.compressor_bits(text_bytes(train, tokenizer), text_bytes(heldout, tokenizer))
