"""Count the tokens in a recipe's data, or estimate them from a sample if the data is large. This module does not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain

import numpy as np

from tinylm.cost.examples import ExampleSize
from tinylm.data import formats, labels, pairs, prepared_folder
from tinylm.data.bucketing import make_order
from tinylm.data.chat import read_parts
from tinylm.data.datasets import example_size
from tinylm.data.framing import with_control_tokens
from tinylm.data.labels import LabeledParts
from tinylm.data.prepare import load_or_train_tokenizer, load_tokenizer_file, prepare, prepare_text
from tinylm.data.split_text import SplitText, open_text
from tinylm.recipe import Recipe
from tinylm.recipe.chat import ChatSection, PreferencesSection
from tinylm.recipe.labels import LabelsSection
from tinylm.recipe.pairs import PairsSection
from tinylm.recipe.schema import DataVariant, FileTokenizer, TokenizerSection, VocabularyTokenizer, require_text
from tinylm.reporting import SILENT, Reporter
from tinylm.text.cutting import cut_into_pieces
from tinylm.text.pairs import SentencePair
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training
from tinylm.tokenizer.chat_template import ChatEncoder, ChatTemplate, add_control_tokens

EXACT_LIMIT_BYTES = 16 << 20
"""Maximum size in bytes of a training text that is tokenized completely."""
SAMPLE_CHARACTERS = 4 << 20


@dataclass(frozen=True)
class TextSize:
    """The size of a text in tokens."""

    vocab_size: int
    train_tokens: int
    heldout_tokens: int
    exact: bool
    """False if the token counts are estimates."""
    source_tokens: tuple[int, ...] = ()
    """The number of training tokens of each source of a mixture."""


@dataclass(frozen=True)
class DataSize:
    """The size of a recipe's data."""

    recipe: Recipe
    """The recipe with the values that are filled in from the data, such as `objective.labels`."""
    tokens: TextSize
    """The sizes in tokens. For labeled texts and sentence pairs, they include control tokens and both sides."""
    example: ExampleSize | None = None
    """The size of a training example, or None if the examples are windows of a text."""


def estimate_data_size(recipe: Recipe, reporter: Reporter) -> DataSize:
    """Count the tokens in a recipe's data. A small amount is encoded and cached for training. Otherwise, the counts are estimates.

    Raises `InputError` in the same cases as the preparation for training.
    """
    data = recipe.data
    if isinstance(data, LabelsSection):
        texts = labels.read_parts(data, SILENT)
        if texts.train_bytes > EXACT_LIMIT_BYTES:
            return _estimate_labels(recipe, texts, reporter)
    elif isinstance(data, PairsSection):
        sentences = pairs.read_parts(data, SILENT)
        if sum(len(pair.source) + len(pair.target) for pair in sentences["train"]) > EXACT_LIMIT_BYTES:
            return _estimate_pairs(recipe, data, sentences, reporter)
    elif not isinstance(data, PreferencesSection):
        return DataSize(recipe, estimate_text_size(data, with_control_tokens(recipe.tokenizer, recipe.model), reporter))
    data_format = formats.find(data)
    prepared = data_format.prepare(recipe, reporter, 1)
    dataset = data_format.dataset(recipe, prepared)
    size = example_size(dataset)
    assert size is not None
    heldout_examples = len(prepared.heldout) // (2 if isinstance(data, PreferencesSection) else 1)  # a pair is two conversations
    train, heldout = round(dataset.examples_per_epoch * size.tokens), round(heldout_examples * size.tokens / size.filled)
    return DataSize(prepared.fill_in(recipe), TextSize(prepared.tokenizer.vocab_size, train, heldout, exact=True), size)


def _estimate_labels(recipe: Recipe, parts: LabeledParts, reporter: Reporter) -> DataSize:
    """Estimate the size of labeled texts from evenly spaced texts."""
    texts = parts.texts["train"]
    sample = [item.text for item in texts[:: _sample_step(sum(len(item.text) for item in texts))]]
    tokenizer = _sample_tokenizer(with_control_tokens(recipe.tokenizer, recipe.model), sample, reporter)
    lengths = np.minimum(_lengths(tokenizer, sample), recipe.model.context_length - 2)[:, None] + 2
    found = tuple(sorted({item.label for item in texts}))
    objective = recipe.objective.model_copy(update={"labels": found})
    return _from_lengths(
        recipe.model_copy(update={"objective": objective}), lengths, tokenizer, len(texts), len(parts.texts["heldout"])
    )


def _estimate_pairs(recipe: Recipe, data: PairsSection, parts: dict[str, list[SentencePair]], reporter: Reporter) -> DataSize:
    """Estimate the size of sentence pairs from evenly spaced pairs. Pairs that are longer than the context are not counted."""
    train = parts["train"]
    step = _sample_step(sum(len(pair.source) + len(pair.target) for pair in train))
    sources, targets = [pair.source for pair in train[::step]], [pair.target for pair in train[::step]]
    section = pairs.with_language_tokens(recipe.tokenizer, parts, data)
    separate = data.vocabulary == "separate"
    tokenizer = _sample_tokenizer(section, targets if separate else [*sources, *targets], reporter)
    source_tokenizer = _sample_tokenizer(section, sources, reporter) if separate else tokenizer
    # The end-of-text token follows each sentence, and the language token precedes a source sentence.
    source_lengths = _lengths(source_tokenizer, sources) + (1 if data.language is None else 2)
    lengths = np.stack((_lengths(tokenizer, targets) + 1, source_lengths), axis=1)
    fitting = lengths.max(axis=1) <= recipe.model.context_length
    if separate:
        objective = recipe.objective.model_copy(update={"source_vocab_size": source_tokenizer.vocab_size})
        recipe = recipe.model_copy(update={"objective": objective})
    count = round(len(train) * float(fitting.mean()))
    return _from_lengths(recipe, lengths[fitting], tokenizer, count, len(parts["heldout"]))


