"""Measure a run on a text, its own held-out half or any SOURCE, and compare two runs on one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from tinylm import device as devices
from tinylm.data.prepare import encode, prepare
from tinylm.data.shards import Shard
from tinylm.errors import InputError
from tinylm.evaluation import baselines, details, paired, report
from tinylm.evaluation.details import TokenLosses
from tinylm.evaluation.perplexity import Perplexity, evaluate
from tinylm.model.packed import WeightKind, pack
from tinylm.paths import cache_folder, write_whole
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Checkpoint, Run
from tinylm.text.sources import Corpus, describe
from tinylm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Details:
    """What to tell beside the totals. `baselines` and `by_frequency` read the training text again. `html`: a file to write."""

    baselines: bool = False
    by_frequency: bool = False
    by_position: bool = False
    by_document: bool = False
    hardest: int = 0
    html: Path | None = None

    @property
    def reads_training_text(self) -> bool:
        return self.baselines or self.by_frequency

    @property
    def reads_tokens(self) -> bool:
        return self.by_frequency or self.by_position or self.by_document or bool(self.hardest) or self.html is not None


@dataclass(frozen=True)
class Evaluation:
    """A measurement and what was measured. `baselines` are bits per byte by name, tables by what they are by."""

    run: str
    checkpoint: str
    step: int
    text: str
    weights: str
    perplexity: Perplexity
    baselines: dict[str, float] = field(default_factory=dict)
    overlap: float | None = None
    tables: dict[str, list[details.Row]] = field(default_factory=dict)
    hardest: list[details.Hard] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """The keys of `tinylm eval --json`; tables and the like only when they were asked for."""
        measured = self.perplexity
        document: dict[str, object] = {
            "run": self.run,
            "checkpoint": self.checkpoint,
            "step": self.step,
            "text": self.text,
            "weights": self.weights,
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
        if self.overlap is not None:
            document["overlap"] = self.overlap
        if self.baselines:
            document["baselines"] = self.baselines
        for name, rows in self.tables.items():
            document[f"by_{name}"] = [asdict(row) for row in rows]
        if self.hardest:
            document["hardest"] = [asdict(hard) for hard in self.hardest]
        return document


def measure(
    run: Run,
    sources: Sequence[str] = (),
    *,
    checkpoint: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    field: str = "text",
    errors: str = "strict",
    across_documents: bool = False,
    weights: WeightKind = "fp32",
    wanted: Details = Details(),
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> Evaluation:
    """Score `sources`, or without any the text that the run held out. Raises `InputError` for what does not fit."""
    chosen = run.checkpoint(checkpoint)
    lengths = run.tokenizer.token_byte_lengths
    train = _training_text(run, chosen, reporter) if wanted.reads_training_text else None
    with _tokens(run.tokenizer, run, sources, field, errors, reporter) as shard:
        losses = TokenLosses(shard, report.MOST_TOKENS if wanted.html else 0) if wanted.reads_tokens else None
        measured = _scored(
            run,
            chosen,
            shard,
            losses,
            context=context,
            stride=stride,
            across=across_documents,
            weights=weights,
            device=device,
            reporter=reporter,
        )
        text = describe(sources) if sources else "its own held-out text"
        tables: dict[str, list[details.Row]] = {}
        hard: list[details.Hard] = []
        if losses is not None:
            if wanted.by_document:
                tables["document"] = details.by_document(losses, lengths)
            if wanted.by_position:
                tables["position"] = details.by_position(losses, lengths)
            if wanted.by_frequency and train is not None:
                tables["frequency"] = details.by_frequency(losses, lengths, train)
            hard = details.hardest(losses, run.tokenizer, wanted.hardest)
        found: dict[str, float] = {}
        if wanted.baselines and train is not None:
            found = _baselines(train, shard, run.tokenizer, reporter)
        result = Evaluation(
            str(run.path),
            chosen.name,
            chosen.step,
            text,
            weights,
            measured,
            found,
            None if train is None else details.overlap(shard, train),
            tables,
            hard,
        )
        if wanted.html is not None and losses is not None:
            write_whole(wanted.html, report.page(losses, run.tokenizer, result.as_dict()))
        del shard, losses  # a mapped file cannot be removed on Windows
    return result


def compare(
    first: Run,
    second: Run,
    sources: Sequence[str] = (),
    *,
    stride: int | None = None,
    field: str = "text",
    errors: str = "strict",
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> paired.Paired:
    """Both runs' best checkpoints on the same text: `sources`, or what the runs held out. Raises `InputError` when that differs."""
    found = []
    for run in (first, second):
        with _tokens(run.tokenizer, run, sources, field, errors, reporter) as shard:
            losses = TokenLosses(Shard(shard.tokens[:].copy(), shard.counts, shard.end_of_text))
            _scored(
                run,
                run.checkpoint(),
                shard,
                losses,
                context=None,
                stride=stride,
                across=False,
                weights="fp32",
                device=device,
                reporter=reporter,
            )
            found.append(losses)
            del shard
    a, b = found
    if not sources and not _same_text(a.shard, first.tokenizer, b.shard, second.tokenizer):
        raise InputError("the two runs hold out different texts", hint="name a text to measure both on with --on")
    return paired.compare(a, first.tokenizer.token_byte_lengths, b, second.tokenizer.token_byte_lengths)


