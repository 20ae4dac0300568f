"""From logits to the next token: the filters people know, on a whole batch at once.

Legend: B batch, V vocabulary. Filters set what may not be chosen to minus infinity; they apply in the order of `filtered`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.errors import InputError


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose. Defaults: temperature 0.8, top-k 50; `temperature` 0 always takes the likeliest token."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises `InputError` naming the option that is out of range."""
        ranges = (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 0, "0 or more"),
            ("--temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("--top-k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("--top-p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--min-p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            ("--repetition-penalty", self.repetition_penalty, 0 < self.repetition_penalty < float("inf"), "above 0"),
        )
        for option, value, fits, expected in ranges:
            if not fits:
                raise InputError(f"must be {expected}, not {value}", where=option)
        if any(not text for text in self.stop):
            raise InputError("an empty text would stop at once", where="--stop")


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens marked in `seen` (B, V, bool) less likely: positive logits divided, negative multiplied (Keskar et al. 2019)."""
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Logits (B, V) -> the distribution to draw from, (B, V): temperature, then top-k, top-p and min-p.

    top-p (Holtzman et al. 2020) keeps the smallest set of likeliest tokens that reaches the mass; min-p (Nguyen et al.
    2024) keeps what has at least that share of the likeliest token's probability. The likeliest token always stays.
    """
    logits = logits.float() / max(options.temperature, 1e-5)
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        threshold = logits.topk(options.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if options.top_p is not None and options.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        dropped = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, order, before >= options.top_p)
        probabilities = probabilities.masked_fill(dropped, 0.0)
    if options.min_p:
        least = options.min_p * probabilities.max(dim=-1, keepdim=True).values
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)


def choose(logits: Tensor, options: SamplingOptions, generators: list[torch.Generator]) -> Tensor:
    """Next ids (B,). Each row draws from its own generator, so that it does not depend on its neighbours."""
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = filtered(logits, options).cpu().double().cumsum(dim=-1)  # not every GPU has float64
    drawn = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])
    targets = drawn[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
    return chosen.to(logits.device)
