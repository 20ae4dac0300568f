"""The valid ranges of the sampling options. This module does not import torch, so that the command line rejects them at once."""

from __future__ import annotations

from tinylm.errors import InputError

MAX_LOGPROBS = 20
MAX_NEW_TOKENS = 10**9
MAX_LOGIT_CHANGE = 1e10
"""Maximum absolute value of a bias or penalty. Larger values could overflow the float32 logits."""
LOGIT_CHANGES = f"between -{MAX_LOGIT_CHANGE:g} and {MAX_LOGIT_CHANGE:g}"


def check_ranges(
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    frequency_penalty: float,
    presence_penalty: float,
    logprobs: int | None,
) -> None:
    """Raise `InputError` with the name of the option if a value is out of range."""
    limit = MAX_LOGIT_CHANGE
    repetition = f"between {1 / limit:g} and {limit:g}"
    ranges = (
        ("--max-new-tokens", max_new_tokens, 0 <= max_new_tokens <= MAX_NEW_TOKENS, f"0 to {MAX_NEW_TOKENS}"),
        ("--temperature", temperature, 0 <= temperature < float("inf"), "0 or more"),
        ("--top-k", top_k, top_k is None or top_k >= 1, "1 or more"),
        ("--top-p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
        ("--min-p", min_p, min_p is None or 0 <= min_p <= 1, "between 0 and 1"),
        ("--repetition-penalty", repetition_penalty, 1 / limit <= repetition_penalty <= limit, repetition),
        ("--frequency-penalty", frequency_penalty, abs(frequency_penalty) <= limit, LOGIT_CHANGES),
        ("--presence-penalty", presence_penalty, abs(presence_penalty) <= limit, LOGIT_CHANGES),
        ("--logprobs", logprobs, logprobs is None or 0 <= logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
    )
    for option, value, valid, expected in ranges:
        if not valid:
            raise InputError(f"must be {expected}, not {value}", where=option)