def _same_text(a: Shard, a_tokenizer: Tokenizer, b: Shard, b_tokenizer: Tokenizer) -> bool:
    return text_of(a, a_tokenizer) == text_of(b, b_tokenizer)


def text_of(shard: Shard, tokenizer: Tokenizer) -> bytes:
    """The bytes that a shard's tokens stand for, documents one after the other."""
    spoken = tokenizer.token_bytes
    return b"".join(spoken[id] for id in shard.tokens.tolist() if id != shard.end_of_text)


def _scored(
    run: Run,
    chosen: Checkpoint,
    shard: Shard,
    losses: TokenLosses | None,
    *,
    context: int | None,
    stride: int | None,
    across: bool,
    weights: WeightKind,
    device: str,
    reporter: Reporter,
) -> Perplexity:
    longest = run.recipe.model.context_length
    if context is not None and not 1 <= context <= longest:
        raise InputError(f"{context} tokens do not fit the model's {longest}", where="--context", hint=f"1 to {longest}")
    target = devices.resolve(device)
    network = run.network(chosen, target)
    if weights != "fp32":
        network = pack(network, weights)
    with torch.inference_mode(), reporter.progress("evaluating", shard.counts.tokens, "tokens") as advance:
        return evaluate(
            network,
            shard,
            run.tokenizer.token_byte_lengths,
            context=context or longest,
            stride=stride,
            across_documents=across,
            device=target,
            advance=advance,
            observe=losses,
        )


@contextmanager
def _tokens(tokenizer: Tokenizer, run: Run, sources: Sequence[str], field: str, errors: str, reporter: Reporter) -> Iterator[Shard]:
    """The tokens of `sources`, or of the text that the run held out."""
    with tempfile.TemporaryDirectory(prefix="eval-", dir=cache_folder("spool")) as folder:
        if sources:
            with (
                Corpus(sources, field=field, errors=errors) as corpus,
                reporter.progress("encoding", None, "B") as advance,
            ):
                shard = encode(Path(folder), "text", corpus.pieces(), tokenizer, advance)
        else:
            shard = run.heldout()
        if not shard.counts.bytes:
            raise InputError("the text is empty", where=describe(sources))
        if shard.counts.unknown_tokens:
            reporter.warn(
                f"{shard.counts.unknown_tokens:,} tokens are unknown to the tokenizer: bits per byte look better than they are"
            )
        yield shard
        del shard


def _training_text(run: Run, checkpoint: Checkpoint, reporter: Reporter) -> Shard:
    """The tokens the run was trained on, from the cache or read again. Raises `InputError` when the text is another by now."""
    prepared = prepare(run.recipe.data, run.recipe.tokenizer, reporter)
    if prepared.fingerprint != checkpoint.state["fingerprints"]["data"]:
        raise InputError("the text this run was trained on has changed since", where=str(run.path / "recipe.yaml"))
    return prepared.train


def _baselines(train: Shard, shard: Shard, tokenizer: Tokenizer, reporter: Reporter) -> dict[str, float]:
    reporter.note("baselines: counting n-grams and compressing the training text")
    size = int(tokenizer.token_byte_lengths[shard.tokens[:]].sum())
    found = baselines.kneser_ney_bits(train, shard, tokenizer.vocab_size, size)
    return found | baselines.compressor_bits(text_of(train, tokenizer), text_of(shard, tokenizer))
