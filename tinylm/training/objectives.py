"""Next-token prediction, and the registry that maps the types of recipe sections to training objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tinylm.data.batch import Batch
from tinylm.data.chat import PreparedChat
from tinylm.data.datasets import Examples
from tinylm.data.prepare import PreparedText
from tinylm.data.shards import Shard
from tinylm.evaluation import answers, perplexity
from tinylm.evaluation.metrics import LANGUAGE_MODEL, Metric, Metrics
from tinylm.evaluation.mixture import evaluate_sources
from tinylm.evaluation.perplexity import EvaluationOptions, Perplexity
from tinylm.evaluation.scoring import token_losses
from tinylm.model.base import Model
from tinylm.recipe.chat import DPOObjective
from tinylm.recipe.encoder import MaskedLMObjective
from tinylm.recipe.labels import ClassificationObjective
from tinylm.recipe.pairs import TranslationObjective
from tinylm.recipe.schema import CausalLMObjective, ObjectiveVariant, register_objective_section, unregister_section
from tinylm.training.classification import Classification
from tinylm.training.dpo import DPO
from tinylm.training.masked_lm import MaskedLM
from tinylm.training.objective import Heldout as Heldout
from tinylm.training.objective import Objective as Objective
from tinylm.training.translation import Translation


class CausalLM:
    """Next-token prediction."""

    name = "causal_lm"
    metrics: Sequence[Metric] = LANGUAGE_MODEL

    def batch(self, examples: Examples, seed: int, start: int) -> Batch:
        """The inputs are all tokens except the last. The targets are all tokens except the first, or those in the examples."""
        tokens = torch.from_numpy(examples["tokens"])
        targets = torch.from_numpy(examples["targets"]) if "targets" in examples else tokens[:, 1:].contiguous()
        segments = torch.from_numpy(examples["segments"])[:, :-1].contiguous() if "segments" in examples else None
        # Copying a pinned tensor to a GPU is fast only if the tensor is contiguous.
        return Batch(tokens[:, :-1].clamp_min(0), targets, segments)

    def loss_sum(self, network: nn.Module, batch: Batch) -> Tensor:
        total: Tensor = network(batch.inputs, targets=batch.targets, segments=batch.segments)
        return total

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """The losses are computed in float32, or in the dtype of the logits if that is wider."""
        return token_losses(network(batch.inputs, segments=batch.segments), batch.targets)

    def evaluate(self, network: Model, heldout: Heldout) -> Metrics:
        """Score every held-out token once (see `evaluation.perplexity`). In conversations, score only the answers."""
        section, prepared = heldout.section, heldout.prepared
        if isinstance(prepared, PreparedChat):
            return answers.evaluate(
                network,
                prepared.heldout,
                prepared.tokenizer.token_byte_lengths,
                max_tokens=section.max_tokens,
                processes=heldout.processes,
                on_progress=heldout.on_progress,
            ).metrics
        assert isinstance(prepared, PreparedText)

        def evaluate(shard: Shard, max_tokens: int | None, on_progress: Callable[[int], None]) -> Perplexity:
            return perplexity.evaluate(
                network,
                shard,
                prepared.tokenizer.token_byte_lengths,
                EvaluationOptions(stride=section.stride, max_tokens=max_tokens, confidence_interval=False),
                processes=heldout.processes,
                on_progress=on_progress,
            )

        spans = prepared.spans.get("heldout", ())
        if not spans:
            return evaluate(prepared.heldout, section.max_tokens, heldout.on_progress).metrics
        by_source = evaluate_sources(evaluate, prepared.heldout, spans, section.max_tokens, heldout.on_progress)
        parts, counts = by_source.values(), prepared.heldout.counts
        complete = section.max_tokens is None or section.max_tokens >= counts.tokens
        total = replace(
            next(iter(parts)),
            tokens=sum(part.tokens for part in parts),
            bytes=counts.bytes if complete else sum(part.bytes for part in parts),
            nats=sum(part.nats for part in parts),
        )
        return replace(total.metrics, by_source={name: part.metrics for name, part in by_source.items()})


_OBJECTIVES: dict[type[ObjectiveVariant], Callable[[Any], Objective]] = {
    CausalLMObjective: lambda section: CausalLM(),
    DPOObjective: lambda section: DPO(section.beta),
    MaskedLMObjective: lambda section: MaskedLM(),
    ClassificationObjective: Classification,
    TranslationObjective: Translation,
}


def register(section: type[ObjectiveVariant], objective: Callable[[Any], Objective]) -> None:
    """Add an objective. `section` becomes a variant of `objective:` in recipes, and `build` returns `objective(section)`.

    Raises `ValueError` if an objective with this name already exists.
    """
    register_objective_section(section)
    _OBJECTIVES[section] = objective


def unregister(section: type[ObjectiveVariant]) -> None:
    """Remove an objective that `register` added."""
    unregister_section(section)
    del _OBJECTIVES[section]


def build(section: ObjectiveVariant) -> Objective:
    """Build the objective that a recipe section configures."""
    return _OBJECTIVES[type(section)](section)
