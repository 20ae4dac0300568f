"""Direct preference optimization: learn from pairs of a chosen and a rejected answer.

Legend: `B` pairs, `T` tokens in the longest conversation, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.cost.memory import EVALUATION_BATCH_TOKENS
from tinylm.data.batch import IGNORE_INDEX, Batch
from tinylm.data.chat import PreparedChat
from tinylm.data.datasets import Examples
from tinylm.data.framing import batches_by_length
from tinylm.data.preferences import ANSWER, PreferencePairs, rows
from tinylm.evaluation.metrics import ACCURACY, PREFERENCE, PREFERENCE_LOSS, REWARD_MARGIN, Metric, Metrics
from tinylm.evaluation.scoring import token_logprobs
from tinylm.model.base import Model, evaluation_mode
from tinylm.training.objective import Heldout


class DPO:
    """Direct preference optimization (Rafailov et al. 2023, equation 7).

    The reward of an answer is beta times the log-ratio of its probabilities under the network and the reference model. The loss of
    a pair is -log sigmoid(reward of the chosen answer - reward of the rejected answer).
    """

    name = "dpo"
    metrics: Sequence[Metric] = PREFERENCE

    def __init__(self, beta: float, reference: Model | None = None) -> None:
        """`reference` must be in evaluation mode, and on the device of the network. It is only needed to compute losses."""
        self._beta = beta
        self._reference = reference

    def batch(self, examples: Examples, seed: int, start: int) -> Batch:
        """A row contains both conversations of a pair (see `data.preferences.rows`), and its only target is the pair itself."""
        tokens, segments = torch.from_numpy(examples["tokens"]), torch.from_numpy(examples["segments"])
        return Batch(tokens.clamp_min(0), torch.zeros((len(tokens), 1), dtype=torch.int64), segments)

    def loss_sum(self, network: nn.Module, batch: Batch) -> Tensor:
        return self.losses(network, batch).sum()

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        return -F.logsigmoid(self.margins(network, batch))[:, None]

    def margins(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the reward of each chosen answer minus the reward of the rejected answer, (B,)."""
        assert self._reference is not None
        assert batch.segments is not None
        tokens, segments = (tensor.reshape(2 * len(batch), -1) for tensor in (batch.inputs, batch.segments))  # (2 B, T)
        if tokens.device.type == "cpu":  # elsewhere, reading the length would require a synchronization
            width = int((segments >= 0).sum(dim=1).max())
            tokens, segments = tokens[:, :width], segments[:, :width]
        targets = tokens[:, 1:].masked_fill(segments[:, 1:] != ANSWER, IGNORE_INDEX)
        with torch.no_grad():
            reference = token_logprobs(self._reference(tokens[:, :-1]), targets).sum(dim=1)
        # Padding comes after each conversation, so causal attention keeps it from affecting the answer.
        logprobs = token_logprobs(network(tokens[:, :-1]), targets).sum(dim=1)
        rewards = self._beta * (logprobs - reference).view(-1, 2)
        return rewards[:, 0] - rewards[:, 1]

    @torch.no_grad()
    def evaluate(self, network: Model, heldout: Heldout) -> Metrics:
        """Compare the rewards of all held-out pairs, or of the first ones that contain `max_tokens` tokens."""
        prepared, processes = heldout.prepared, heldout.processes
        assert isinstance(prepared, PreparedChat)
        dataset = PreferencePairs(prepared.heldout, network.model.context_length)
        sizes = 2 * np.array(dataset.lengths)
        if heldout.section.max_tokens is not None:
            sizes = sizes[: 1 + int(np.searchsorted(np.cumsum(sizes), heldout.section.max_tokens))]
        batches = batches_by_length(sizes.tolist(), max(EVALUATION_BATCH_TOKENS, 2 * network.model.context_length))
        margins, done = np.zeros(len(sizes)), 0
        with evaluation_mode(network):
            for first in range(0, len(batches), processes.world_size):
                # A sharded model needs all ranks in every forward pass, so ranks without their own batch repeat the last one.
                own = min(first + processes.rank, len(batches) - 1)
                examples = rows(
                    [dataset.pairs[index] for index in batches[own]], max(dataset.lengths[index] for index in batches[own])
                )
                values = self.margins(network, self.batch(examples, 0, 0).to(network.device))
                if own == first + processes.rank:
                    margins[batches[own]] = values.double().cpu().numpy()
                done += sum(int(sizes[peer].sum()) for peer in batches[first : first + processes.world_size])
                heldout.on_progress(done)
        margins = processes.sum(margins)
        values_by_name = {
            PREFERENCE_LOSS.name: float(np.logaddexp(0, -margins).mean()),
            ACCURACY.name: float((margins > 0).mean()),
            REWARD_MARGIN.name: float(margins.mean()),
        }
        return Metrics(PREFERENCE_LOSS.name, values_by_name)
