"""Combine the losses of several models into those of their ensemble, and compare the ensemble with its best member.

The probability that an ensemble assigns to a token is the mean of its members' probabilities, so its loss depends only on theirs.
Each member is therefore evaluated on its own, with one network in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tinylm.ensemble import Ensemble, Member
from tinylm.errors import InputError
from tinylm.evaluation import significance
from tinylm.evaluation.breakdown import TokenLosses
from tinylm.evaluation.perplexity import EvaluationOptions, Perplexity
from tinylm.evaluation.scoring import ensemble_losses
from tinylm.evaluation.significance import PairedComparison
from tinylm.model import registry
from tinylm.model.stateful import StatefulModel


@dataclass(frozen=True)
class MemberScore:
    """The result of one member of an ensemble on the ensemble's text, with the ensemble's context and stride."""

    member: Member
    perplexity: Perplexity

    def as_dict(self) -> dict[str, object]:
        scores = self.perplexity
        return {
            **self.member.as_dict(),
            "loss": scores.loss,
            "perplexity": scores.perplexity,
            "bits_per_byte": scores.bits_per_byte,
            "bits_per_byte_ci95": list(scores.bits_per_byte_ci95),
        }


@dataclass(frozen=True)
class BestMember:
    """The member with the lowest loss, and a paired comparison of the ensemble with it.

    The comparison is None if the text is too short. Its difference is negative if the ensemble is better.
    """

    score: MemberScore
    comparison: PairedComparison | None

    def as_dict(self) -> dict[str, Any]:
        identity = {"run": self.score.member.path, "checkpoint": self.score.member.checkpoint.name}
        if self.comparison is None:
            return {**identity, "difference": None}
        result = asdict(self.comparison)
        return identity | {key: result[key] for key in ("difference", "ci95", "p_value", "pieces", "kind")}


def common_options(ensemble: Ensemble, options: EvaluationOptions) -> EvaluationOptions:
    """Return options that give every member the same context: by default, the smallest context length of all members.

    If all members carry their state through each document, they keep doing so.
    """
    networks = [registry.network_class(run.recipe.model) for run in ensemble.runs]
    if ensemble.is_single or options.context is not None or all(issubclass(network, StatefulModel) for network in networks):
        return options
    return replace(options, context=ensemble.context_length)


def average(losses: Sequence[TokenLosses]) -> TokenLosses:
    """Return the losses of the ensemble of several models that scored the same tokens."""
    if len(losses) == 1:
        return losses[0]
    combined = TokenLosses(losses[0].shard)
    combined.nats = ensemble_losses([member.nats for member in losses])
    combined.context_lengths = np.minimum.reduce([member.context_lengths for member in losses])
    return combined


def best_member(
    scores: Sequence[MemberScore], losses: Sequence[TokenLosses], combined: TokenLosses, token_byte_lengths: np.ndarray
) -> BestMember:
    """Compare the losses of an ensemble with those of its best member on the same text."""
    best = min(range(len(scores)), key=lambda index: scores[index].perplexity.nats)
    try:
        result = significance.compare_losses(combined, token_byte_lengths, losses[best], token_byte_lengths)
    except InputError:  # the text is too short
        return BestMember(scores[best], None)
    return BestMember(scores[best], result)
