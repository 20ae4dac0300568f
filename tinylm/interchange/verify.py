"""Whether two models are the same: real text in windows, and the largest difference of what they make of it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.errors import WorkError, need_extra
from tinylm.run import Run
from tinylm.text import builtin
from tinylm.text.sources import Corpus
from tinylm.tokenizer import Tokenizer

MOST_DIFFERENT = 1e-4
"""Logits of the same model, computed in float32 in another order, stay below it."""
_TOKENS = 2048
_LONGEST = 1024
_CHARACTERS = 40_000

Logits = Callable[[Tensor], Tensor]
"""(B, T) ids -> (B, T, V)."""


def text_of(run: Run) -> str:
    """Some of the run's held-out text, or of `builtin:python-docs` where it has none."""
    if (run.path / "heldout").exists():
        ids = np.asarray(run.heldout().tokens[: _CHARACTERS // 2], dtype=np.int64)
        return run.tokenizer.decode(ids.tolist())[:_CHARACTERS]
    return some_english()


def some_english() -> str:
    with Corpus([f"builtin:{next(iter(builtin.BUILTINS))}"]) as corpus:
        found = ""
        for piece in corpus.pieces():
            found += piece.text
            if len(found) >= _CHARACTERS:
                break
    return found[:_CHARACTERS]


def windows(ids: list[int], context_length: int) -> Tensor:
    """About 2048 tokens of `ids` as rows of equal length, as long as the context allows, from its beginning to its end."""
    length = max(1, min(context_length, _LONGEST, len(ids) - 1))
    count = max(1, min(_TOKENS // length, len(ids) // length))
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return torch.tensor([ids[start : start + length] for start in starts])


@torch.no_grad()
def largest_difference(ours: Logits, theirs: Logits, rows: Tensor) -> float:
    """Between the logits of two models, in float32, over the columns that both have. NaN anywhere is infinitely different."""
    largest = 0.0
    for row in rows[:, None]:
        one, other = ours(row).float(), theirs(row).float()
        columns = min(one.shape[-1], other.shape[-1])
        difference = float((one[..., :columns] - other[..., :columns]).abs().max())
        largest = max(largest, difference if math.isfinite(difference) else math.inf)
    return largest


@torch.no_grad()
def perplexity(logits: Logits, rows: Tensor) -> float:
    """Of each row's tokens after its first."""
    nats, count = 0.0, 0
    for row in rows[:, None]:
        losses = F.cross_entropy(logits(row).float()[0, :-1], row[0, 1:], reduction="sum")
        nats, count = nats + float(losses), count + row.shape[1] - 1
    return math.exp(min(nats / max(count, 1), 700.0))


@torch.no_grad()
def greedy(logits: Logits, prompt: Tensor, new_tokens: int) -> list[int]:
    """The likeliest token after the prompt (1, T), again and again."""
    written = prompt
    for _ in range(new_tokens):
        written = torch.cat((written, logits(written)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return written[0, prompt.shape[1] :].tolist()


def check_same(difference: float, what: str) -> None:
    """Raises `WorkError` for logits that differ by more than rounding explains."""
    if not difference <= MOST_DIFFERENT:
        raise WorkError(
            f"{what} is not the same model: logits differ by {difference:.2e}, more than {MOST_DIFFERENT:.0e}",
            hint="nothing was left",
        )


def check_ids(tokenizer: Tokenizer, encode: Callable[[str], list[int]], text: str, what: str) -> None:
    """Raises `WorkError` where another tokenizer gives a text other ids."""
    for line in probes(text):
        if encode(line) != tokenizer.encode(line):
            raise WorkError(f"{what} splits {line[:60]!r} into other tokens", hint="nothing was left")


_ODD = (
    " leading, trailing ",
    "tabs\tand\r\nnewlines\n\n  twice",
    "x=1234567890, 3.14159; f(a)[0]",
    "naïve café 東京 🙂",
    "don't I'LL we'Ve",
    "<|endoftext|></s>",
)


def probes(text: str) -> list[str]:
    """What tokenizers are compared on: a text in parts, and what they disagree about."""
    return [*(text[start : start + 2000] for start in range(0, len(text), 2000)), *_ODD]


def require(module: str, extra: str, purpose: str) -> Any:
    """An optional package. Raises `InputError` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise need_extra(extra, purpose) from None
