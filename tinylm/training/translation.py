"""Translation: predict each token of the target sentence from the source sentence and the preceding target tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from tinylm.data.batch import Batch
from tinylm.data.datasets import Examples
from tinylm.data.pairs import PreparedPairs
from tinylm.evaluation.metrics import BLEU, LOSS, TRANSLATION, TRANSLATION_BY_BLEU, Metric, Metrics
from tinylm.model.base import Model
from tinylm.model.sequence_to_sequence import SequenceToSequence
from tinylm.recipe.pairs import TranslationObjective
from tinylm.training.objective import Heldout
from tinylm.translation import bleu
from tinylm.translation.loss import losses_of_pairs, pair_batch, pair_losses
from tinylm.translation.search import SearchOptions, translate_ids


class Translation:
    """Cross-entropy per target token with label smoothing and teacher forcing: the decoder's input is the reference translation."""

    name = "translation"

    def __init__(self, section: TranslationObjective) -> None:
        """Raise `InputError` if the best checkpoint is selected by BLEU and sacrebleu is not installed."""
        self._section = section
        if section.select == "bleu":
            bleu.require_sacrebleu()

    @property
    def metrics(self) -> Sequence[Metric]:
        return TRANSLATION_BY_BLEU if self._section.select == "bleu" else TRANSLATION

    def batch(self, examples: Examples, seed: int, start: int) -> Batch:
        """Convert framed pairs to a batch. The batch does not depend on `seed`."""
        return pair_batch(examples["source"], examples["tokens"])

    def loss_sum(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the sum of the losses with label smoothing, in nats."""
        total: Tensor = network(
            batch.inputs,
            targets=batch.targets,
            source=batch.source,
            source_segments=batch.source_segments,
            label_smoothing=self._section.label_smoothing,
        )
        return total

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the losses without label smoothing, in nats, (batch, time)."""
        return pair_losses(network, batch)

    def evaluate(self, network: Model, heldout: Heldout) -> Metrics:
        """Score all held-out pairs, or only the first ones up to `evaluation.max_tokens` target tokens.

        With several processes, each process scores the same pairs.
        """
        prepared = heldout.prepared
        assert isinstance(prepared, PreparedPairs)
        assert isinstance(network, SequenceToSequence)
        framing = prepared.framing(network.model.context_length)
        sources, targets = prepared.heldout.ids(framing)
        limit = network.model.context_length
        count = _pairs_within(targets, heldout.section.max_tokens)
        sources, targets = [ids[:limit] for ids in sources[:count]], [ids[:limit] for ids in targets[:count]]
        nats = losses_of_pairs(network, sources, targets, heldout.on_progress)
        tokens = sum(map(len, targets))
        values = {LOSS.name: float(nats.sum() / tokens)}
        if self._section.select == "bleu":
            options = SearchOptions(beams=1)
            found = translate_ids(network, sources, framing.target_end, options, on_batch=lambda done: heldout.on_progress(tokens))
            translations = [prepared.tokenizer.decode(best[0].ids) for best in found]
            values[BLEU.name] = bleu.corpus_bleu(translations, [pair.target for pair in prepared.heldout.pairs[:count]])
        return Metrics(self.metrics[0].name, values)


def _pairs_within(targets: Sequence[np.ndarray], max_tokens: int | None) -> int:
    """Return how many of the first pairs have at most `max_tokens` target tokens in total, but at least 1."""
    if max_tokens is None:
        return len(targets)
    total = 0
    for number, ids in enumerate(targets):
        total += len(ids)
        if total > max_tokens:
            return max(1, number)
    return len(targets)
