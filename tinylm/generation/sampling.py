"""From logits to the next token: what people ask of a sampler, on a whole batch at once.

Penalties, biases and bans change logits; temperature, top-k, top-p and min-p, in this order, make a distribution of them, of which
only the candidates are ever sorted or drawn from. Each row draws with a number of its own.

Legend: B batch, V vocabulary, N candidates, likeliest first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.errors import InputError

MOST_LOGPROBS = 20
_FIRST_CANDIDATES = 256


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose. Defaults: temperature 0.8, top-k 50; `temperature` 0 always takes the likeliest token.

    `repetition_penalty` looks at prompt and text, `frequency_penalty` (times the count) and `presence_penalty` (once) at the text
    alone. `logit_bias` holds (id, what is added to its logit); minus infinity bans it. `forced` ids come first, whatever
    their probability. `logprobs`: how many alternatives to note with each token, 0 for none but the token's own; None: nothing.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    forced: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raises `InputError` naming the option that is out of range."""
        ranges = (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 0, "0 or more"),
            ("--temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("--top-k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("--top-p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--min-p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            ("--repetition-penalty", self.repetition_penalty, 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("--frequency-penalty", self.frequency_penalty, abs(self.frequency_penalty) < float("inf"), "a number"),
            ("--presence-penalty", self.presence_penalty, abs(self.presence_penalty) < float("inf"), "a number"),
            ("--logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS, f"0 to {MOST_LOGPROBS}"),
        )
        for option, value, fits, expected in ranges:
            if not fits:
                raise InputError(f"must be {expected}, not {value}", where=option)
        if any(not text for text in self.stop):
            raise InputError("an empty text would stop at once", where="--stop")
        if any(not bias < float("inf") for _, bias in self.logit_bias):
            raise InputError("must be a number, or -inf", where="--logit-bias")
        if len(self.forced) > self.max_new_tokens:
            raise InputError(f"{len(self.forced)} tokens are more than --max-new-tokens {self.max_new_tokens}", where="--force")

    @property
    def remembers(self) -> bool:
        """Whether what was written changes what is likely."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


def penalised(logits: Tensor, seen: Tensor, counts: Tensor, options: SamplingOptions) -> Tensor:
    """Logits (B, V) with the penalties of `options`. `seen` (B, V, bool): in prompt or text; `counts` (B, V): times in the text.

    Repetition: positive logits of what was seen are divided, negative ones multiplied (Keskar et al. 2019). The other two are
    OpenAI's: what is subtracted for each time, and once.
    """
    penalty = options.repetition_penalty
    if penalty != 1.0:
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if options.frequency_penalty:
        logits = logits - options.frequency_penalty * counts
    if options.presence_penalty:
        logits = logits - options.presence_penalty * (counts > 0)
    return logits


def distribution(logits: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor | None]:
    """Logits (B, V) -> probabilities (B, N) and their ids (B, N); ids None: the whole vocabulary in its own order.

    Temperature first, then top-k; then top-p (Holtzman et al. 2020), the smallest set of likeliest tokens that reaches the mass;
    then min-p (Nguyen et al. 2024), what has at least that share of the likeliest token's probability. The likeliest token
    always stays.
    """
    logits = logits.float()
    if options.temperature != 1.0:
        logits = logits / max(options.temperature, 1e-5)
    narrowing = (options.top_p is not None and options.top_p < 1) or bool(options.min_p)
    if options.top_k is None and not narrowing:
        return logits.softmax(dim=-1), None
    probabilities, ids = _candidates(logits, options)
    if narrowing:
        probabilities = probabilities * _kept(probabilities, options)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities, ids


def _candidates(logits: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """Probabilities and ids (B, N) of what top-k leaves, or of at least as many as the other filters can keep.

    Sorting all of a large vocabulary would cost more than the model.
    """
    vocabulary = logits.shape[-1]
    if options.top_k is not None:
        top = logits.topk(min(options.top_k, vocabulary), dim=-1)
        return top.values.softmax(dim=-1), top.indices
    whole, size = logits.logsumexp(dim=-1, keepdim=True), min(_FIRST_CANDIDATES, vocabulary)
    while True:
        top = logits.topk(size, dim=-1)
        probabilities = (top.values - whole).exp()
        if size == vocabulary or not _kept(probabilities, options)[:, -1].any():
            return probabilities, top.indices
        size = min(8 * size, vocabulary)


def _kept(probabilities: Tensor, options: SamplingOptions) -> Tensor:
    """Which candidates, given likeliest first, top-p and min-p keep."""
    kept = torch.ones_like(probabilities, dtype=torch.bool)
    if options.top_p is not None:
        kept &= probabilities.cumsum(dim=-1) - probabilities < options.top_p
    if options.min_p:
        kept &= probabilities >= options.min_p * probabilities[:, :1]
    return kept


def choose(logits: Tensor, options: SamplingOptions, drawn: Tensor | None) -> Tensor:
    """Next ids (B,) by inverting each row's cumulative distribution at `drawn` (B,), uniform in [0, 1); greedy takes None."""
    if options.temperature == 0 or drawn is None:
        return logits.argmax(dim=-1)
    probabilities, ids = distribution(logits, options)
    precise = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = probabilities.to(precise).cumsum(dim=-1)
    targets = drawn.to(logits.device, precise)[:, None] * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, targets, right=True).clamp_max_(cumulative.shape[-1] - 1)
    return (places if ids is None else ids.gather(1, places)).squeeze(1)
