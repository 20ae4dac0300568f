"""Measure a run on a text: its own held-out half, or any SOURCE."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinylm import device as devices
from tinylm.data.prepare import encode
from tinylm.errors import InputError
from tinylm.evaluation.perplexity import Perplexity, evaluate
from tinylm.paths import cache_folder
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Run
from tinylm.text.sources import Corpus, describe


@dataclass(frozen=True)
class Evaluation:
    """A measurement and what was measured."""

    run: str
    checkpoint: str
    step: int
    text: str
    perplexity: Perplexity

    def as_dict(self) -> dict[str, object]:
        """The keys of `tinylm eval --json`."""
        measured = self.perplexity
        return {
            "run": self.run,
            "checkpoint": self.checkpoint,
            "step": self.step,
            "text": self.text,
            "documents": measured.documents,
            "tokens": measured.tokens,
            "bytes": measured.bytes,
            "characters": measured.characters,
            "loss": measured.loss,
            "perplexity": measured.perplexity,
            "bits_per_byte": measured.bits_per_byte,
            "bits_per_character": measured.bits_per_character,
            "bits_per_byte_ci95": list(measured.bits_per_byte_ci95),
            "context": measured.context,
            "stride": measured.stride,
        }


def measure(
    run: Run,
    sources: Sequence[str] = (),
    *,
    checkpoint: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    field: str = "text",
    errors: str = "strict",
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> Evaluation:
    """Score `sources`, or without any the text that the run held out. Raises `InputError` for what does not fit."""
    chosen = run.checkpoint(checkpoint)
    longest = run.recipe.model.context_length
    if context is not None and not 1 <= context <= longest:
        raise InputError(f"{context} tokens do not fit the model's {longest}", where="--context", hint=f"1 to {longest}")
    target = devices.resolve(device)
    network = run.network(chosen, target)
    tokenizer = run.tokenizer
    with tempfile.TemporaryDirectory(prefix="eval-", dir=cache_folder("spool")) as folder:
        if sources:
            with (
                Corpus(sources, field=field, errors=errors) as corpus,
                reporter.progress("encoding", None, "B") as advance,
            ):
                shard = encode(Path(folder), "text", corpus.pieces(), tokenizer, advance)
        else:
            shard = run.heldout()
        if not shard.counts.tokens:
            raise InputError("the text is empty", where=describe(sources))
        if shard.counts.unknown_tokens:
            reporter.warn(
                f"{shard.counts.unknown_tokens:,} tokens are unknown to the tokenizer: bits per byte look better than they are"
            )
        with reporter.progress("evaluating", shard.counts.tokens, "tokens") as advance:
            measured = evaluate(
                network,
                shard,
                tokenizer.token_byte_lengths,
                context=context or longest,
                stride=stride,
                device=target,
                advance=advance,
            )
        del shard  # a mapped file cannot be removed on Windows
    text = describe(sources) if sources else "its own held-out text"
    return Evaluation(str(run.path), chosen.name, chosen.step, text, measured)
