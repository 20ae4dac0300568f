"""Convert the inspected text to the ids that a model reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from tinylm.data.bucketed_pairs import PairFraming
from tinylm.data.framing import Framing
from tinylm.errors import InputError
from tinylm.model.base import Model
from tinylm.model.encoder_decoder import EncoderDecoder
from tinylm.model.sequence_to_sequence import START
from tinylm.recipe.labels import ClassificationObjective
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Run
from tinylm.tokenizer.control_tokens import encode_with_masks
from tinylm.translation.search import SearchOptions, translate_ids
from tinylm.translation.translator import Translator, source_tokenizer_of

DEFAULT_TOKENS = 128


@dataclass(frozen=True)
class InspectOptions:
    """Which part of a text to inspect, and which prediction to attribute."""

    max_tokens: int | None = None
    """Inspect only this many tokens from the beginning. The default is `DEFAULT_TOKENS` or the context length if it is smaller."""
    position: int | None = None
    """The position of the attributed prediction, counted from 0.

    The default is the last one, the first mask for an encoder, or the first token of a translation.
    """
    target: str | None = None
    """The token whose logit is attributed: a text or `@ID`, or a label. The default is the most likely token or label."""
    start_of_document: bool = False
    """Put the end-of-text token before the text, as between documents in training and in `tinylm eval`."""
    translation: str | None = None
    """The translation that a translator is inspected on. The default is its own greedy translation."""
    language: str = ""
    """The target language of a translator that has several."""


@dataclass(frozen=True)
class ModelInput:
    """The ids of an inspected text."""

    text: str
    """The text that `ids` were cut from. For a translator, this is the translation."""
    ids: list[int]
    source: list[int] = field(default_factory=list)
    """A translator's source ids."""
    end: int = -1
    """The id that follows `ids`, or -1 if it is unknown."""
    generated: bool = False
    """Whether `ids` are the translator's own translation."""


def read_input(run: Run, model: Model, text: str, options: InspectOptions, reporter: Reporter = SILENT) -> ModelInput:
    """Return the ids for a text. Raises `InputError` if the text is empty or an option does not fit the model."""
    if isinstance(model, EncoderDecoder):
        return _translator_input(run, model, text, options, reporter)
    for option, is_given in (("--translation", options.translation is not None), ("--to", bool(options.language))):
        if is_given:
            raise InputError("requires a translation model", where=option, hint="omit it")
    return ModelInput(text, token_ids(run, text, options, reporter))


def _limit(run: Run, options: InspectOptions) -> int:
    context = run.recipe.model.context_length
    limit = min(DEFAULT_TOKENS, context) if options.max_tokens is None else options.max_tokens
    if not 1 <= limit <= context:
        raise InputError(f"must be 1 to {context} (the model's context length), not {limit}", where="--max-tokens")
    return limit


def token_ids(run: Run, text: str, options: InspectOptions, reporter: Reporter = SILENT) -> list[int]:
    """Return the ids in the inspected part of a text, for any model but a translator.

    Raises `InputError` if the text is empty or an option is out of range.
    """
    limit, context = _limit(run, options), run.recipe.model.context_length
    if run.recipe.model.bidirectional or isinstance(run.recipe.objective, ClassificationObjective):
        return _framed_ids(run, text, limit, options, reporter)
    ids = run.tokenizer.encode(text)
    if options.start_of_document:
        if run.tokenizer.end_of_text is None:
            raise InputError("the tokenizer has no end-of-text token", where="--start-of-document")
        ids = [run.tokenizer.end_of_text, *ids]
    if not ids:
        raise InputError("the text is empty", where="--text")
    _warn_if_truncated(len(ids), limit, context, reporter)
    return ids[:limit]


def _framed_ids(run: Run, text: str, limit: int, options: InspectOptions, reporter: Reporter) -> list[int]:
    """Return the ids of a text for an encoder or a classifier, framed by control tokens.

    For an encoder, [MASK] in the text becomes a mask token.
    """
    if options.start_of_document:
        problem = "encoders and classifiers frame a text with their own control tokens"
        raise InputError(problem, where="--start-of-document", hint="omit it")
    is_classifier = isinstance(run.recipe.objective, ClassificationObjective)
    ids = run.tokenizer.encode(text) if is_classifier else encode_with_masks(run.tokenizer, text)
    if not ids:
        raise InputError("the text is empty", where="--text")
    if limit < 3:
        raise InputError("must be at least 3 for an encoder or a classifier", where="--max-tokens")
    _warn_if_truncated(len(ids), limit - 2, run.recipe.model.context_length - 2, reporter)
    framed: list[int] = Framing.of(run.tokenizer, run.recipe.model).frame(ids[: limit - 2]).tolist()
    return framed


def _warn_if_truncated(length: int, limit: int, maximum: int, reporter: Reporter) -> None:
    if length > limit:
        hint = f"raise --max-tokens to inspect up to {maximum:,}" if limit < maximum else "no more fit into the context"
        reporter.warn(f"only the first {limit:,} of {length:,} tokens are inspected ({hint})")


def _translator_input(run: Run, model: EncoderDecoder, text: str, options: InspectOptions, reporter: Reporter) -> ModelInput:
    """Return the ids of a source text and of its translation after `START`."""
    if options.start_of_document:
        raise InputError("is not supported for translation models", where="--start-of-document", hint="omit it")
    limit, context = _limit(run, options), run.recipe.model.context_length
    framing = PairFraming(source_tokenizer_of(run), run.tokenizer, context)
    Translator(model, framing).check_language(options.language)
    ids = framing.source_tokenizer.encode(" ".join(text.split()))
    if not ids:
        raise InputError("the text is empty", where="--text")
    controls = len(framing.source([], options.language))
    if limit <= controls:
        raise InputError(f"must be at least {controls + 1} for this model", where="--max-tokens")
    _warn_if_truncated(len(ids), limit - controls, context - controls, reporter)
    source = framing.source(ids[: limit - controls], options.language)
    if options.translation is None:
        [[best, *_]] = translate_ids(model, [source], framing.target_end, SearchOptions(beams=1, max_length=limit - 1))
        target, finished = list(best.ids), best.finished
    else:
        target = run.tokenizer.encode(options.translation)
        _warn_if_truncated(len(target), limit - 1, context - 1, reporter)
        target, finished = target[: limit - 1], len(target) < limit
    end = framing.target_end if finished else -1
    return ModelInput(run.tokenizer.decode(target), [START, *target], source.tolist(), end, options.translation is None)
