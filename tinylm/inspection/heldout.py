"""Select evenly spaced windows of held-out text for measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinylm.evaluation.evaluate_run import TextFormat, open_shard
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Run
from tinylm.tokenizer.control_tokens import ControlTokens

WINDOW = 128
"""Tokens per window, if the context is long enough."""
_MASKED = 0.15
"""Fraction of the tokens that an encoder has to predict, as in `tinylm eval`."""


@dataclass(frozen=True)
class HeldoutWindows:
    """Input ids and target ids of windows, both (window, position). Negative targets are not scored.

    The target is the next token or, for an encoder, the masked token.
    """

    inputs: Tensor
    targets: Tensor
    scored: int
    """Number of scored tokens."""
    bytes: int
    """Number of bytes in the scored tokens."""

    def subset(self, tokens: int, token_byte_lengths: np.ndarray) -> HeldoutWindows:
        """Return evenly spaced windows with about `tokens` tokens in total, but always at least one window."""
        count = max(1, min(len(self.inputs), tokens // self.inputs.shape[1]))
        chosen = np.linspace(0, len(self.inputs) - 1, count).round().astype(int)
        return _windows(self.inputs[chosen], self.targets[chosen], token_byte_lengths)


def heldout_windows(run: Run, tokens: int, sources: Sequence[str] = (), reporter: Reporter = SILENT) -> HeldoutWindows:
    """Select windows with about `tokens` tokens in total from `sources`, or from the run's held-out text if there are no sources.

    Raises `InputError` if there is no text.
    """
    with open_shard(run, sources, "heldout", TextFormat(), reporter) as shard:
        ids = np.asarray(shard.tokens).astype(np.int64)
        end_of_text = shard.end_of_text
        del shard  # Windows cannot remove a file while it is mapped
    length = min(WINDOW, run.recipe.model.context_length, len(ids) - 1)
    count = max(1, min(tokens // length, (len(ids) - 1) // length))
    starts = np.linspace(0, len(ids) - 1 - length, count).astype(np.int64)
    places = starts[:, None] + np.arange(length + 1)
    chosen = torch.from_numpy(ids[places])
    if run.recipe.model.bidirectional:
        inputs, targets = _masked(chosen[:, :-1], ControlTokens.of(run.tokenizer), end_of_text)
    else:
        inputs, targets = chosen[:, :-1], chosen[:, 1:].masked_fill(chosen[:, 1:] == end_of_text, -1)
    return _windows(inputs, targets, run.tokenizer.token_byte_lengths)


def _masked(windows: Tensor, control: ControlTokens, end_of_text: int) -> tuple[Tensor, Tensor]:
    """Mask about 15% of the tokens in each window, and replace the first and last tokens with [CLS] and [SEP]."""
    inputs = windows.clone()
    masked = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(0)) < _MASKED
    masked[:, [0, -1]] = False
    masked &= inputs != end_of_text
    masked[:, inputs.shape[1] // 2] |= ~masked.any(1)
    targets = inputs.masked_fill(~masked, -1)
    inputs[masked] = control.mask
    inputs[:, 0], inputs[:, -1] = control.cls, control.sep
    return inputs, targets


def _windows(inputs: Tensor, targets: Tensor, token_byte_lengths: np.ndarray) -> HeldoutWindows:
    scored = targets[targets >= 0]
    return HeldoutWindows(inputs, targets, len(scored), int(token_byte_lengths[scored.cpu().numpy()].sum()))
