"""A table of vectors with names, and the questions one asks of it: nearest, analogy, similarity, odd one out.

Names are words, or the tokens of a tokenizer in their byte-mapped form (` the` is `Ġthe`); people may write either. All
similarities are cosines. numpy alone: asking never loads torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tinylm.embedding.spelling import byte_mapped, from_byte_mapped
from tinylm.errors import InputError, did_you_mean
from tinylm.paths import whole_file

FORMAT = "tinylm-embeddings-1"
_EPSILON = 1e-3
"""Keeps 3CosMul's division finite, as in the paper."""


@dataclass(frozen=True)
class Neighbour:
    token: str
    similarity: float


@dataclass(frozen=True)
class Vectors:
    """`matrix` is (names, dimensions) float32. Raises `InputError` when it is made of parts that do not fit."""

    names: Sequence[str]
    matrix: np.ndarray
    counts: np.ndarray | None = None
    """How often each occurred in the text, where that is known."""
    byte_mapped: bool = False
    """Names are bytes written as printable characters."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Where they come from."""

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or len(self.matrix) != len(self.names):
            raise InputError(f"{len(self.names):,} names do not fit a table of shape {self.matrix.shape}")
        if not len(self.names):
            raise InputError("no vectors")
        if not np.isfinite(self.matrix).all():
            raise InputError("some numbers are not finite")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def dimensions(self) -> int:
        return int(self.matrix.shape[1])

    @cached_property
    def index(self) -> dict[str, int]:
        """Name -> row; a name given twice means its first row."""
        return {name: row for row, name in reversed(list(enumerate(self.names)))}

    @cached_property
    def units(self) -> np.ndarray:
        """The vectors at length 1; a vector of zeros stays one."""
        lengths = np.linalg.norm(self.matrix, axis=1, keepdims=True)
        units: np.ndarray = self.matrix / np.maximum(lengths, np.finfo(np.float32).tiny)
        return units

    def shown(self, row: int) -> str:
        """The name as people read it."""
        name = self.names[row]
        raw = from_byte_mapped(name) if self.byte_mapped else None
        return name if raw is None else raw.decode("utf-8", "replace")

    def find(self, word: str) -> int | None:
        """The row of a word as people write it, or None: as it stands, lower-cased, and among tokens also after a space."""
        forms = [word, word.lower()]
        if self.byte_mapped:
            forms = [byte_mapped(form.encode("utf-8", "surrogateescape")) for text in forms for form in (text, f" {text}")] + forms
        return next((self.index[form] for form in forms if form in self.index), None)

    def row(self, word: str) -> int:
        """Like `find`. Raises `InputError` for a word without a vector, naming the nearest."""
        row = self.find(word)
        if row is None:
            known = [self.shown(one) for one in range(min(len(self), 50_000))]
            raise InputError(f"no vector for {word!r} among {len(self):,}", hint=did_you_mean(word, known))
        return row

    def nearest(self, word: str, count: int = 10) -> list[Neighbour]:
        """The `count` names most similar to `word`, itself left out. Raises `InputError` for an unknown word."""
        row = self.row(word)
        return self._best(self.units @ self.units[row], [row], count)

    def nearest_to(self, vector: np.ndarray, count: int = 10) -> list[Neighbour]:
        """The names most similar to any vector of the same width."""
        return self._best(self.units @ (vector / max(float(np.linalg.norm(vector)), 1e-30)), [], count)

    def analogy(self, a: str, b: str, c: str, count: int = 10, method: str = "3cosadd") -> list[Neighbour]:
        """What is to `c` as `b` is to `a`, the three left out. Raises `InputError` for an unknown word or method.

        3cosadd: cos(d, b - a + c) with unit vectors (Mikolov et al. 2013c). 3cosmul: the product of similarities, each moved
        to [0, 1] (Levy & Goldberg 2014, equation 4); `similarity` is then that score.
        """
        rows = [self.row(word) for word in (a, b, c)]
        return self._best(self.analogy_scores(np.array([rows]), method)[0], rows, count)

    def analogy_scores(self, rows: np.ndarray, method: str = "3cosadd", most: int | None = None) -> np.ndarray:
        """(questions, names): how well each of the first `most` names answers questions given as rows (a, b, c)."""
        a, b, c = (self.units[rows[:, column]] for column in range(3))
        names = self.units[:most]
        if method == "3cosadd":
            wanted = b - a + c
            scores: np.ndarray = (wanted / np.maximum(np.linalg.norm(wanted, axis=1, keepdims=True), 1e-30)) @ names.T
            return scores
        if method == "3cosmul":
            near = [(1 + one @ names.T) / 2 for one in (a, b, c)]
            scores = near[1] * near[2] / (near[0] + _EPSILON)
            return scores
        raise InputError(f"must be 3cosadd or 3cosmul, not {method!r}", where="--method", hint=did_you_mean(method, METHODS))

    def similarity(self, first: str, second: str) -> float:
        """The cosine between two words, in [-1, 1]."""
        return float(self.units[self.row(first)] @ self.units[self.row(second)])

    def odd_one_out(self, words: Sequence[str]) -> list[Neighbour]:
        """The words with their similarity to the mean of all, the odd one first. Raises `InputError` for fewer than three."""
        if len(words) < 3:
            raise InputError("needs at least three words, or none is odd")
        chosen = self.units[[self.row(word) for word in words]]
        center = chosen.mean(axis=0)
        similarities = chosen @ (center / max(float(np.linalg.norm(center)), 1e-30))
        order = np.argsort(similarities, kind="stable")
        return [Neighbour(words[place], float(similarities[place])) for place in order]

    def _best(self, scores: np.ndarray, left_out: Sequence[int], count: int) -> list[Neighbour]:
        scores = scores.copy()
        scores[list(left_out)] = -np.inf
        count = min(count, len(scores) - len(set(left_out)))
        best = np.argpartition(-scores, max(count - 1, 0))[:count]
        best = best[np.lexsort((best, -scores[best]))]
        return [Neighbour(self.shown(int(row)), float(scores[row])) for row in best]

    def save(self, path: Path) -> None:
        """Write a .safetensors file: `vectors`, the names as UTF-8 bytes with their ends, the counts."""
        encoded = [name.encode("utf-8", "surrogateescape") for name in self.names]
        tensors: dict[str, np.ndarray] = {
            "vectors": np.ascontiguousarray(self.matrix, dtype=np.float32),
            "names": np.frombuffer(b"".join(encoded), dtype=np.uint8),
            "name_ends": np.cumsum([len(name) for name in encoded], dtype=np.int64),
        }
        if self.counts is not None:
            tensors["counts"] = self.counts.astype(np.int64)
        about = json.dumps({"byte_mapped": self.byte_mapped, "notes": self.notes}, sort_keys=True)
        with whole_file(path) as temporary:
            save_file(tensors, temporary, {FORMAT: about})  # one key: the order of several would differ from file to file

    @classmethod
    def load(cls, path: Path) -> Vectors:
        """Read what `save` wrote. Raises `InputError` for anything else."""
        try:
            with safe_open(path, framework="numpy") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot be read: {error}", where=str(path)) from None
        if FORMAT not in about or not {"vectors", "names", "name_ends"} <= tensors.keys():
            raise InputError("holds no embeddings", where=str(path), hint="`tinylm embed import` reads other formats")
        raw, ends = tensors["names"].tobytes(), tensors["name_ends"].tolist()
        names = [raw[start:end].decode("utf-8", "surrogateescape") for start, end in zip([0, *ends], ends, strict=False)]
        noted = json.loads(about[FORMAT])
        return cls(names, tensors["vectors"], tensors.get("counts"), bool(noted["byte_mapped"]), noted["notes"])


METHODS = ("3cosadd", "3cosmul")
