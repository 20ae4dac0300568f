"""Mix a dataset with windows of plain text, which make up a fixed fraction of the examples, spread evenly over the data order."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from tinylm.data.batch import IGNORE_INDEX
from tinylm.data.datasets import Dataset, Examples, TokenStream
from tinylm.data.framing import PADDING


class Mixture:
    """The examples of `main`, interleaved with windows of `text`.

    In any range of consecutive examples, the fraction of text windows is `share`, up to rounding. Each dataset keeps its own order
    and starts its next epoch when all of its examples have been read. An epoch of the mixture is one epoch of `main`.
    """

    def __init__(self, main: Dataset, text: TokenStream, share: float) -> None:
        self._main, self._text = main, text
        self._share = Fraction(share).limit_denominator(10_000)
        self.examples_per_epoch = max(1, round(main.examples_per_epoch / (1 - float(self._share))))
        self.tokens_per_example = (1 - share) * main.tokens_per_example + share * text.tokens_per_example

    def text_before(self, position: int) -> int:
        """Return the number of text windows before a position."""
        return position * self._share.numerator // self._share.denominator

    def examples(self, start: int, count: int) -> Examples:
        """Return the examples at positions [start, start + count). Shorter examples are padded."""
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
