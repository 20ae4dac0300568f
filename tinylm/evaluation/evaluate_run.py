"""Evaluate a run, or an ensemble of several, on its held-out or test text or on other texts.

The evaluation also measures how much of the text the model was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from tinylm import device as devices
from tinylm.data import training_text
from tinylm.data.prepare import encode_to_shard, prepare
from tinylm.data.shards import Shard
from tinylm.data.source_spans import Span
from tinylm.data.split_text import PART_NAMES
from tinylm.data.training_text import MeasuredOverlap, largest_share
from tinylm.ensemble import Ensemble
from tinylm.errors import InputError
from tinylm.evaluation import baselines, breakdown, ensembles, html_report
from tinylm.evaluation.breakdown import TokenLosses
from tinylm.evaluation.ensembles import BestMember, MemberScore
from tinylm.evaluation.perplexity import EvaluationOptions, Perplexity, ScoredBatch, evaluate, summarize_losses
from tinylm.model.packed import WeightKind, pack
from tinylm.paths import atomic_write_text, cache_folder, temporary_folder
from tinylm.recipe.schema import require_text
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Checkpoint, Run
from tinylm.text.sources import Corpus, describe
from tinylm.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextFormat:
    """How to read text sources: the field or template for structured files, and how to handle invalid UTF-8."""

    field: str = "text"
    template: str | None = None
    errors: str = "strict"


@dataclass(frozen=True)
class BreakdownOptions:
    """What to report in addition to the overall scores. `baselines` and `by_frequency` require the training text."""

    baselines: bool = False
    by_frequency: bool = False
    by_position: bool = False
    by_document: bool = False
    hardest: int = 0
    html: Path | None = None

    @property
    def needs_training_text(self) -> bool:
        return self.baselines or self.by_frequency

    @property
    def needs_token_losses(self) -> bool:
        return self.by_frequency or self.by_position or self.by_document or bool(self.hardest) or self.html is not None


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a run or of an ensemble.

    `baselines` maps names to bits per byte. The keys of `tables` are `source` (for the held-out text of a mixture),
    `document`, `position` and `frequency`.
    """

    run: str
    """The path of the run. The names of several runs, and of several checkpoints, are separated by `+`."""
    checkpoint: str
    step: int | None
    """The step of the checkpoint. None if the members of an ensemble have different steps."""
    text: str
    weights: str
    perplexity: Perplexity
    split: str | None = None
    """`heldout` or `test` for the run's own text, or None for other texts."""
    chosen_by_split: bool = False
    """Whether the checkpoint was selected by its score on this text."""
    has_test_split: bool = False
    overlaps: list[MeasuredOverlap] = field(default_factory=list)
    """How much of the text occurs in each text that the model was trained on."""
    baselines: dict[str, float] = field(default_factory=dict)
    tables: dict[str, list[breakdown.Row]] = field(default_factory=dict)
    hardest: list[breakdown.HardToken] = field(default_factory=list)
    members: list[MemberScore] = field(default_factory=list)
    """The result of each member of an ensemble. Empty for a single model."""
    best_member: BestMember | None = None

    def as_dict(self) -> dict[str, object]:
        """Return the JSON document of `tinylm eval --json`. Optional parts are present only if they were requested.

        `overlap` is the largest fraction of the text that is known to occur in any one training text, or None if none is known.
        """
        scores = self.perplexity
        document: dict[str, object] = {
            "run": self.run,
            "checkpoint": self.checkpoint,
            "step": self.step,
            "text": self.text,
            "split": self.split,
            "chosen_by_split": self.chosen_by_split,
            "weights": self.weights,
            "documents": scores.documents,
            "tokens": scores.tokens,
            "bytes": scores.bytes,
            "characters": scores.characters,
            "loss": scores.loss,
            "perplexity": scores.perplexity,
            "bits_per_byte": scores.bits_per_byte,
            "bits_per_character": scores.bits_per_character,
            "bits_per_byte_ci95": list(scores.bits_per_byte_ci95),
            "context": scores.context,
            "stride": scores.stride,
        }
        document["overlap"] = largest_share(self.overlaps)
        document["trained_on"] = [overlap.as_dict() for overlap in self.overlaps]
        if self.baselines:
            document["baselines"] = self.baselines
        for name, rows in self.tables.items():
            document[f"by_{name}"] = [asdict(row) for row in rows]
        if self.hardest:
            document["hardest"] = [asdict(token) for token in self.hardest]
        if self.best_member is not None:
            document["members"] = [member.as_dict() for member in self.members]
            document["best_member"] = self.best_member.as_dict()
        return document


