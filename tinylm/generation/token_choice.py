"""Record the log-probabilities of generated tokens and prompt tokens, and the most likely alternatives to them.

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

    Log-probabilities are in nats. They are computed from the model's logits before penalties, temperature and filters. `chance` is
    the probability of sampling the token after all of these have been applied, and `alternative_chances` contains the same for the
    alternatives. Prompt tokens were not sampled, so they have no chances.
    """

    id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]
    chance: float | None = None
    alternative_chances: tuple[float, ...] = ()

    def with_chances(self, chances: Sequence[float]) -> TokenChoice:
        """Return a copy with the chances of the token and of each alternative, in this order."""
        return replace(self, chance=chances[0], alternative_chances=tuple(chances[1:]))


def token_choices(logprobs: Tensor, chosen: Tensor, alternatives: int) -> tuple[list[TokenChoice], Tensor]:
    """Return the choices for log-probabilities `(B, V)` and chosen ids `(B,)`, and the ids of the alternatives `(B, K)`."""
    top = logprobs.topk(min(alternatives, logprobs.shape[-1]), dim=-1)
    chosen_logprobs = logprobs.gather(1, chosen[:, None]).squeeze(1)
    columns = (chosen.tolist(), chosen_logprobs.tolist(), top.indices.tolist(), top.values.tolist())
    choices = [
        TokenChoice(id, logprob, tuple(zip(ids, values, strict=True))) for id, logprob, ids, values in zip(*columns, strict=True)
    ]
    return choices, top.indices


@torch.inference_mode()
def prompt_choices(decoder: DecodingModel[Any], ids: Sequence[int], alternatives: int) -> list[TokenChoice]:
    """Return the choices for all ids except the first, each given the ids before it. Accepts up to `decoder.capacity` + 1 ids."""
    if len(ids) < 2:
        return []
    tokens = torch.tensor([list(ids)], device=decoder.device)
    logits = decoder(tokens[:, :-1])[0]
    return token_choices(all_logprobs(logits), tokens[0, 1:], alternatives)[0]
