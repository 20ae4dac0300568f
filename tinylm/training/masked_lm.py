"""Masked language modeling: predict masked tokens from the tokens on both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tinylm.data.batch import Batch
from tinylm.data.datasets import Examples
from tinylm.data.prepare import PreparedText
from tinylm.data.shards import Shard
from tinylm.evaluation import masked
from tinylm.evaluation.masked import MaskedScores
from tinylm.evaluation.metrics import MASKED_LM, Metric, Metrics
from tinylm.evaluation.mixture import evaluate_sources
from tinylm.evaluation.scoring import token_losses
from tinylm.model.base import Model
from tinylm.training.objective import Heldout


class MaskedLM:
    """Cross-entropy at the masked positions, which `data.masking` chooses."""

    name = "masked_lm"
    metrics: Sequence[Metric] = MASKED_LM

    def batch(self, examples: Examples, seed: int, start: int) -> Batch:
        """Convert the examples to tensors. The batch does not depend on `seed`, because the examples are already masked."""
        segments = torch.from_numpy(examples["segments"]) if "segments" in examples else None
        return Batch(torch.from_numpy(examples["tokens"]), torch.from_numpy(examples["targets"]), segments)

    def loss_sum(self, network: nn.Module, batch: Batch) -> Tensor:
        total: Tensor = network(batch.inputs, targets=batch.targets, segments=batch.segments)
        return total

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        return token_losses(network(batch.inputs, segments=batch.segments), batch.targets)

    def evaluate(self, network: Model, heldout: Heldout) -> Metrics:
        """Predict 15% of the held-out tokens (see `evaluation.masked`)."""
        prepared = heldout.prepared
        assert isinstance(prepared, PreparedText)

        def evaluate(shard: Shard, max_tokens: int | None, on_progress: Callable[[int], None]) -> MaskedScores:
            return masked.evaluate(
                network,
                shard,
                prepared.tokenizer,
                max_tokens=max_tokens,
                processes=heldout.processes,
                on_progress=on_progress,
            )

        max_tokens, spans = heldout.section.max_tokens, prepared.spans.get("heldout", ())
        if not spans:
            return evaluate(prepared.heldout, max_tokens, heldout.on_progress).metrics
        by_source = evaluate_sources(evaluate, prepared.heldout, spans, max_tokens, heldout.on_progress)
        parts = by_source.values()
        total = replace(
            next(iter(parts)),
            masked=sum(part.masked for part in parts),
            nats=sum(part.nats for part in parts),
            correct=sum(part.correct for part in parts),
        )
        return replace(total.metrics, by_source={name: part.metrics for name, part in by_source.items()})
