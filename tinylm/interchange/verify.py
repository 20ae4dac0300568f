"""Check that two implementations of a model produce the same outputs: compare logits, perplexity and token ids on real text."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinylm.errors import WorkError, missing_extra
from tinylm.evaluation.metrics import perplexity_of
from tinylm.evaluation.scoring import token_losses
from tinylm.run import Run
from tinylm.text import builtin
from tinylm.text.sources import Corpus
from tinylm.tokenizer import Tokenizer

MAX_LOGIT_DIFFERENCE = 1e-4
"""Largest absolute difference between logits, or hidden states, that is attributed to float32 rounding."""
_MAX_TOKENS = 2048
_MAX_LENGTH = 1024
_MAX_CHARACTERS = 40_000

LogitsFunction = Callable[[Tensor], Tensor]
"""Maps ids `(B, T)` to logits `(B, T, V)`."""


def sample_text(run: Run) -> str:
    """Return up to 40,000 characters of the run's held-out text, or of a built-in corpus if the run has none."""
    if (run.path / "heldout").exists():
        ids = np.asarray(run.heldout().tokens[: _MAX_CHARACTERS // 2], dtype=np.int64)
        return run.tokenizer.decode(ids.tolist())[:_MAX_CHARACTERS]
    return english_text()


def english_text() -> str:
    """Return the first 40,000 characters of the first built-in corpus."""
    with Corpus([f"builtin:{next(iter(builtin.BUILTINS))}"]) as corpus:
        text = ""
        for piece in corpus.pieces():
            text += piece.text
            if len(text) >= _MAX_CHARACTERS:
                break
    return text[:_MAX_CHARACTERS]


def windows(ids: list[int], context_length: int) -> Tensor:
    """Return evenly spaced windows of equal length from `ids`, as `(rows, time)`, with up to 2,048 tokens in total."""
    length = max(1, min(context_length, _MAX_LENGTH, len(ids) - 1))
    count = max(1, min(_MAX_TOKENS // length, len(ids) // length))
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return torch.tensor([ids[start : start + length] for start in starts])


@torch.no_grad()
def largest_difference(ours: LogitsFunction, theirs: LogitsFunction, rows: Tensor) -> float:
    """Return the largest absolute difference between the logits of two models on `rows` `(rows, time)`.

    Logits are computed in batches of up to 1,024 tokens and compared in float32, over the vocabulary columns that both models have.
    Any NaN counts as infinity.
    """
    largest = 0.0
    for batch in torch.split(rows, max(1, _MAX_LENGTH // rows.shape[1])):
        a, b = ours(batch).float(), theirs(batch).float()
        columns = min(a.shape[-1], b.shape[-1])
        difference = float((a[..., :columns] - b[..., :columns]).abs().max())
        largest = max(largest, difference if math.isfinite(difference) else math.inf)
    return largest


@torch.no_grad()
def perplexity(logits: LogitsFunction, rows: Tensor) -> float:
    """Return the perplexity of `rows` `(rows, time)`. The first token of each row serves only as context."""
    nats, count = 0.0, 0
    for row in rows[:, None]:
        losses = token_losses(logits(row)[0, :-1], row[0, 1:])
        nats, count = nats + float(losses.double().sum()), count + row.shape[1] - 1
    return perplexity_of(nats / max(count, 1))


@torch.no_grad()
def greedy(logits: LogitsFunction, prompt: Tensor, new_tokens: int) -> list[int]:
    """Decode `new_tokens` tokens greedily after `prompt` `(1, time)`, without a KV cache."""
    ids = prompt
    for _ in range(new_tokens):
        ids = torch.cat((ids, logits(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids[0, prompt.shape[1] :].tolist()


def check_logits(difference: float, name: str) -> None:
    """Raise `WorkError` if a difference between outputs is too large to be a rounding error. `name` appears in the message."""
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise WorkError(
            f"{name} does not match the original model: outputs differ by {difference:.2e}, more than {MAX_LOGIT_DIFFERENCE:.0e}",
            hint="nothing was saved",
        )


def check_ids(tokenizer: Tokenizer, encode: Callable[[str], list[int]], text: str, name: str) -> None:
    """Raise `WorkError` if `encode` and `tokenizer` return different ids for a probe of `text`. `name` appears in the message."""
    for probe in tokenizer_probes(text):
        if encode(probe) != tokenizer.encode(probe):
            raise WorkError(f"{name} tokenizes {probe[:60]!r} differently from the tinylm tokenizer", hint="nothing was saved")


_EDGE_CASES = (
    " leading, trailing ",
    "tabs\tand\r\nnewlines\n\n  twice",
    "x=1234567890, 3.14159; f(a)[0]",
    "naïve café 東京 🙂",
    "don't I'LL we'Ve",
    "<|endoftext|></s>",
)


def tokenizer_probes(text: str) -> list[str]:
    """Return the texts for comparing tokenizers: chunks of `text`, then strings on which tokenizers often disagree."""
    return [*(text[start : start + 2000] for start in range(0, len(text), 2000)), *_EDGE_CASES]


def require(module: str, extra: str, purpose: str) -> Any:
    """Import an optional package. Raises `InputError` with the install command if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise missing_extra(extra, purpose) from None
