"""The neural probabilistic language model: a feed-forward network predicts each token from a fixed number of preceding tokens.

The concatenated representations x of the last n tokens are the input of a tanh hidden layer. The logits are
`b + W x + U tanh(d + H x)` (Bengio et al. 2003, equation 1), where W is present only with `direct: true`.

Legend: `B` batch, `T` time, `N` tokens in the window, `E` width of the embedding, `D` hidden units, `V` vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.cost.memory import loss_chunk_rows
from tinylm.model.functions import Dropout, Teacher, summed_cross_entropy
from tinylm.model.hooks import HookPoint
from tinylm.model.stateful import StatefulModel
from tinylm.recipe.fixed_context import FeedForwardSection


class WindowNetwork(StatefulModel):
    """The network of Bengio et al. Its state (B, N - 1) contains the last N - 1 ids. Id V marks positions without a token."""

    model: FeedForwardSection

    def __init__(self, model: FeedForwardSection, vocab_size: int, *, seed: int | None = 0) -> None:
        super().__init__(model, vocab_size)
        self.embedding = nn.Embedding(vocab_size + 1, model.n_embd) if model.input == "embedding" else None
        widths = {"embedding": model.n_embd, "one_hot": vocab_size + 1, "number": 1}
        inputs = model.window * widths[model.input]
        self.input = nn.Linear(inputs, model.n_hidden)
        self.head = nn.Linear(model.n_hidden + (inputs if model.direct else 0), vocab_size)
        self.dropout = Dropout(model.dropout)
        self.hook_hidden = HookPoint()
        if seed is not None:
            self._initialize(torch.Generator().manual_seed(seed))

    def _initialize(self, generator: torch.Generator) -> None:
        """Initialize the weights. The head starts near zero, which makes the initial loss approximately log V."""
        fan_in = self.model.window if self.model.input == "one_hot" else self.input.in_features
        stds = {"input.weight": 1 / math.sqrt(fan_in), "head.weight": 0.001, "embedding.weight": 1.0}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * stds.get(name, 0.0))

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        segments: Tensor | None = None,
        teacher: Teacher | None = None,
    ) -> Tensor:
        hidden = self.hidden(tokens, segments=segments)
        if targets is None:
            return self.logits(hidden)
        # A constant input of 1 turns the head's bias into an additional column of its weight.
        inputs = F.pad(hidden.flatten(0, 1), (0, 1), value=1.0)
        weight = torch.cat((self.head.weight, self.head.bias[:, None]), dim=1)
        chunk = loss_chunk_rows(self.vocab_size, on_gpu=hidden.device.type != "cpu")
        return summed_cross_entropy(inputs, weight, targets.flatten(), None, chunk, compiled=self.compile_loss, teacher=teacher)

    def hidden(self, tokens: Tensor, *, n_last: int | None = None, segments: Tensor | None = None) -> Tensor:
        """Ids (B, T) -> inputs of the head (B, T, D), or (B, T, D + inputs) with direct connections.

        With `segments` (B, T), tokens from other segments are treated as missing.
        """
        windows = self._windows(tokens, self.empty_state(len(tokens)))
        if segments is not None:
            numbers = F.pad(segments, (self.model.window - 1, 0), value=-1).unfold(1, self.model.window, 1)
            windows = windows.masked_fill(numbers != segments[..., None], self.vocab_size)
        return self._hidden(windows if n_last is None else windows[:, -n_last:])

    def continue_from(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.cat((state, tokens), dim=1)
        return self._hidden(self._windows(tokens, state)), ids[:, ids.shape[1] - self.model.window + 1 :]

    def empty_state(self, rows: int) -> Tensor:
        return torch.full((rows, self.model.window - 1), self.vocab_size, device=self.device)

    def _windows(self, tokens: Tensor, state: Tensor) -> Tensor:
        """Ids (B, T) -> ids in the window that ends at each position, (B, T, N)."""
        return torch.cat((state, tokens), dim=1).unfold(1, self.model.window, 1)

    def _hidden(self, windows: Tensor) -> Tensor:
        """Ids (B, T, N) -> inputs of the head."""
        if self.model.input == "one_hot":  # select columns of the weight instead of multiplying by zeros
            columns = windows + torch.arange(self.model.window, device=windows.device) * (self.vocab_size + 1)
            summed = F.embedding(columns, self.input.weight.t()).sum(dim=-2) + self.input.bias
            return self.hook_hidden(self.dropout(summed.tanh()))
        if self.embedding is not None:
            x = self.embedding(windows).flatten(-2)
        else:  # ids scaled to [-1, 1]; 0 where there is no token
            numbers = windows.to(self.input.weight.dtype) * (2 / max(self.vocab_size - 1, 1)) - 1
            x = numbers.masked_fill(windows == self.vocab_size, 0.0)
        units = self.hook_hidden(self.dropout(self.input(x).tanh()))
        return torch.cat((units, x.to(units.dtype)), dim=-1) if self.model.direct else units

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        return logits

    def vocabulary_weights(self) -> frozenset[str]:
        names = {"embedding.weight", "head.weight", "head.bias"}
        return frozenset(names | ({"input.weight"} if self.model.input == "one_hot" else set()))

    def head_weights(self) -> frozenset[str]:
        return frozenset({"head.weight", "head.bias"})
