"""Choose the next token for every row from its logits: penalties and biases, temperature, top-k, top-p and min-p.

Penalties, biases and bans change the logits. Temperature and the filters then turn the logits into a distribution over candidates
without sorting the whole vocabulary. Each row is sampled with its own random number.

Legend: `B` batch, `V` vocabulary, `N` candidates, most likely first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.generation.option_ranges import LOGIT_CHANGES, MAX_LOGIT_CHANGE, check_ranges
from tinylm.model.state import DeviceSampler

MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
"""Maximum number of characters in a stop string."""
_FIRST_CANDIDATES = 256


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens and when to stop. Raises `InputError` with the name of the option if a value is out of range.

    A `temperature` of 0 means greedy decoding. `repetition_penalty` applies to tokens in the prompt and in the generated text.
    `frequency_penalty` (once per occurrence) and `presence_penalty` (once) apply only to the generated text. `logit_bias` contains
    pairs of a token id and a value that is added to the token's logit. Minus infinity bans the token. The ids in `forced` are
    generated first, regardless of their probability. `logprobs` is the number of alternatives to record with the log-probability of
    each token. If it is None, no log-probabilities are recorded.
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
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the sample, like the end-of-text token."""

    def __post_init__(self) -> None:
        check_ranges(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logprobs=self.logprobs,
        )
        if any(not text for text in self.stop):
            raise InputError("must not be empty", where="--stop")
        if len(self.stop) > MAX_STOPS:
            raise InputError(f"there can be at most {MAX_STOPS} stop strings, not {len(self.stop)}", where="--stop")
        if any(len(text) > MAX_STOP_LENGTH for text in self.stop):
            raise InputError(f"must have at most {MAX_STOP_LENGTH} characters", where="--stop")
        for _, bias in self.logit_bias:
            if not (abs(bias) <= MAX_LOGIT_CHANGE or bias == float("-inf")):
                raise InputError(f"must be {LOGIT_CHANGES}, or -inf, not {bias}", where="--logit-bias")
        if len(self.forced) > self.max_new_tokens:
            raise InputError(f"has {len(self.forced)} tokens, more than --max-new-tokens ({self.max_new_tokens})", where="--force")

    @cached_property
    def sampling_key(self) -> tuple[Any, ...]:
        """The options that determine how a token is chosen from biased logits. Rows with equal keys can be sampled together."""
        filters = (self.temperature, self.top_k, self.top_p, self.min_p)
        return *filters, self.repetition_penalty, self.frequency_penalty, self.presence_penalty, self.logprobs

    @cached_property
    def needs_only_logits(self) -> bool:
        """Whether tokens depend only on the model's logits and random numbers, and no log-probabilities are recorded."""
        return not self.has_penalties and not self.logit_bias and self.logprobs is None

    @cached_property
    def has_penalties(self) -> bool:
        """Whether the logits depend on which tokens have occurred before."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


def apply_penalties(logits: Tensor, seen: Tensor, counts: Tensor, options: SamplingOptions) -> Tensor:
    """Apply the three penalties in `options` to logits `(B, V)`.

    `seen` is a bool mask `(B, V)` of the tokens that occur in the prompt or the generated text. `counts` `(B, V)` contains the
    number of occurrences in the generated text only. The repetition penalty divides positive logits of seen tokens and multiplies
    negative ones (CTRL, Keskar et al. 2019). The frequency and presence penalties work as in the OpenAI API.
    """
    penalty = options.repetition_penalty
    if penalty != 1.0:
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if options.frequency_penalty:
        logits = logits - options.frequency_penalty * counts
    if options.presence_penalty:
        logits = logits - options.presence_penalty * (counts > 0)
    return logits


def distribution(
    logits: Tensor, options: SamplingOptions, first_candidates: int = _FIRST_CANDIDATES
) -> tuple[Tensor, Tensor | None]:
    """Turn logits `(B, V)` into probabilities `(B, N)` and token ids `(B, N)`.

    If the ids are None, the probabilities cover the whole vocabulary in order. Temperature is applied first, then top-k, top-p and
    min-p. Top-p (nucleus sampling, Holtzman et al. 2020) keeps the smallest set of most likely tokens that reaches the probability
    mass. Min-p (Nguyen et al. 2024) keeps the tokens with at least this fraction of the top token's probability. The most likely
    token is always kept. Without top-k, top-p and min-p first consider `first_candidates` tokens, and more if they keep all of
    them. This reads a value on the host, unless `first_candidates` covers the vocabulary.
    """
    logits = logits.float()
    truncates = (options.top_p is not None and options.top_p < 1) or bool(options.min_p)
    if options.top_k is None:
        logits = _scaled(logits, logits.amax(dim=-1, keepdim=True), options)
        if not truncates:
            return logits.softmax(dim=-1), None
    probabilities, ids = _candidates(logits, options, first_candidates)  # (B, N)
    if truncates:
        probabilities = probabilities * _keep_mask(probabilities, options)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities, ids


def _scaled(logits: Tensor, maximum: Tensor, options: SamplingOptions) -> Tensor:
    """Divide logits `(B, N)` by the temperature. Subtract the maximum `(B, 1)` first so that very large logits do not overflow."""
    return logits if options.temperature == 1.0 else (logits - maximum) / max(options.temperature, 1e-5)


def _candidates(logits: Tensor, options: SamplingOptions, first_candidates: int) -> tuple[Tensor, Tensor]:
    """Return the probabilities and ids `(B, N)` of the top-k tokens, or of all tokens that top-p and min-p can keep.

    With top-k, `logits` must not be scaled by the temperature yet. Without top-k, they must be scaled already. This does not sort
    the vocabulary, because sorting a large vocabulary takes longer than the forward pass.
    """
    vocab_size = logits.shape[-1]
    if options.top_k is not None:
        top = logits.topk(min(options.top_k, vocab_size), dim=-1)
        return _scaled(top.values, top.values[:, :1], options).softmax(dim=-1), top.indices
    log_total, size = logits.logsumexp(dim=-1, keepdim=True), min(first_candidates, vocab_size)
    while True:
        top = logits.topk(size, dim=-1)
        probabilities = (top.values - log_total).exp()
        if size == vocab_size or not _keep_mask(probabilities, options)[:, -1].any():
            return probabilities, top.indices
        size = min(8 * size, vocab_size)


def _keep_mask(probabilities: Tensor, options: SamplingOptions) -> Tensor:
    """Return a mask `(B, N)` of the candidates that top-p and min-p keep. Candidates must be sorted, most likely first."""
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if options.top_p is not None:
        keep &= probabilities.cumsum(dim=-1) - probabilities < options.top_p
    if options.min_p:
        keep &= probabilities >= options.min_p * probabilities[:, :1]
    return keep


def chances(logits: Tensor, options: SamplingOptions, ids: Tensor) -> Tensor:
    """Return the probability `(B, K)` that `choose` selects each of `ids` `(B, K)` from logits `(B, V)`."""
    if options.temperature == 0:
        return (ids == logits.argmax(dim=-1, keepdim=True)).float()
    probabilities, candidates = distribution(logits, options)
    if candidates is not None:
        probabilities = torch.zeros_like(logits, dtype=probabilities.dtype).scatter(1, candidates, probabilities)
    return probabilities.gather(1, ids)


def choose(logits: Tensor, options: SamplingOptions, uniforms: Tensor | None, first_candidates: int = _FIRST_CANDIDATES) -> Tensor:
    """Choose the next ids `(B,)` from logits `(B, V)`, either greedily or by inverting each row's cumulative distribution.

    `uniforms` `(B,)` contains one random number in [0, 1) per row. It may be None for greedy decoding. `first_candidates`: see
    `distribution`.
    """
    if options.temperature == 0 or uniforms is None:
        return logits.argmax(dim=-1)
    probabilities, ids = distribution(logits, options, first_candidates)
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
    cumulative = probabilities.to(dtype).cumsum(dim=-1)
    targets = uniforms.to(logits.device, dtype)[:, None] * cumulative[:, -1:]
    indices = torch.searchsorted(cumulative, targets, right=True).clamp_max_(cumulative.shape[-1] - 1)  # (B, 1)
    return (indices if ids is None else ids.gather(1, indices)).squeeze(1)


def device_sampler(options: SamplingOptions, vocab_size: int) -> DeviceSampler:
    """Return a sampler that chooses like `choose`, but never reads a value on the host.

    Top-p and min-p without top-k therefore sort the whole vocabulary.
    """

    def chosen(logits: Tensor, uniforms: Tensor) -> Tensor:
        return choose(logits, options, uniforms, first_candidates=vocab_size)

    return DeviceSampler(options.sampling_key, chosen)
