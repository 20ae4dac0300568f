"""Evaluate a translation run on its held-out pairs, its test pairs or other pairs: loss, BLEU, chrF, and baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from tinylm.data import formats
from tinylm.data.pairs import open_part
from tinylm.errors import InputError
from tinylm.evaluation.metrics import perplexity_of
from tinylm.recipe.pairs import AlignedFiles, PairSources, PairsSection
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Run
from tinylm.text.pairs import SentencePair, read_pairs
from tinylm.text.sources import describe
from tinylm.translation import bleu
from tinylm.translation.baselines import translate_with_baselines
from tinylm.translation.bleu import PairedScores, TranslationScores
from tinylm.translation.loss import losses_of_pairs
from tinylm.translation.search import SearchOptions
from tinylm.translation.translator import Translator, require_translation_run, source_tokenizer_of


@dataclass(frozen=True)
class HardSentence:
    """A sentence pair with its translation, and its loss in nats per target token."""

    source: str
    reference: str
    translation: str
    loss: float


@dataclass(frozen=True)
class TranslationEvaluation:
    """The evaluation of a translation run. `loss` is in nats per target token."""

    run: str
    checkpoint: str
    step: int
    text: str
    split: str | None
    pairs: int
    target_tokens: int
    loss: float
    scores: TranslationScores
    exact: float
    """The fraction of translations that are identical to their reference."""
    beams: int
    length_penalty: float
    baselines: dict[str, TranslationScores] = field(default_factory=dict)
    against_baselines: dict[str, PairedScores] = field(default_factory=dict)
    """The difference in BLEU between the model and each baseline, with a paired bootstrap confidence interval."""
    hardest: list[HardSentence] = field(default_factory=list)
    cut: int = 0
    """The number of source sentences that were truncated because they were longer than the context."""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document of `tinylm eval --json`."""
        return {
            "run": self.run,
            "checkpoint": self.checkpoint,
            "step": self.step,
            "text": self.text,
            "split": self.split,
            "pairs": self.pairs,
            "target_tokens": self.target_tokens,
            "bleu": self.scores.bleu,
            "bleu_ci95": self.scores.bleu_ci95,
            "bleu_signature": self.scores.bleu_signature,
            "chrf": self.scores.chrf,
            "chrf_ci95": self.scores.chrf_ci95,
            "exact": self.exact,
            "loss": self.loss,
            "perplexity": perplexity_of(self.loss),
            "beams": self.beams,
            "length_penalty": self.length_penalty,
            "cut": self.cut,
            "baselines": {
                name: {
                    "bleu": scores.bleu,
                    "bleu_ci95": scores.bleu_ci95,
                    "chrf": scores.chrf,
                    "difference": self.against_baselines[name].difference,
                    "difference_ci95": self.against_baselines[name].ci95,
                }
                for name, scores in self.baselines.items()
            },
            "hardest": [vars(sentence) for sentence in self.hardest],
        }


@dataclass(frozen=True)
class TranslationEvaluationOptions:
    """What to evaluate and how. `max_pairs` selects the first pairs. `hardest` is the number of highest-loss sentences to list."""

    split: str = "heldout"
    max_pairs: int | None = None
    search: SearchOptions = field(default_factory=SearchOptions)
    baselines: bool = True
    hardest: int = 0


