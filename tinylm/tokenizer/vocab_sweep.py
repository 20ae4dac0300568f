"""Compare vocabulary sizes for a text and a model by compression of held-out text, number of parameters and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tinylm.cost.parameters import flops_per_token, parameter_counts
from tinylm.errors import InputError
from tinylm.recipe.schema import DecoderSection, ModelVariant, VocabularyTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import training
from tinylm.tokenizer.adapters import TokenizerAdapter, adapt
from tinylm.tokenizer.word_counts import Warn

MIN_OCCURRENCES = 50
"""A token that occurs fewer times in the training text is considered rare. Its embedding is assumed to be poorly trained."""
MAX_RARE_SHARE = 0.25
"""Sizes with a larger fraction of rare tokens are not suggested."""
BYTES_PER_ENTRY, READ_BYTES_PER_ENTRY = 2000, 2500
"""Number of bytes per vocabulary entry, in the text and in the data read during training (including repetitions). With fewer bytes,
tokens occur too rarely to be learned. In nine epochs on 1 MB, 512 entries (and dropout 0.2 instead of 0.1) gave 4% fewer bits per
byte than 1024 or 2048 entries. In two minutes on 12.6 MB, 2048 entries gave 2% fewer than 4096."""
MIN_VOCABULARY, MAX_VOCABULARY = 512, 32768


def vocab_size_for(text_bytes: float, read_bytes: float = math.inf) -> int:
    """Return the vocabulary size that `tinylm new` chooses for a text, as a power of two.

    `read_bytes` is the amount of text that training reads, including repetitions.
    """
    entries = max(1.0, min(text_bytes / BYTES_PER_ENTRY, read_bytes / READ_BYTES_PER_ENTRY))
    return min(max(1 << round(math.log2(entries)), MIN_VOCABULARY), MAX_VOCABULARY)


@dataclass(frozen=True)
class VocabSizeResult:
    """The metrics of one vocabulary size. The field names are the keys of `tinylm tokenize sweep --json`."""

    vocab_size: int
    bytes_per_token: float
    """Measured on the held-out text."""
    embedding_parameters: int
    """The parameters that depend on the vocabulary size: token embeddings and the output head."""
    embedding_share: float
    """`embedding_parameters` as a fraction of all parameters in the model."""
    bytes_per_step: float
    """Bytes of text that one optimizer step processes."""
    flops_per_byte: float
    """Training FLOPs per byte of text. A larger vocabulary has fewer tokens per byte, but a larger output head."""
    rare_tokens: float
    """The fraction of multi-byte tokens that are rare in the training text (see `MIN_OCCURRENCES`)."""


@dataclass(frozen=True)
class VocabSweep:
    """The results, sorted by size, and the suggested size with the reason for it."""

    sizes: list[VocabSizeResult]
    tokens_per_step: int
    suggested: int
    reason: str
    suggested_by_new: int
    """The size that `tinylm new` would choose for this text if training time were unlimited."""


def sweep_vocab_sizes(
    section: VocabularyTokenizer,
    sizes: Sequence[int],
    train_pieces: Callable[[], Iterable[Piece]],
    heldout_pieces: Callable[[], Iterable[Piece]],
    model: ModelVariant,
    tokens_per_step: int,
    warn: Warn,
) -> VocabSweep:
    """Train the tokenizer that `section` describes at each size on the training text, and evaluate it on the held-out text.

    Raises `InputError` if costs cannot be estimated for the architecture, if a size is not possible for this tokenizer kind, or if
    `sizes` is empty.
    """
    if not isinstance(model, DecoderSection):
        raise InputError(f"the cost of the {model.architecture} architecture cannot be estimated", where="model.architecture")
    word_counts = training.count(section, train_pieces(), warn)
    train_bytes = sum(len(piece.text.encode()) for piece in train_pieces())
    results: dict[int, VocabSizeResult] = {}
    for requested in sorted(set(sizes)):
        tokenizer = training.learn(section.model_copy(update={"vocab_size": requested}), word_counts)
        size = tokenizer.vocab_size
        if size < requested:
            warn(f"the text is too small for {requested:,} tokens: the vocabulary has only {size:,}")
        if size in results:
            continue
        heldout_counts, heldout_bytes = _token_counts(adapt(tokenizer), heldout_pieces())
        train_counts, _ = _token_counts(adapt(tokenizer), train_pieces())
        multi_byte = train_counts[tokenizer.token_byte_lengths > 1]
        bytes_per_token = heldout_bytes / max(int(heldout_counts.sum()), 1)
        total = sum(parameter_counts(model, size).values())
        embedding_parameters = total - sum(parameter_counts(model, 0).values())
        results[size] = VocabSizeResult(
            vocab_size=size,
            bytes_per_token=bytes_per_token,
            embedding_parameters=embedding_parameters,
            embedding_share=embedding_parameters / total,
            bytes_per_step=tokens_per_step * bytes_per_token,
            flops_per_byte=flops_per_token(model, size) / bytes_per_token,
            rare_tokens=float((multi_byte < MIN_OCCURRENCES).mean()) if len(multi_byte) else 0.0,
        )
    if not results:
        raise InputError("there are no sizes", where="--sizes", hint="use numbers separated by commas")
    return VocabSweep(list(results.values()), tokens_per_step, *_suggest(list(results.values())), vocab_size_for(train_bytes))


def _token_counts(tokenizer: TokenizerAdapter, pieces: Iterable[Piece]) -> tuple[np.ndarray, int]:
    """Return the count of each token in a text, and the size of the text in bytes."""
    counts, n_bytes = np.zeros(tokenizer.vocab_size, dtype=np.int64), 0
    for text, _ in tokenizer.segments(pieces):
        counts += np.bincount(tokenizer.encode(text), minlength=len(counts))
        n_bytes += len(text)
    return counts, n_bytes


def _suggest(results: Sequence[VocabSizeResult]) -> tuple[int, str]:
    """Return the suggested size and the reason. Among the sizes with few rare tokens, it has the fewest FLOPs per byte."""
    eligible = [result for result in results if result.rare_tokens <= MAX_RARE_SHARE]
    if not eligible:
        best = min(results, key=lambda result: result.rare_tokens)
        return best.vocab_size, f"all sizes have many rare tokens, and this one has the fewest: {_rare(best)}; more text would help"
    best = min(eligible, key=lambda result: result.flops_per_byte)
    cheapest = min(results, key=lambda result: result.flops_per_byte)
    if best is cheapest:
        return best.vocab_size, f"fewest training FLOPs per byte of text ({_mflops(best)}); {_rare(best)}"
    return best.vocab_size, (
        f"{_mflops(best)} of training per byte of text; {cheapest.vocab_size:,} would need only {_mflops(cheapest)}, but "
        f"{_rare(cheapest)}"
    )


def _mflops(result: VocabSizeResult) -> str:
    return f"{result.flops_per_byte / 1e6:.3g} MFLOPs"


def _rare(result: VocabSizeResult) -> str:
    return f"{result.rare_tokens:.0%} of its multi-byte tokens occur fewer than {MIN_OCCURRENCES} times in the training text"