def evaluate_run(
    run: Run,
    sources: Sequence[str] = (),
    *,
    split: str = "heldout",
    options: EvaluationOptions = EvaluationOptions(),
    details: BreakdownOptions = BreakdownOptions(),
    text_format: TextFormat = TextFormat(),
    checkpoint: str | None = None,
    weights: WeightKind = "fp32",
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> Evaluation:
    """Score `sources`, or the run's own text if there are no sources, and write an HTML report if requested.

    `split` selects the run's `heldout` or `test` text. Raises `InputError` if a source, the split or the checkpoint cannot be read,
    if an option is out of range, or if the training text is needed and has changed.
    """
    return evaluate_ensemble(
        Ensemble.of([run], [] if checkpoint is None else [checkpoint]),
        sources,
        split=split,
        options=options,
        details=details,
        text_format=text_format,
        weights=weights,
        device=device,
        reporter=reporter,
    )


def evaluate_ensemble(
    ensemble: Ensemble,
    sources: Sequence[str] = (),
    *,
    split: str = "heldout",
    options: EvaluationOptions = EvaluationOptions(),
    details: BreakdownOptions = BreakdownOptions(),
    text_format: TextFormat = TextFormat(),
    weights: WeightKind = "fp32",
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> Evaluation:
    """Like `evaluate_run`, but for the mean probabilities of one or more models. Every member scores the same tokens.

    Also raises `InputError` if the members do not have the same held-out text, if their training texts differ and are needed, or
    if an HTML report of more than one model is requested.
    """
    _check_ensemble(ensemble, details)
    first = ensemble.members[0]
    tokenizer = first.run.tokenizer
    train = _training_shard(first.run, first.checkpoint, reporter) if details.needs_training_text else None
    with open_shard(first.run, sources, split, text_format, reporter) as shard:
        if not sources:
            check_same_text(ensemble, shard, split)
        spans = () if sources else first.run.heldout_sources(shard, split)
        overlaps = measure_overlaps(ensemble, shard, reporter)
        training_text.warn(overlaps, "the text", reporter)
        combined: TokenLosses | None = None
        members: list[MemberScore] = []
        best: BestMember | None = None
        if ensemble.is_single:
            needed = details.needs_token_losses or spans
            combined = TokenLosses(shard, html_report.MAX_TOKENS if details.html else 0) if needed else None
            scores = score(first.run, first.checkpoint, shard, combined, options, weights=weights, device=device, reporter=reporter)
        else:
            members, losses = score_members(ensemble, shard, options, weights=weights, device=device, reporter=reporter)
            combined = ensembles.average(losses)
            scores = summarize_members(members, combined, tokenizer, options)
            best = ensembles.best_member(members, losses, combined, tokenizer.token_byte_lengths)
            del losses
        steps = {member.checkpoint.step for member in ensemble.members}
        is_heldout = not sources and split == "heldout"
        result = Evaluation(
            run=ensemble.name,
            checkpoint=ensemble.checkpoint,
            step=first.checkpoint.step if len(steps) == 1 else None,
            text=describe(sources) if sources else f"the run's {PART_NAMES[split]}",
            weights=weights,
            perplexity=scores,
            split=None if sources else split,
            chosen_by_split=is_heldout and any(_is_best(member.run, member.checkpoint) for member in ensemble.members),
            has_test_split=first.run.has_test_split,
            overlaps=overlaps,
            baselines=_baselines(train, shard, tokenizer, reporter) if details.baselines and train is not None else {},
            tables={} if combined is None else _tables(combined, tokenizer, details, train, spans),
            hardest=[] if combined is None else breakdown.hardest(combined, tokenizer, details.hardest),
            members=members,
            best_member=best,
        )
        if details.html is not None and combined is not None:
            atomic_write_text(details.html, html_report.render(combined, tokenizer, result.as_dict()))
        del shard, combined  # Windows cannot remove a file while it is mapped
    return result


def _check_ensemble(ensemble: Ensemble, details: BreakdownOptions) -> None:
    """Raise `InputError` if the details cannot be computed for these members."""
    if ensemble.is_single:
        return
    if details.html is not None:
        raise InputError("shows the predictions of a single model", where="--html", hint="evaluate one run")
    texts = {member.checkpoint.state["fingerprints"].get("data") for member in ensemble.members}
    if details.needs_training_text and len(texts) > 1:
        problem = "the members were trained on different texts"
        raise InputError(problem, where="--baselines, --by-frequency", hint="evaluate them one at a time")


def check_same_text(ensemble: Ensemble, shard: Shard, split: str) -> None:
    """Raise `InputError` if a member's held-out or test text is not the text in `shard`, which is that of the first member."""
    for member in ensemble.members[1:]:
        if member.run.path != ensemble.members[0].run.path and not np.array_equal(member.run.heldout(split).tokens, shard.tokens):
            problem = f"its {PART_NAMES[split]} differs from that of {ensemble.members[0].path}"
            raise InputError(problem, where=member.path, hint="specify a text to evaluate the ensemble on")


def score_members(
    ensemble: Ensemble, shard: Shard, options: EvaluationOptions, *, weights: WeightKind, device: str, reporter: Reporter
) -> tuple[list[MemberScore], list[TokenLosses]]:
    """Evaluate every member on a shard, each with the same context and stride. Return the results and the losses of all tokens."""
    options = ensembles.common_options(ensemble, options)
    scores, losses = [], []
    for member in ensemble.members:
        losses.append(TokenLosses(shard))
        perplexity = score(
            member.run, member.checkpoint, shard, losses[-1], options, weights=weights, device=device, reporter=reporter
        )
        scores.append(MemberScore(member, perplexity))
    return scores, losses


def summarize_members(
    members: Sequence[MemberScore], combined: TokenLosses, tokenizer: Tokenizer, options: EvaluationOptions
) -> Perplexity:
    """Return the result of an ensemble, given the results of its members and its loss for each token."""
    first = members[0].perplexity
    if len(members) == 1:
        return first
    window = None if first.context is None or first.stride is None else (first.context, first.stride)
    return summarize_losses(combined.nats, combined.shard, tokenizer.token_byte_lengths, options, window)


def text_bytes(shard: Shard, tokenizer: Tokenizer) -> bytes:
    """Return the concatenated text of all documents in a shard."""
    token_bytes = tokenizer.token_bytes
    return b"".join(token_bytes[id] for id in shard.tokens.tolist() if id != shard.end_of_text)


def measure_overlap(run: Run, shard: Shard, reporter: Reporter) -> list[MeasuredOverlap]:
    """Measure how much of a text, encoded with the run's tokenizer, occurs in the texts that the model was trained on.

    If the record of the training text is damaged, warn and return an empty list.
    """
    try:
        return training_text.measure(run.training_texts(), shard, run.tokenizer)
    except InputError as error:
        reporter.warn(f"{error}; it is not known how much of the text the model was trained on")
        return []


def measure_overlaps(ensemble: Ensemble, shard: Shard, reporter: Reporter) -> list[MeasuredOverlap]:
    """Measure how much of a text occurs in the training texts of each member. Equal results are returned once."""
    runs = {run.path: run for run in ensemble.runs}.values()
    measured = [overlap for run in runs for overlap in measure_overlap(run, shard, reporter)]
    return list({repr(overlap.as_dict()): overlap for overlap in measured}.values())


def _is_best(run: Run, checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint is the run's best checkpoint on the held-out text."""
    try:
        return checkpoint.step > 0 and run.checkpoint("best").path == checkpoint.path
    except InputError:  # the run has no best checkpoint yet
        return False


def score(
    run: Run,
    checkpoint: Checkpoint,
    shard: Shard,
    losses: TokenLosses | None,
    options: EvaluationOptions,
    *,
    weights: WeightKind,
    device: str,
    reporter: Reporter,
) -> Perplexity:
    """Evaluate a checkpoint on a shard. If `losses` is not None, store the loss of every token there."""
    options.window_size(run.recipe.model.context_length)  # raises before the weights are loaded
    network = run.network(checkpoint, devices.resolve(device))
    if weights != "fp32":
        network = pack(network, weights)

    def on_batch(batch: ScoredBatch) -> None:
        if losses is not None:
            losses(batch)

    with torch.inference_mode(), reporter.progress("evaluating", shard.counts.tokens, "tokens") as advance:
        return evaluate(network, shard, run.tokenizer.token_byte_lengths, options, on_progress=advance, on_batch=on_batch)


@contextmanager
def open_shard(run: Run, sources: Sequence[str], split: str, text_format: TextFormat, reporter: Reporter) -> Iterator[Shard]:
    """Yield the tokens of `sources`, or of the run's held-out or test text if there are no sources.

    Raises `InputError` if the text is empty or missing.
    """
    with temporary_folder(cache_folder("spool"), "eval") as folder:
        if sources:
            with (
                Corpus(sources, field=text_format.field, template=text_format.template, errors=text_format.errors) as corpus,
                reporter.progress("encoding", None, "B") as advance,
            ):
                shard = encode_to_shard(folder, "text", corpus.pieces(), run.tokenizer, advance)
        else:
            shard = run.heldout(split)
        if not shard.counts.bytes:
            raise InputError("the text is empty", where=describe(sources))
        if shard.counts.unknown_tokens:
            reporter.warn(f"{shard.counts.unknown_tokens:,} tokens are unknown to the tokenizer, so bits per byte will be too low")
        yield shard
        del shard


def _training_shard(run: Run, checkpoint: Checkpoint, reporter: Reporter) -> Shard:
    """Return the tokens of the run's training text, from the cache if possible. Raises `InputError` if the text has changed."""
    prepared = prepare(require_text(run.recipe.data), run.recipe.tokenizer, reporter)
    if prepared.fingerprint != checkpoint.state["fingerprints"]["data"]:
        raise InputError("the training text has changed since the run was trained", where=str(run.path / "recipe.yaml"))
    return prepared.train


def _baselines(train: Shard, shard: Shard, tokenizer: Tokenizer, reporter: Reporter) -> dict[str, float]:
    reporter.note("baselines: counting n-grams and compressing the training text")
    size = int(tokenizer.token_byte_lengths[shard.tokens[:]].sum())
    ngram_bits = baselines.kneser_ney_bits(train, shard, tokenizer.vocab_size, size)
    return ngram_bits | baselines.compressor_bits(text_bytes(train, tokenizer), text_bytes(shard, tokenizer))


def _tables(
    losses: TokenLosses, tokenizer: Tokenizer, details: BreakdownOptions, train: Shard | None, spans: Sequence[Span]
) -> dict[str, list[breakdown.Row]]:
    tables = {}
    if spans:
        tables["source"] = breakdown.by_source(losses, tokenizer.token_byte_lengths, spans)
    if details.by_document:
        tables["document"] = breakdown.by_document(losses, tokenizer.token_byte_lengths)
    if details.by_position:
        tables["position"] = breakdown.by_position(losses, tokenizer.token_byte_lengths)
    if details.by_frequency and train is not None:
        tables["frequency"] = breakdown.by_frequency(losses, tokenizer.token_byte_lengths, train)
    return tables
