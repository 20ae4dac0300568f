"""Named vectors and queries on them: nearest neighbors, analogies, similarity and the odd one out.

A name is either a word or a token in byte-mapped form (` the` is `Ġthe`). Queries accept both the plain and the byte-mapped
spelling. All similarities are cosines. This module does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tinylm.embedding.byte_mapping import from_byte_mapped, to_byte_mapped
from tinylm.errors import InputError, did_you_mean
from tinylm.paths import atomic_file

FORMAT = "tinylm-embeddings-1"
_EPSILON = 1e-3
"""Keeps the division in 3CosMul finite. The value is from Levy & Goldberg (2014)."""
ANALOGY_METHODS = ("3cosadd", "3cosmul")


def check_analogy_method(method: str) -> None:
    """Raise `InputError` if `method` is not in `ANALOGY_METHODS`."""
    if method not in ANALOGY_METHODS:
        hint = did_you_mean(method, ANALOGY_METHODS)
        raise InputError(f"must be {' or '.join(ANALOGY_METHODS)}, not {method!r}", where="--method", hint=hint)


@dataclass(frozen=True)
class Neighbor:
    """A name and its score in a query. The fields are the keys of `tinylm embed nearest --json`."""

    token: str
    similarity: float


@dataclass(frozen=True)
class Vectors:
    """A table of vectors: `matrix` is float32 (names, dimensions). Raises `InputError` if it is empty or inconsistent."""

    names: Sequence[str]
    matrix: np.ndarray
    counts: np.ndarray | None = None
    """int64 (names,): occurrences in the text, if known."""
    byte_mapped: bool = False
    """Whether the names are token bytes in byte-mapped form."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Where the vectors come from: the method, or the run and checkpoint."""

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or len(self.matrix) != len(self.names):
            raise InputError(f"{len(self.names):,} names do not match a matrix of shape {self.matrix.shape}")
        if not len(self.names):
            raise InputError("the file contains no vectors")
        if not np.isfinite(self.matrix).all():
            raise InputError("the vectors contain NaN or infinity")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def dimensions(self) -> int:
        return int(self.matrix.shape[1])

    @cached_property
    def index(self) -> dict[str, int]:
        """The row of each name. For a repeated name, this is the first row."""
        return {name: row for row, name in reversed(list(enumerate(self.names)))}

    @cached_property
    def normalized(self) -> np.ndarray:
        """The vectors scaled to length 1, (names, dimensions). A zero vector stays zero."""
        norms = np.linalg.norm(self.matrix, axis=1, keepdims=True)
        normalized: np.ndarray = self.matrix / np.maximum(norms, np.finfo(np.float32).tiny)
        return normalized

    def display_name(self, row: int) -> str:
        """Return a row's name as text. Byte-mapped names are decoded as UTF-8."""
        name = self.names[row]
        raw = from_byte_mapped(name) if self.byte_mapped else None
        return name if raw is None else raw.decode("utf-8", "replace")

    def find(self, word: str) -> int | None:
        """Return the row of a word, or None. Also tries lowercase, the byte-mapped form and, for tokens, a leading space."""
        forms = [word, word.lower()]
        if self.byte_mapped:
            texts = [text for form in forms for text in (form, f" {form}")]
            forms = [to_byte_mapped(text.encode("utf-8", "surrogateescape")) for text in texts] + forms
        else:  # files in text formats do not record whether their names are byte-mapped
            forms.append(to_byte_mapped(word.encode("utf-8", "surrogateescape")))
        return next((self.index[form] for form in forms if form in self.index), None)

    def row(self, word: str) -> int:
        """Like `find`, but raises `InputError` for an unknown word, with the most similar spelling as a hint."""
        row = self.find(word)
        if row is None:
            known = [self.display_name(row) for row in range(min(len(self), 50_000))]
            raise InputError(f"{word!r} is not among the {len(self):,} vectors", hint=did_you_mean(word, known))
        return row

    def nearest(self, word: str, count: int = 10) -> list[Neighbor]:
        """Return the `count` names most similar to `word`, excluding the word itself. Raises `InputError` for an unknown word."""
        row = self.row(word)
        return self._top(self.normalized @ self.normalized[row], [row], count)

    def nearest_to(self, vector: np.ndarray, count: int = 10) -> list[Neighbor]:
        """Return the `count` names most similar to `vector`, (dimensions,)."""
        return self._top(self.normalized @ (vector / max(float(np.linalg.norm(vector)), 1e-30)), [], count)

    def analogy(self, a: str, b: str, c: str, count: int = 10, method: str = "3cosadd") -> list[Neighbor]:
        """Answer "a is to b as c is to ...", excluding the three words. Raises `InputError` for an unknown word or method.

        `3cosadd` scores a candidate d by cos(d, b - a + c) on normalized vectors (Mikolov et al. 2013, "Linguistic Regularities in
        Continuous Space Word Representations"). `3cosmul` multiplies and divides similarities shifted to [0, 1] (Levy & Goldberg
        2014, equation 4). The `similarity` of each returned neighbor is this score.
        """
        rows = [self.row(word) for word in (a, b, c)]
        return self._top(self.analogy_scores(np.array([rows]), method)[0], rows, count)

    def analogy_scores(self, rows: np.ndarray, method: str = "3cosadd", max_names: int | None = None) -> np.ndarray:
        """Return the score of each candidate for each question, (questions, names).

        `rows`, (questions, 3), contains the row numbers of a, b and c. Only the first `max_names` names are candidates.
        """
        check_analogy_method(method)
        a, b, c = (self.normalized[rows[:, column]] for column in range(3))
        candidates = self.normalized[:max_names]
        if method == "3cosadd":
            target = b - a + c
            scores: np.ndarray = (target / np.maximum(np.linalg.norm(target, axis=1, keepdims=True), 1e-30)) @ candidates.T
            return scores
        to_a, to_b, to_c = ((1 + vectors @ candidates.T) / 2 for vectors in (a, b, c))
        scores = to_b * to_c / (to_a + _EPSILON)
        return scores

    def similarity(self, first: str, second: str) -> float:
        """Return the cosine similarity of two words, in [-1, 1]. Raises `InputError` for an unknown word."""
        return float(self.normalized[self.row(first)] @ self.normalized[self.row(second)])

    def odd_one_out(self, words: Sequence[str]) -> list[Neighbor]:
        """Rank the words by similarity to their mean, least similar first. Raises `InputError` for fewer than three words."""
        if len(words) < 3:
            raise InputError(f"the odd one out needs at least three words, not {len(words)}")
        chosen = self.normalized[[self.row(word) for word in words]]
        center = chosen.mean(axis=0)
        similarities = chosen @ (center / max(float(np.linalg.norm(center)), 1e-30))
        order = np.argsort(similarities, kind="stable")
        return [Neighbor(words[index], float(similarities[index])) for index in order]

    def _top(self, scores: np.ndarray, excluded: Sequence[int], count: int) -> list[Neighbor]:
        """Return the `count` names with the highest scores, skipping the `excluded` rows. Ties are in row order."""
        scores = scores.copy()
        scores[list(excluded)] = -np.inf
        count = min(count, len(scores) - len(set(excluded)))
        best = np.argpartition(-scores, max(count - 1, 0))[:count]
        best = best[np.lexsort((best, -scores[best]))]
        return [Neighbor(self.display_name(int(row)), float(scores[row])) for row in best]

    def save(self, path: Path) -> None:
        """Write a .safetensors file with `vectors`, the concatenated UTF-8 `names`, their `name_ends` and, if known, `counts`."""
        encoded = [name.encode("utf-8", "surrogateescape") for name in self.names]
        tensors: dict[str, np.ndarray] = {
            "vectors": np.ascontiguousarray(self.matrix, dtype=np.float32),
            "names": np.frombuffer(b"".join(encoded), dtype=np.uint8),
            "name_ends": np.cumsum([len(name) for name in encoded], dtype=np.int64),
        }
        if self.counts is not None:
            tensors["counts"] = self.counts.astype(np.int64)
        header = json.dumps({"byte_mapped": self.byte_mapped, "notes": self.notes}, sort_keys=True)
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, {FORMAT: header})  # a single key, because safetensors does not keep the order of keys

    @classmethod
    def load(cls, path: Path) -> Vectors:
        """Read a file that `save` wrote. Raises `InputError` for any other file."""
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot be read: {error}", where=str(path)) from None
        if FORMAT not in metadata or not {"vectors", "names", "name_ends"} <= tensors.keys():
            raise InputError("not a tinylm embedding file", where=str(path), hint="`tinylm embed import` reads other formats")
        try:
            raw, ends = tensors["names"].tobytes(), [int(end) for end in tensors["name_ends"]]
            header = json.loads(metadata[FORMAT])
            byte_mapped, notes, counts = bool(header["byte_mapped"]), dict(header["notes"]), tensors.get("counts")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"the names or metadata are damaged: {error}", where=str(path)) from None
        in_order = all(start <= end for start, end in pairwise([0, *ends])) and (not ends or ends[-1] == len(raw))
        matrix = tensors["vectors"]
        if not in_order or matrix.dtype != np.float32 or (counts is not None and counts.shape != (len(ends),)):
            raise InputError("the names, vectors and counts do not match", where=str(path))
        names = [raw[start:end].decode("utf-8", "surrogateescape") for start, end in pairwise([0, *ends])]
        return cls(names, matrix, counts, byte_mapped, notes)