def _from_lengths(recipe: Recipe, lengths: np.ndarray, tokenizer: Tokenizer, train: int, heldout: int) -> DataSize:
    """Return the size of `train` and `heldout` examples, from the lengths (examples, sides) of a sample."""
    tokens = float(lengths.sum(axis=1).mean())
    batch_tokens = recipe.data.batch_tokens if isinstance(recipe.data, PairsSection) else None
    order = make_order(lengths, recipe.training.global_batch_size, batch_tokens, recipe.seed)
    mean, longest = order.padded_lengths().tolist(), order.longest().tolist()
    source_mean, source_longest = (mean[1], longest[1]) if len(mean) > 1 else (0.0, 0)
    size = ExampleSize(tokens * order.filled, mean[0], longest[0], source_mean, source_longest, order.filled)
    return DataSize(recipe, TextSize(tokenizer.vocab_size, round(train * tokens), round(heldout * tokens), exact=False), size)


def _sample_step(characters: int) -> int:
    """Return n such that every n-th example has about `SAMPLE_CHARACTERS` characters in total."""
    return max(1, characters // SAMPLE_CHARACTERS)


def _sample_tokenizer(section: TokenizerSection, texts: Sequence[str], reporter: Reporter) -> Tokenizer:
    """Load a tokenizer from a file, or train it on the texts."""
    if isinstance(section, FileTokenizer):
        return load_tokenizer_file(section)
    return training.train(_allow_smaller(section), _pieces(texts), reporter.warn)


def _pieces(texts: Iterable[str]) -> Iterator[Piece]:
    for text in texts:
        for number, part in enumerate(cut_into_pieces([text])):
            yield Piece(part, number == 0)


def _lengths(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Return the number of tokens in each text, (texts,)."""
    return np.array([sum(len(ids) for ids, _ in tokenizer.encode_pieces(_pieces([text]))) for text in texts])


def estimate_text_size(data: DataVariant, tokenizer: TokenizerSection, reporter: Reporter) -> TextSize:
    """Count the tokens in a text. A small text is tokenized and cached for training. For a large text, the counts are estimates.

    Raises `InputError` in the same cases as `prepare`, and if the data format is neither text nor chat.
    """
    if isinstance(data, ChatSection):
        return _estimate_chat(data, tokenizer, reporter)
    if prepared_folder.find(require_text(data)) is not None:
        opened = prepare(require_text(data), tokenizer, reporter)
        return TextSize(opened.tokenizer.vocab_size, len(opened.train), len(opened.heldout), exact=True)
    with ExitStack() as stack:
        text = open_text(require_text(data), reporter, stack)
        if text.train_bytes > EXACT_LIMIT_BYTES:
            return _estimate_from_sample(text, tokenizer, reporter)
        prepared = prepare_text(text, tokenizer, reporter)
    spans = prepared.spans.get("train", ())
    sizes = len(prepared.train), len(prepared.heldout)
    return TextSize(prepared.tokenizer.vocab_size, *sizes, exact=True, source_tokens=tuple(span.tokens for span in spans))


def _estimate_from_sample(text: SplitText, tokenizer: TokenizerSection, reporter: Reporter) -> TextSize:
    """Train a tokenizer on the beginning of the text or, for a mixture, of each source, and count the tokens in this sample."""
    sizes = [source.sizes("train")[1] for source in text.texts]
    samples = [
        list(_take_characters(source.pieces("train"), max(1, SAMPLE_CHARACTERS * size // sum(sizes))))
        for source, size in zip(text.texts, sizes, strict=True)
    ]
    trained = training.train(_allow_smaller(tokenizer), chain.from_iterable(samples), reporter.warn)
    counts = []
    for sample, size in zip(samples, sizes, strict=True):
        tokens = sum(len(ids) for ids, _ in trained.encode_pieces(sample))
        counts.append(int(tokens / sum(len(piece.text) for piece in sample) * size))
    heldout = int(sum(counts) / sum(sizes) * text.sizes("heldout")[1])
    by_source = tuple(counts) if len(counts) > 1 else ()
    return TextSize(trained.vocab_size, sum(counts), heldout, exact=False, source_tokens=by_source)


def _estimate_chat(data: ChatSection, section: TokenizerSection, reporter: Reporter) -> TextSize:
    """Encode all conversations. The result is not exact, because packing leaves some positions empty."""
    parts = read_parts(data, reporter)
    encoder = ChatEncoder(ChatTemplate(), add_control_tokens(load_or_train_tokenizer(parts, section, reporter)).tokenizer)

    def tokens(part: str) -> int:
        return sum(len(turn.ids) for item in parts.conversations[part] for turn in encoder.turns(item.messages))

    mixed = 0.0 if data.mix is None else data.mix.share
    return TextSize(encoder.tokenizer.vocab_size, round(tokens("train") / (1 - mixed)), tokens("heldout"), exact=False)


def _allow_smaller(tokenizer: TokenizerSection) -> TokenizerSection:
    """Allow a smaller vocabulary, because a sample might not contain enough distinct tokens for the requested size."""
    if isinstance(tokenizer, VocabularyTokenizer):
        return tokenizer.model_copy(update={"allow_smaller": True})
    return tokenizer


def _take_characters(pieces: Iterator[Piece], characters: int) -> Iterator[Piece]:
    for piece in pieces:
        if characters <= 0:
            return
        yield Piece(piece.text[:characters], piece.starts_document)
        characters -= len(piece.text)
