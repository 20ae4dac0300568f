"""A token with its log-probability and the most likely alternatives: what `logprobs` records, for generated and prompt tokens.

Legend: `B` tokens, `V` vocabulary, `K` alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tinylm.evaluation.scoring import all_logprobs
from tinylm.model.state import DecodingModel


@dataclass(frozen=True)
class TokenChoice:
    """A token with its log-probability and the most likely alternatives as pairs of (id, log-probability).

    Log-probabilities are in nats. They are computed from the model's logits, before penalties, temperature and filters. `chance` is
    the probability with which sampling selected the token, after all of these, and `alternative_chances` those of the alternatives.
    A token of the prompt was not sampled, so it has no chances.
    """

    id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]
    chance: float | None = None
    alternative_chances: tuple[float, ...] = ()

    def with_chances(self, chances: Sequence[float]) -> TokenChoice:
        """This choice with the chance of the token and of each alternative."""
        return replace(self, chance=chances[0], alternative_chances=tuple(chances[1:]))


def token_choices(logprobs: Tensor, chosen: Tensor, alternatives: int) -> tuple[list[TokenChoice], Tensor]:
    """The choices for log-probabilities `(B, V)` and the chosen ids `(B,)`, and the ids of the alternatives `(B, K)`."""
    top = logprobs.topk(min(alternatives, logprobs.shape[-1]), dim=-1)
    chosen_logprobs = logprobs.gather(1, chosen[:, None]).squeeze(1)
    columns = (chosen.tolist(), chosen_logprobs.tolist(), top.indices.tolist(), top.values.tolist())
    choices = [
        TokenChoice(id, logprob, tuple(zip(ids, values, strict=True))) for id, logprob, ids, values in zip(*columns, strict=True)
    ]
    return choices, top.indices


@torch.inference_mode()
def prompt_choices(decoder: DecodingModel[Any], ids: Sequence[int], alternatives: int) -> list[TokenChoice]:
    """The choices for all ids except the first, each given the ids before it. There may be at most `decoder.capacity` + 1 ids."""
    if len(ids) < 2:
        return []
    tokens = torch.tensor([list(ids)], device=decoder.device)
    logits = decoder(tokens[:, :-1])[0]
    return token_choices(all_logprobs(logits), tokens[0, 1:], alternatives)[0]
