"""Every format reads back what was written, to the bit, here and in gensim; damage is told with its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinylm.embedding.formats import KINDS, read, write
from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError

NAMES = {
    "word2vec": "v.vec",
    "word2vec-binary": "v.bin",
    "glove": "v.glove",
    "safetensors": "v.safetensors",
    "projector": "v.tsv",
}
AWKWARD = [" ", "\n", "", "a b", "tab\there", "plain", "Ġdotted", "łódź", "\u3000", "\x85", "é\udcff"]


@pytest.fixture
def wild() -> Vectors:
    """Numbers from all over float32, the smallest and largest among them."""
    generator = np.random.default_rng(0)
    matrix = (generator.standard_normal((50, 7)) * 10.0 ** generator.integers(-40, 38, (50, 7))).astype(np.float32)
    matrix[0, :4] = [np.finfo(np.float32).max, np.finfo(np.float32).tiny, 1e-45, -0.0]
    return Vectors([f"wörd{row}" for row in range(50)], matrix)


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_to_the_bit(wild: Vectors, tmp_path: Path, kind: str) -> None:
    path = tmp_path / NAMES[kind]
    assert write(wild, path, kind) is False
    for told in (None, kind):
        again = read(path, told)
        assert list(again.names) == list(wild.names)
        assert again.matrix.tobytes() == wild.matrix.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_names_with_white_space_come_back(tmp_path: Path, kind: str) -> None:
    vectors = Vectors(AWKWARD, np.random.default_rng(0).standard_normal((len(AWKWARD), 3)).astype(np.float32))
    path = tmp_path / NAMES[kind]
    mapped = write(vectors, path, kind)
    assert mapped == (kind != "safetensors")
    again = read(path, undo_byte_mapping=mapped)
    assert list(again.names) == AWKWARD
    assert again.matrix.tobytes() == vectors.matrix.tobytes()


@pytest.mark.parametrize("awkward", [False, True])
def test_gensim_reads_the_same_bits(wild: Vectors, tmp_path: Path, awkward: bool) -> None:
    models = pytest.importorskip("gensim.models", reason="gensim has no wheel for this Python")
    vectors = Vectors([*AWKWARD[:-1], *list(wild.names)[10:]], wild.matrix) if awkward else wild
    for kind, options in (
        ("word2vec", {}),
        ("word2vec-binary", {"binary": True}),
        ("glove", {"no_header": True}),
    ):
        path = tmp_path / NAMES[kind]
        write(vectors, path, kind)
        keyed = models.KeyedVectors.load_word2vec_format(str(path), **options)
        assert keyed.vectors.tobytes() == vectors.matrix.tobytes(), kind
        assert len(set(keyed.index_to_key)) == 50
        assert keyed.index_to_key == list(read(path).names)


def test_what_gensim_writes_is_read(learned: Vectors, tmp_path: Path) -> None:
    models = pytest.importorskip("gensim.models", reason="gensim has no wheel for this Python")
    keyed = models.KeyedVectors(learned.dimensions)
    keyed.add_vectors(list(learned.names), learned.matrix)
    for name, binary in (("g.vec", False), ("g.bin", True)):
        keyed.save_word2vec_format(str(tmp_path / name), binary=binary)
        again = read(tmp_path / name)
        assert list(again.names) == list(learned.names)
        assert (again.matrix == learned.matrix).all()


DAMAGED = {
    "short.vec": (b"3 2\na 1 2\nb 3 4\n", "promises 3 vectors and holds 2"),
    "narrow.vec": (b"2 3\na 1 2 3\nb 3 4\n", "narrow.vec:3: has 2 numbers, not 3"),
    "words.vec": (b"2 2\na 1 2\nb 3 x\n", "words.vec:3: holds something that is not a number"),
    "cut.bin": (b"2 2\na " + b"\0" * 8 + b"\nb \0\0\0\0\0\0", "ends inside vector 2 of 2"),
    "greedy.bin": (b"999999999 300\na " + b"\x01" * 16, "is too short for the 999,999,999 vectors"),
    "empty.txt": (b"", "no vector in the first line"),
    "nan.txt": (b"a 1 nan\nb 2 3\n", "some numbers are not finite"),
    "not.safetensors": (b"nothing", "cannot be read"),
    "alone.tsv": (b"1\t2\n", "alone-names.tsv: no such file: the names belong there"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_told_with_its_place(tmp_path: Path, name: str) -> None:
    content, expected = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as told:
        read(tmp_path / name)
    assert expected in str(told.value)
    assert name.partition(".")[0] in str(told.value)


def test_a_format_that_is_none(small: Vectors, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names no format"):
        write(small, tmp_path / "vectors.dat")
    with pytest.raises(InputError, match="did you mean glove"):
        write(small, tmp_path / "vectors.dat", "globe")
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "nothing.vec")
    with pytest.raises(InputError, match=r"no vectors\.safetensors in this folder"):
        read(tmp_path)
