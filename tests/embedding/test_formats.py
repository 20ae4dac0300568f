"""Test that tinylm and gensim read the exact bits of the vectors in every format, and that errors show where a file is damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinylm.embedding.formats import FORMATS, read, write
from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError, TinylmWarning

NAMES = {
    "word2vec": "v.vec",
    "word2vec-binary": "v.bin",
    "glove": "v.glove",
    "safetensors": "v.safetensors",
    "projector": "v.tsv",
}
UNUSUAL_NAMES = [" ", "\n", "", "a b", "tab\there", "plain", "Ġdotted", "łódź", "\u3000", "\x85", "é\udcff"]


@pytest.fixture
def extreme() -> Vectors:
    """Vectors that cover the whole range of float32, including the smallest and the largest numbers."""
    generator = np.random.default_rng(0)
    matrix = (generator.standard_normal((50, 7)) * 10.0 ** generator.integers(-40, 38, (50, 7))).astype(np.float32)
    matrix[0, :4] = [np.finfo(np.float32).max, np.finfo(np.float32).tiny, 1e-45, -0.0]
    return Vectors([f"wörd{row}" for row in range(50)], matrix)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_round_trip_restores_every_bit(extreme: Vectors, tmp_path: Path, kind: str) -> None:
    path = tmp_path / NAMES[kind]
    assert write(extreme, path, kind) is False
    for requested_kind in (None, kind):
        loaded = read(path, requested_kind)
        assert list(loaded.names) == list(extreme.names)
        assert loaded.matrix.tobytes() == extreme.matrix.tobytes()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_round_trip_restores_names_with_white_space(tmp_path: Path, kind: str) -> None:
    vectors = Vectors(UNUSUAL_NAMES, np.random.default_rng(0).standard_normal((len(UNUSUAL_NAMES), 3)).astype(np.float32))
    path = tmp_path / NAMES[kind]
    mapped = write(vectors, path, kind)
    assert mapped == (kind != "safetensors")
    loaded = read(path, undo_byte_mapping=mapped)
    assert list(loaded.names) == UNUSUAL_NAMES
    assert loaded.matrix.tobytes() == vectors.matrix.tobytes()


@pytest.mark.parametrize("unusual_names", [False, True])
def test_gensim_reads_the_same_bits(extreme: Vectors, tmp_path: Path, unusual_names: bool) -> None:
    models = pytest.importorskip("gensim.models", reason="requires gensim")
    named = [name for name in UNUSUAL_NAMES[:-1] if name]
    vectors = Vectors([*named, *list(extreme.names)[len(named) :]], extreme.matrix) if unusual_names else extreme
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


def test_files_written_by_gensim_can_be_read(learned: Vectors, tmp_path: Path) -> None:
    models = pytest.importorskip("gensim.models", reason="requires gensim")
    keyed = models.KeyedVectors(learned.dimensions)
    keyed.add_vectors(list(learned.names), learned.matrix)
    for name, binary in (("g.vec", False), ("g.bin", True)):
        keyed.save_word2vec_format(str(tmp_path / name), binary=binary)
        loaded = read(tmp_path / name)
        assert list(loaded.names) == list(learned.names)
        assert (loaded.matrix == learned.matrix).all()


DAMAGED = {
    "short.vec": (b"3 2\na 1 2\nb 3 4\n", "the first line declares 3 vectors, but the file has 2"),
    "narrow.vec": (b"2 3\na 1 2 3\nb 3 4\n", "narrow.vec:3: has 2 numbers instead of 3"),
    "words.vec": (b"2 2\na 1 2\nb 3 x\n", "words.vec:3: contains a value that is not a number"),
    "cut.bin": (b"2 2\na " + b"\0" * 8 + b"\nb \0\0\0\0\0\0", "ends inside vector 2 of 2"),
    "greedy.bin": (b"999999999 300\na " + b"\x01" * 16, "the file is too short for the 999,999,999 vectors"),
    "empty.txt": (b"", "the file is empty"),
    "blank.txt": (b"\n", "the first line contains no vector"),
    "latin.vec": (b"1 2\ncaf\xe9 1 2\n", "latin.vec:2: the name b'caf\\xe9' is not UTF-8"),
    "nameless.vec": (b"1 2\n 1 2\n", "nameless.vec: vector 1: the name is empty"),
    "latin.bin": (b"1 2\ncaf\xe9 " + b"\0" * 8, "latin.bin: vector 1: the name b'caf\\xe9' is not UTF-8"),
    "nameless.bin": (b"2 2\na " + b"\0" * 8 + b" " + b"\0" * 8, "nameless.bin: vector 2: the name is empty"),
    "bell.bin": (b"1 2\na\x07 " + b"\0" * 8, "bell.bin: vector 1: the name 'a\\x07' contains a control character"),
    "c1.bin": (b"1 2\na\xc2\x9b " + b"\0" * 8, "contains a control character"),
    "nan.txt": (b"a 1 nan\nb 2 3\n", "the vectors contain NaN or infinity"),
    "not.safetensors": (b"nothing", "cannot be read"),
    "alone.tsv": (b"1\t2\n", "alone-names.tsv: no such file; it must contain the names of the vectors"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_the_error_for_a_damaged_file_contains_the_position(tmp_path: Path, name: str) -> None:
    content, expected = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read(tmp_path / name)
    assert expected in str(error.value)
    assert name.partition(".")[0] in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("v.vec", "2 2\ncat 1 2\ndog 3 4\n"), ("v.glove", "cat 1 2\ndog 3 4\n"), ("v.txt", "2 2\r\ncat 1 2\r\ndog 3 4\r\n")],
)
def test_a_byte_order_mark_is_skipped(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text("\ufeff" + content, encoding="utf-8", newline="")
    loaded = read(tmp_path / name)
    assert (list(loaded.names), loaded.matrix.tolist()) == (["cat", "dog"], [[1, 2], [3, 4]])


def test_a_repeated_name_causes_a_warning_and_its_first_vector_is_used(tmp_path: Path) -> None:
    (tmp_path / "twice.vec").write_text("3 2\ncat 1 2\ncat 3 4\ndog 5 6\n")
    with pytest.warns(TinylmWarning, match=r"1 rows repeat the name of an earlier row \('cat'\)"):
        loaded = read(tmp_path / "twice.vec")
    assert (list(loaded.names), loaded.matrix.tolist()) == (["cat", "dog"], [[1, 2], [5, 6]])


def test_unknown_formats_and_missing_files_are_errors(small: Vectors, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the suffix is not one of"):
        write(small, tmp_path / "vectors.dat")
    with pytest.raises(InputError, match="did you mean glove"):
        write(small, tmp_path / "vectors.dat", "globe")
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "nothing.vec")
    with pytest.raises(InputError, match=r"no vectors\.safetensors in this folder"):
        read(tmp_path)
