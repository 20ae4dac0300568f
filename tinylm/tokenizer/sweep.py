"""Which vocabulary size: what each costs a model and what it saves, measured on held-out text, with a suggestion and its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tinylm.cost import plan
from tinylm.errors import InputError
from tinylm.recipe.schema import ModelSection, VocabularyTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import training
from tinylm.tokenizer.codec import Codec, codec_of

SEEN_OFTEN = 50
"""Occurrences in the learned text that a token's embedding needs to become of use (an assumption, stated with the suggestion)."""
MOST_SELDOM = 0.25


@dataclass(frozen=True)
class Size:
    """One vocabulary size."""

    vocab_size: int
    bytes_per_token: float
    """On the held-out text."""
    embedding_parameters: int
    embedding_share: float
    """Of all the model's parameters: rows for tokens at its input, its head, and wherever else it has them."""
    bytes_per_step: float
    """Text that one optimiser step reads."""
    flops_per_byte: float
    """Training arithmetic for a byte of text: fewer tokens make it less, a larger head more."""
    seldom_tokens: float
    """Of the tokens of more than one byte, the share that stands fewer than `SEEN_OFTEN` times in the text learned from."""


@dataclass(frozen=True)
class Sweep:
    sizes: list[Size]
    tokens_per_step: int
    suggested: int
    reason: str


def sweep(
    section: VocabularyTokenizer,
    sizes: Sequence[int],
    learned: Callable[[], Iterable[Piece]],
    heldout: Callable[[], Iterable[Piece]],
    model: ModelSection,
    tokens_per_step: int,
    warn: training.Warn,
) -> Sweep:
    """Train `section` at every size on the text that `learned` gives and measure it on `heldout`.

    Raises `InputError` for a size that the kind cannot have, or when the text supports none of them.
    """
    words = training.count(section, learned(), warn)
    found: dict[int, Size] = {}
    for wanted in sorted(set(sizes)):
        tokenizer = training.learn(section.model_copy(update={"vocab_size": wanted}), words)
        size = tokenizer.vocab_size
        if size < wanted:
            warn(f"the text supports {size:,} tokens, not {wanted:,}")
        if size in found:
            continue
        held_counts, held_bytes = _token_counts(codec_of(tokenizer), heldout())
        learned_counts, _ = _token_counts(codec_of(tokenizer), learned())
        longer = learned_counts[tokenizer.token_byte_lengths > 1]
        per_token = held_bytes / max(int(held_counts.sum()), 1)
        total = sum(plan.parameter_counts(model, size).values())
        rows = total - sum(plan.parameter_counts(model, 0).values())
        found[size] = Size(
            size,
            per_token,
            rows,
            rows / total,
            tokens_per_step * per_token,
            plan.flops_per_token(model, size) / per_token,
            float((longer < SEEN_OFTEN).mean()) if len(longer) else 0.0,
        )
    if not found:
        raise InputError("no sizes to try", where="--sizes")
    listed = list(found.values())
    return Sweep(listed, tokens_per_step, *_suggestion(listed))


def _token_counts(codec: Codec, pieces: Iterable[Piece]) -> tuple[np.ndarray, int]:
    counts, size = np.zeros(codec.vocab_size, dtype=np.int64), 0
    for text, _ in codec.encoded(pieces):
        counts += np.bincount(codec.encode(text), minlength=len(counts))
        size += len(text)
    return counts, size


def _suggestion(sizes: Sequence[Size]) -> tuple[int, str]:
    """The size of least arithmetic per byte among those whose tokens are mostly seen often enough to be learned."""
    learnable = [size for size in sizes if size.seldom_tokens <= MOST_SELDOM]
    if not learnable:
        best = min(sizes, key=lambda size: size.seldom_tokens)
        return best.vocab_size, f"no size's tokens are seen often enough: even here {_seldom(best)}; more text would help"
    best = min(learnable, key=lambda size: size.flops_per_byte)
    cheapest = min(sizes, key=lambda size: size.flops_per_byte)
    reason = f"{best.flops_per_byte / 1e6:.3g} MFLOP of training for a byte of text"
    if best is cheapest:
        return best.vocab_size, f"{reason}, the least of these sizes, and {_seldom(best)}"
    return best.vocab_size, (
        f"{reason}; {cheapest.vocab_size:,} would need {cheapest.flops_per_byte / 1e6:.3g}, but there {_seldom(cheapest)}, "
        "too few to learn from"
    )


def _seldom(size: Size) -> str:
    return f"{size.seldom_tokens:.0%} of the longer tokens stand fewer than {SEEN_OFTEN} times in the text learned from"
