"""Mix two datasets: a share of the examples comes from plain text, evenly spread over the data order."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from tinylm.data.batch import IGNORE_INDEX
from tinylm.data.datasets import Dataset, Examples, TokenStream
from tinylm.data.framing import PADDING


class Mixture:
    """The examples of `main`, and windows of `text` in between. Up to rounding, `share` of any consecutive examples are text.

    Each dataset keeps its own order and starts its next epoch when it is read once. An epoch of the mixture is one of `main`.
    """

    def __init__(self, main: Dataset, text: TokenStream, share: float) -> None:
        self._main, self._text = main, text
        self._share = Fraction(share).limit_denominator(10_000)
        self.examples_per_epoch = max(1, round(main.examples_per_epoch / (1 - float(self._share))))
        self.tokens_per_example = (1 - share) * main.tokens_per_example + share * text.tokens_per_example

    def text_before(self, position: int) -> int:
        """The number of examples before a position that are text."""
        return position * self._share.numerator // self._share.denominator

    def examples(self, start: int, count: int) -> Examples:
        """The examples at positions [start, start + count). Rows of the shorter dataset are padded."""
        first, last = self.text_before(start), self.text_before(start + count)
        bounds = np.array([self.text_before(position) for position in range(start, start + count + 1)])
        is_text = np.diff(bounds) > 0
        parts = []
        if not is_text.all():
            parts.append((~is_text, self._main.examples(start - first, count - (last - first))))
        if is_text.any():
            windows = self._text.examples(first, last - first)["tokens"]
            text = {"tokens": windows, "targets": windows[:, 1:], "segments": np.zeros_like(windows)}
            parts.append((is_text, text))
        length = max(examples["tokens"].shape[1] for _, examples in parts)
        mixed = {
            "tokens": np.full((count, length), PADDING, dtype=np.int64),
            "targets": np.full((count, length - 1), IGNORE_INDEX, dtype=np.int64),
            "segments": np.full((count, length), PADDING, dtype=np.int64),
        }
        for rows, examples in parts:
            for name, values in examples.items():
                mixed[name][rows, : values.shape[1]] = values
        return mixed
