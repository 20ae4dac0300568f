"""Choose the next token for every row in a batch. Rows can have different sampling options, biases and constraints.

An error in one row, such as a ban on all of its tokens, fails only that row's sample.

Legend: `B` rows in use, `V` vocabulary, `K` alternatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tinylm.errors import InputError, TinylmError, WorkError
from tinylm.evaluation.scoring import all_logprobs
from tinylm.generation import fast_sampling
from tinylm.generation.sampling import SamplingOptions, apply_penalties, chances, choose
from tinylm.generation.token_choice import TokenChoice, token_choices

if TYPE_CHECKING:
    from tinylm.generation.engine import SequenceState

_Choose = Callable[[Tensor, SamplingOptions, Tensor | None], Tensor]


class RowSampler:
    """Chooses the next token for every sequence. The penalty and bias tables have one row per sequence and are allocated on demand.

    With `uses_numba`, sampling runs in compiled code if that code supports the options.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device, *, uses_numba: bool) -> None:
        self._shape, self._device = (rows, vocab_size), device
        self._seen: Tensor | None = None  # (rows, V), bool: the token occurs in the prompt or the generated text
        self._counts: Tensor | None = None  # (rows, V): occurrences in the generated text
        self._biases: Tensor | None = None  # (rows, V): added to the logits
        self._choose: _Choose = choose
        if uses_numba:
            self._choose = fast_sampling.choose

    def reset(self, row: int, options: SamplingOptions, prompt: Sequence[int]) -> None:
        """Prepare a row for a new sequence."""
        if options.has_penalties:
            if self._seen is None or self._counts is None:
                self._seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
                self._counts = torch.zeros(self._shape, device=self._device)
            self._seen[row] = False
            self._seen[row, torch.tensor(prompt, device=self._device)] = True
            self._counts[row] = 0
        if options.logit_bias and self._biases is None:
            self._biases = torch.zeros(self._shape, device=self._device)
        if self._biases is not None:
            self._biases[row] = 0
        if options.logit_bias and self._biases is not None:
            ids, values = zip(*options.logit_bias, strict=True)
            self._biases[row].index_add_(
                0, torch.tensor(ids, device=self._device), torch.tensor(values, dtype=torch.float32, device=self._device)
            )

    def move(self, source: int, row: int) -> None:
        """Copy the tables of one row to another."""
        for table in (self._seen, self._counts, self._biases):
            if table is not None:
                table[row] = table[source]

    def next_tokens(self, logits: Tensor, sequences: Sequence[SequenceState]) -> Tensor:
        """Choose the next ids `(B,)` from logits `(B, V)`. A sequence with unusable logits fails, and its id is arbitrary."""
        groups: dict[object, list[int]] = {}
        for row, sequence in enumerate(sequences):
            groups.setdefault(sequence.options.sampling_key, []).append(row)
        final = self._final_logits(logits, sequences, list(groups.values()))
        if len(groups) == 1:
            return self._sample(logits, final, sequences, list(range(len(sequences))))
        chosen = torch.empty(len(sequences), dtype=torch.long, device=logits.device)
        for rows in groups.values():
            chosen[rows] = self._sample(logits, final, [sequences[row] for row in rows], rows)
        return chosen

    def _final_logits(self, logits: Tensor, sequences: Sequence[SequenceState], groups: list[list[int]]) -> Tensor:
        """Apply biases, penalties and constraints to logits `(B, V)`."""
        final = logits
        if self._biases is not None and any(sequence.options.logit_bias for sequence in sequences):
            final = final + self._biases[: len(sequences)]
        for rows in groups:
            options = sequences[rows[0]].options
            if options.has_penalties and self._seen is not None and self._counts is not None:
                penalized = apply_penalties(final[rows], self._seen[rows], self._counts[rows], options)
                final = final.index_copy(0, torch.tensor(rows, device=final.device), penalized)
        if any(sequence.is_restricted for sequence in sequences):
            final = final.clone()
            for row, sequence in enumerate(sequences):
                sequence.attempt(partial(sequence.mask_logits, final[row]))
        return _fail_unusable_rows(final, sequences)

    def _sample(self, logits: Tensor, final: Tensor, sequences: Sequence[SequenceState], rows: list[int]) -> Tensor:
        """Choose the next ids for `rows`, which have equal sampling keys. `logits` and `final` contain all rows of the batch."""
        options, uniforms = sequences[0].options, None
        if len(rows) < len(final):
            logits, final = logits[rows], final[rows]
        if options.temperature != 0:
            uniforms = torch.from_numpy(np.array([sequence.next_uniform() for sequence in sequences]))  # torch.tensor(list) is slow
        chosen = self._choose(final, options, uniforms)
        if options.has_penalties and self._seen is not None and self._counts is not None:
            index = torch.tensor(rows, device=final.device)
            self._seen[index, chosen] = True
            self._counts[index, chosen] += 1
        if options.logprobs is not None:
            for sequence, choice in zip(sequences, _choices(logits, final, chosen, options), strict=True):
                sequence.attempt(partial(sequence.record_choice, choice))
        return chosen


def _fail_unusable_rows(logits: Tensor, sequences: Sequence[SequenceState]) -> Tensor:
    """Fail sequences whose logits contain NaN or infinity or are all minus infinity. Returns logits that are usable in every
    row."""
    if math.isfinite(logits.sum().item()):  # the usual case
        return logits
    maxima = logits.amax(dim=-1).tolist()  # NaN if any logit is NaN
    unusable = [row for row, maximum in enumerate(maxima) if not math.isfinite(maximum)]
    if not unusable:
        return logits
    for row in unusable:
        sequences[row].fail(unusable_error(maxima[row], sequences[row].is_restricted))
    logits = logits.clone()
    logits[unusable] = 0.0
    return logits


def unusable_error(maximum: float, restricted: bool) -> TinylmError:
    """Return the error for a row whose largest logit is not finite. `restricted`: a constraint or bans changed the logits."""
    if maximum != float("-inf"):
        return WorkError("the model's logits are not finite", hint="the weights are damaged, or the precision is too low")
    banned = "every token that the constraint allows next" if restricted else "every token"
    return InputError(f"{banned} is banned", where="--ban")


def _choices(logits: Tensor, final: Tensor, chosen: Tensor, options: SamplingOptions) -> list[TokenChoice]:
    """Return the chosen ids `(B,)` with their log-probabilities, sampling probabilities and most likely alternatives."""
    choices, ids = token_choices(all_logprobs(logits), chosen, options.logprobs or 0)
    probabilities = chances(final, options, torch.cat((chosen[:, None], ids), dim=1)).tolist()  # (B, 1 + K)
    return [choice.with_chances(row) for choice, row in zip(choices, probabilities, strict=True)]