def evaluate_translator(
    run: Run,
    sources: Sequence[str] = (),
    *,
    options: TranslationEvaluationOptions = TranslationEvaluationOptions(),
    checkpoint: str | None = None,
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> TranslationEvaluation:
    """Translate the source sentences in `sources`, or in the run's own pairs, and compare the translations with the references.

    Raises `InputError` if the run was not trained for translation, or if the pairs cannot be read.
    """
    bleu.require_sacrebleu()
    pairs = evaluation_pairs(run, sources, options.split, reporter)[: options.max_pairs]
    chosen = run.checkpoint(checkpoint)
    translator = Translator.open(run, checkpoint, device=device)
    nats, tokens = _losses(translator, pairs)
    translations, cut = translate_pairs(translator, pairs, options.search, reporter)
    references = [pair.target for pair in pairs]
    scores = bleu.score(translations, references)
    train = _training_pairs(run, reporter) if options.baselines else []
    others = translate_with_baselines(train, [pair.source for pair in pairs]) if options.baselines else {}
    order = np.argsort(-nats / tokens, kind="stable")[: options.hardest]
    return TranslationEvaluation(
        run=str(run.path),
        checkpoint=chosen.name,
        step=chosen.step,
        text=describe(sources) if sources else f"the run's {'held-out' if options.split == 'heldout' else options.split} pairs",
        split=None if sources else options.split,
        pairs=len(pairs),
        target_tokens=int(tokens.sum()),
        loss=float(nats.sum() / tokens.sum()),
        scores=scores,
        exact=sum(found == reference for found, reference in zip(translations, references, strict=True)) / len(pairs),
        beams=options.search.beams,
        length_penalty=options.search.length_penalty,
        baselines={name: bleu.score(found, references) for name, found in others.items()},
        against_baselines={name: bleu.compare(translations, found, references) for name, found in others.items()},
        hardest=[HardSentence(pairs[i].source, references[i], translations[i], float(nats[i] / tokens[i])) for i in order],
        cut=cut,
    )


def evaluation_pairs(run: Run, sources: Sequence[str], split: str, reporter: Reporter) -> list[SentencePair]:
    """Return the sentence pairs in `sources`, or in a split of the run's own data if `sources` is empty.

    A source can also be two aligned files: `{source: FILE, target: FILE}`.
    """
    require_translation_run(run)
    data = run.recipe.data
    assert isinstance(data, PairsSection)
    if sources:
        parts: list[AlignedFiles | PairSources] = [_aligned_files(source) for source in sources if source.startswith("{")]
        if others := tuple(source for source in sources if not source.startswith("{")):
            parts.insert(0, PairSources(sources=others))
        return [pair for part in parts for pair in read_pairs(data, part, reporter)]
    if not (run.path / "heldout").exists():
        raise InputError("this run has no held-out pairs", where=str(run.path), hint="pass files with sentence pairs")
    if split == "test" and not (run.path / "heldout" / "test-pairs.jsonl").exists():
        raise InputError("this run has no test pairs", where=str(run.path), hint="set data.test in the recipe, and train again")
    return list(open_part(run.path / "heldout", split, source_tokenizer_of(run), run.tokenizer).pairs)


def _aligned_files(source: str) -> AlignedFiles:
    """Parse `{source: FILE, target: FILE}`. Raises `InputError` if it is not valid."""
    try:
        return AlignedFiles.model_validate(yaml.safe_load(source))
    except (yaml.YAMLError, ValidationError):
        raise InputError("must have the form {source: FILE, target: FILE}", where=source) from None


def translate_pairs(
    translator: Translator, pairs: Sequence[SentencePair], search: SearchOptions, reporter: Reporter
) -> tuple[list[str], int]:
    """Return the best translation of each source, and the number of truncated sources.

    Pairs with different target languages are translated separately.
    """
    translator.compile(reporter.note, sentences=len(pairs))
    translations, cut = [""] * len(pairs), 0
    with reporter.progress("translating", len(pairs), "sentences") as advance:
        for language in sorted({pair.language for pair in pairs}):
            indexes = [index for index, pair in enumerate(pairs) if pair.language == language]
            found = translator.translate([pairs[i].source for i in indexes], search, language=language, on_batch=advance)
            for index, result in zip(indexes, found, strict=True):
                translations[index] = result.translations[0].text
                cut += result.note is not None
    if cut:
        reporter.warn(f"{cut:,} of {len(pairs):,} source sentences are longer than the model's context and were truncated")
    return translations, cut


def _losses(translator: Translator, pairs: Sequence[SentencePair]) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss of each pair in nats, and the number of target tokens in each pair."""
    framing = translator.framing
    sources = [framing.source(framing.source_tokenizer.encode(pair.source), pair.language) for pair in pairs]
    targets = [framing.target(framing.target_tokenizer.encode(pair.target)) for pair in pairs]
    lengths = np.array([min(len(target), framing.context_length) for target in targets])
    return losses_of_pairs(translator.network, sources, targets), lengths


def _training_pairs(run: Run, reporter: Reporter) -> Sequence[SentencePair]:
    """Return the pairs that the run was trained on. If they are not available or have changed, warn and return no pairs."""
    try:
        prepared = formats.find(run.recipe.data).prepare(run.recipe, SILENT, 1)
    except InputError as error:
        reporter.warn(f"copying the source is the only baseline, because the training pairs cannot be read: {error}")
        return ()
    if prepared.fingerprint != run.checkpoint("last").state["fingerprints"]["data"]:
        reporter.warn("copying the source is the only baseline, because the training pairs have changed since the run was trained")
        return ()
    pairs: Sequence[SentencePair] = prepared.train.pairs
    return pairs


def compare_translators(
    first: Run,
    second: Run,
    sources: Sequence[str] = (),
    *,
    split: str = "heldout",
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> PairedScores:
    """Compare the BLEU of two runs on the same pairs with the paired bootstrap.

    Without `sources`, the pairs are a split of the runs' own data. Raises `InputError` if the runs do not have the same pairs.
    """
    bleu.require_sacrebleu()
    pairs = evaluation_pairs(first, sources, split, reporter)
    if not sources and evaluation_pairs(second, (), split, reporter) != pairs:
        raise InputError("the runs have different pairs", where=f"{first.path}, {second.path}", hint="choose pairs with --on")
    found = [translate_pairs(Translator.open(run, device=device), pairs, SearchOptions(), reporter)[0] for run in (first, second)]
    return bleu.compare(found[0], found[1], [pair.target for pair in pairs])
