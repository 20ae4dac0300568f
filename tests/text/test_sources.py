"""Text comes in from every kind of source as it is, in bounded pieces, and what cannot be read is told with its place."""

from __future__ import annotations

import bz2
import functools
import gzip
import http.server
import io
import json
import lzma
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinylm.errors import InputError
from tinylm.recipe.schema import BpeTokenizer
from tinylm.text.sources import BLOCK_BYTES, LONGEST_PIECE, PIECE_CHARACTERS, Corpus, Piece, describe
from tinylm.tokenizer import training

POEM = "Ein Gedicht – 詩 🙂\nwith two lines\n"


def documents(*sources: str | Path, field: str = "text", errors: str = "strict") -> list[str]:
    with Corpus([str(source) for source in sources], field=field, errors=errors) as corpus:
        return joined(corpus)


def joined(corpus: Corpus) -> list[str]:
    found: list[str] = []
    for piece in corpus.pieces():
        assert piece.text, "an empty piece"
        if piece.starts_document:
            found.append("")
        found[-1] += piece.text
    return found


def refusal(*sources: str | Path, field: str = "text") -> str:
    with pytest.raises(InputError) as caught:
        documents(*sources, field=field)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def json_lines(*texts: object, field: str = "text") -> str:
    return "".join(json.dumps({"id": number, field: text}) + "\n" for number, text in enumerate(texts))


def zstd_compress(data: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        zstd = pytest.importorskip("backports.zstd")
    compressed: bytes = zstd.compress(data)
    return compressed


COMPRESS = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstd_compress}


def test_a_plain_file_is_one_document_with_every_byte_kept(tmp_path: Path) -> None:
    text = "\ufeffa mark\r\nCRLF\rCR\x00NUL\x85\u2028\u2029\x1c " + POEM + "\n\n \n"
    assert documents(write(tmp_path / "a.txt", text)) == [text]


def test_an_empty_file_and_an_empty_line_are_no_documents(tmp_path: Path) -> None:
    lines = '{"text": "one"}\n\n{"text": ""}\r\n   \n{"text": " "}'
    assert documents(write(tmp_path / "e.txt", ""), write(tmp_path / "a.jsonl", lines)) == ["one", " "]


def test_each_line_of_jsonl_is_a_document_read_from_the_chosen_field(tmp_path: Path) -> None:
    texts = [POEM, "a\r\nb", "\x00 \u2028 \x85", "<|endoftext|>", "\ufeffmark"]
    path = write(tmp_path / "a.jsonl", json_lines(*texts, field="body"))
    assert documents(path, field="body") == texts
    assert "a.jsonl:1: no text in field 'text' (id, body) (name the field with --field or data.field)" in refusal(path)


def test_jsonl_may_begin_with_a_mark_and_end_its_lines_as_windows_does(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')) == ["a", "b"]


def test_jsonl_escapes_make_whole_characters(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "a.jsonl", r'{"text": "\ud83d\ude42\u00e9"}')) == ["🙂é"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("not json", ":2: not JSON"),
        ('{"text": "cut', ":2: not JSON"),
        ("[" * 100_000, ":2: not JSON"),
        ('["a"]', ":2: no text in field 'text' (it is not an object)"),
        ('{"text": null}', ":2: field 'text' holds null, which is not text"),
        ('{"text": 5}', ":2: field 'text' holds 5, which is not text"),
        (r'{"text": "half \ud83d of it"}', ":2: half of a surrogate pair, which is not text"),
    ],
)
def test_a_wrong_line_of_jsonl_is_named(tmp_path: Path, line: str, told: str) -> None:
    path = write(tmp_path / "a.jsonl", json_lines("fine") + line + "\n")
    assert refusal(path).startswith(f"{path}{told}")


def test_half_a_surrogate_pair_can_be_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", r'{"text": "\ud83d a\ude42\ud83d\ude42\ud83d"}')
    assert documents(path, errors="replace") == ["\ufffd a\ufffd🙂\ufffd"]


def test_invalid_utf8_in_jsonl_names_the_byte_in_the_file(tmp_path: Path) -> None:
    first = json_lines("é" * 5).encode()
    path = write(tmp_path / "a.jsonl", first + b'{"text": "\xff"}\n')
    assert refusal(path).startswith(f"{path}: not UTF-8 at byte {len(first) + 10} (data.errors: replace")
    assert documents(path, errors="replace") == ["é" * 5, "\ufffd"]


def test_each_row_of_parquet_is_a_document(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"row {number} {POEM}" for number in range(600)]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"n": list(range(600)), "body": pa.array(texts, pa.string()).cast(kind)}), tmp_path / "a.parquet")
        assert documents(tmp_path / "a.parquet", field="body") == texts
    assert "a.parquet: no column 'text' (n, body)" in refusal(tmp_path / "a.parquet")


def test_a_damaged_parquet_file_is_told(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    assert "no.parquet: not a Parquet file" in refusal(write(tmp_path / "no.parquet", "plain text"))
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    assert "null.parquet row 2: field 'text' holds null" in refusal(tmp_path / "null.parquet")
    pq.write_table(pa.table({"text": [f"{n} {POEM}" for n in range(5000)]}), tmp_path / "b.parquet", compression="gzip")
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    assert "b.parquet: cannot be read to its end" in refusal(write(tmp_path / "b.parquet", bytes(content)))


def test_parquet_text_that_is_not_utf8_names_its_row(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 2, 5)))
    pq.write_table(
        pa.table({"text": pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"ok\x61\xff\x62"))}), tmp_path / "a.parquet"
    )
    assert "a.parquet row 2: not UTF-8 at byte 1" in refusal(tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet", errors="replace") == ["ok", "a\ufffdb"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_reads_like_plain_text(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    text = POEM * 50_000  # more than a block
    half = text.encode()[: len(text.encode()) // 2]
    assert documents(write(tmp_path / f"a.txt.{suffix}", compress(text.encode()))) == [text]
    assert documents(write(tmp_path / f"a.jsonl.{suffix}", compress(json_lines("a", "b").encode()))) == ["a", "b"]
    appended = compress(half) + compress(text.encode()[len(half) :])
    assert documents(write(tmp_path / f"two.txt.{suffix}", appended)) == [text], "two archives one after the other"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_damaged_archive_is_an_error_and_never_a_shorter_text(tmp_path: Path, suffix: str) -> None:
    whole = COMPRESS[suffix](os.urandom(100_000).hex().encode())
    for name, content in {
        "cut": whole[: len(whole) // 2],
        "tail": whole[:-1],
        "plain": b"just text, whatever the name says",
    }.items():
        path = write(tmp_path / f"{name}.txt.{suffix}", content)
        assert refusal(path).startswith(f"{path}: cannot be read to its end: ")


def test_a_corrupt_gzip_file_is_told(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(POEM.encode() * 1000))
    content[len(content) // 2] ^= 0xFF
    assert "a.txt.gz: cannot be read to its end" in refusal(write(tmp_path / "a.txt.gz", bytes(content)))


def test_a_folder_is_walked_in_sorted_order_without_hidden_and_binary_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.rst", "README"):
        write(tmp_path / name, name)
    write(tmp_path / "a.jsonl", json_lines("line 1", "line 2"))
    write(tmp_path / "c.txt.gz", gzip.compress(b"compressed"))
    for hidden in (".hidden", ".git/config", "a/.b/c.txt"):
        write(tmp_path / hidden, "hidden")
    binary = [write(tmp_path / "image.png", b"\x89PNG\x00\x01"), write(tmp_path / "a/latin1.txt", b"caf\xe9 caf\xe9")]
    (tmp_path / "broken").symlink_to("nowhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    with Corpus([str(tmp_path)]) as corpus:
        assert joined(corpus) == ["README", "line 1", "line 2", "b.txt", "compressed", "a/z.md", "a/b/c.rst"]
        assert corpus.skipped == sorted(map(str, binary))


def test_a_character_cut_by_the_look_at_the_start_of_a_file_does_not_make_it_binary(tmp_path: Path) -> None:
    for shift in range(4):
        write(tmp_path / f"{shift}.txt", "x" * (8192 - shift) + "🙂")
    with Corpus([str(tmp_path)]) as corpus:
        assert corpus.skipped == []


def test_a_glob_a_list_and_a_repeated_source_keep_their_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "deep/d.txt"):
        write(tmp_path / name, name)
    assert documents(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert documents(tmp_path / "**/*.txt") == ["a.txt", "b.txt", "deep/d.txt"]
    assert documents(tmp_path / "c.md", tmp_path / "*.txt", tmp_path / "c.md") == ["c.md", "a.txt", "b.txt", "c.md"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "a[1]?.txt", "here")) == ["here"]


def test_standard_input_can_be_read_as_often_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(POEM.encode())

    monkeypatch.setattr(sys, "stdin", Stdin)
    with Corpus(["-"]) as corpus:
        assert joined(corpus) == joined(corpus) == [POEM]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_can_be_read_as_often_as_needed(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(POEM,))
    writer.start()
    with Corpus([str(pipe)]) as corpus:
        assert joined(corpus) == joined(corpus) == [POEM]
    writer.join()


def test_addresses_are_read_through_fsspec(tmp_path: Path) -> None:
    import fsspec

    plain = write(tmp_path / "a.txt", POEM)
    lines = write(tmp_path / "b.jsonl.gz", gzip.compress(json_lines("one", "two").encode()))
    assert documents(plain.as_uri(), lines.as_uri()) == [POEM, "one", "two"]
    with fsspec.open("memory://here/c.md", "wb") as file:
        file.write(POEM.encode())
    assert documents("memory://here/c.md") == [POEM]


def test_what_follows_a_question_mark_in_a_web_address_is_not_its_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    class Web(MemoryFileSystem):  # type: ignore[misc]
        def _open(self, path: str, mode: str = "rb", **_: object) -> io.BytesIO:
            return io.BytesIO(json_lines("one", "two").encode())

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "https", Web)
    assert documents("https://example.org/data.jsonl?download=true&name=x.txt") == ["one", "two"]


def test_copies_of_remote_text_are_removed_when_the_corpus_is_closed(tmp_path: Path) -> None:
    address = write(tmp_path / "a.txt", POEM).as_uri()
    spool = Path(os.environ["TINYLM_CACHE"], "spool")
    before = set(spool.glob("*"))
    corpus = Corpus([address])
    assert set(spool.glob("*")) > before
    corpus.close()
    assert set(spool.glob("*")) == before
    with pytest.raises(InputError):
        Corpus([address, str(tmp_path / "none.txt")])
    assert set(spool.glob("*")) == before


def test_what_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "only").mkdir()
    write(tmp_path / "only/a.bin", b"\0\1")
    for source, told in {
        f"{tmp_path}/none.txt": "none.txt: no such file or folder",
        f"{tmp_path}/*.none": "*.none: no such file or folder",
        f"{tmp_path}/empty": "empty: no text in this folder",
        f"{tmp_path}/only": "only: no text in this folder: 1 files that are not text",
        f"file://{tmp_path}/none.txt": "none.txt: cannot be read: ",
        "nothing://at/all": "nothing://at/all: cannot be read: Protocol not known",
        "builtin:python-doc": "builtin:python-doc: no such builtin text (python-docs) (did you mean python-docs?)",
    }.items():
        message = refusal(source)
        assert told in message
        assert "\n" not in message


@pytest.fixture
def _datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library of that name, offline and with a cache of the test's own."""
    library = pytest.importorskip("datasets", reason="needs tinylm[datasets]")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("_datasets")
def test_a_dataset_is_read_row_by_row_from_the_split_that_is_named(tmp_path: Path) -> None:
    texts = [f"row {number},\r\n 世界" for number in range(10)]
    for split, part in {"train": texts[:8], "test": texts[8:]}.items():
        write(tmp_path / "data" / f"{split}.jsonl", "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in part))
    source = f"hf:{tmp_path}/data"
    assert documents(source) == documents(f"{source}:train") == texts[:8]
    assert documents(f"{source}:test") == texts[8:]
    assert documents(f"{source}:train[:25%]") == texts[:2]
    with Corpus([source]) as corpus:
        assert list(corpus.pieces()) == list(corpus.pieces()), "as often as needed"
    assert "row 1: field 'n' holds 1, which is not text" in refusal(source, field="n")
    assert "row 1: no text in field 'body'" in refusal(source, field="body")
    for wrong, told in {f"{source}:nosuch": "cannot be read: Unknown split", f"hf:{tmp_path}/none": "cannot be read: "}.items():
        assert told in refusal(wrong)


def test_a_missing_extra_names_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {"parquet": write(tmp_path / "a.parquet", "x"), "zst": write(tmp_path / "a.txt.zst", "x"), "datasets": "hf:any"}
    for module in ("pyarrow", "datasets", "backports.zstd", "backports", "compression"):
        monkeypatch.setitem(sys.modules, module, None)
    for extra, path in paths.items():
        assert f'pip install "tinylm[{extra}]"' in refusal(path)


@pytest.mark.parametrize(
    "before", [0, 1, 1000, BLOCK_BYTES - 3, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES - 2]
)
def test_invalid_utf8_names_the_file_and_the_exact_byte(tmp_path: Path, before: int) -> None:
    filling = ("é" * (before // 2) + "x" * (before % 2)).encode()
    for wrong in (b"\xff then more", "🙂".encode()[:3] + b"x", "🙂".encode()[:3], "é".encode()[:1]):
        content = filling + wrong
        with pytest.raises(UnicodeDecodeError) as reference:
            content.decode()
        path = write(tmp_path / "a.txt", content)
        assert refusal(path).startswith(f"{path}: not UTF-8 at byte {reference.value.start} (")
        assert documents(path, errors="replace") == [content.decode(errors="replace")]


@pytest.mark.parametrize("shift", range(5))
def test_a_character_across_the_border_of_two_blocks_is_whole(tmp_path: Path, shift: int) -> None:
    text = "x" * (BLOCK_BYTES - shift) + "🙂 and more"
    assert documents(write(tmp_path / "a.txt", text)) == [text]


def pieces_of(path: Path) -> list[str]:
    with Corpus([str(path)]) as corpus:
        found = list(corpus.pieces())
    assert [piece.starts_document for piece in found] == [True] + [False] * (len(found) - 1)
    return [piece.text for piece in found]


def test_a_long_document_comes_in_bounded_pieces_that_join_to_it(tmp_path: Path, english: str) -> None:
    for name, text in {
        "english": english * 3,
        "nospace": "ab" * 1_300_000,
        "spaces": " " * 2_500_000,
        "lines": "word\n" * 500_000,
        "rare": ("x" * 700_000 + " ") * 4,
        "exact": "x" * LONGEST_PIECE,
        "wide": "語🙂 " * 600_000,
    }.items():
        pieces = pieces_of(write(tmp_path / name, text))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= LONGEST_PIECE
        assert all(len(piece) >= PIECE_CHARACTERS for piece in pieces[:-1])
        assert len(pieces) > 1 or len(text) == LONGEST_PIECE


def test_the_cuts_do_not_depend_on_how_the_text_arrived(tmp_path: Path, english: str) -> None:
    for number, text in enumerate([english * 2, "x" * 3_000_001, ("y" * 400_000 + " ") * 5 + "é" * 1_500_000]):
        plain = pieces_of(write(tmp_path / f"{number}.txt", text))
        assert plain == pieces_of(write(tmp_path / f"{number}.jsonl", json.dumps({"text": text})))
        assert plain == pieces_of(write(tmp_path / f"{number}.txt.gz", gzip.compress(text.encode(), 1)))


@pytest.mark.parametrize("split", ["gpt4", "gpt2"])
def test_cut_text_has_the_tokens_of_the_whole_text(tmp_path: Path, english: str, split: str) -> None:
    tokenizer = training.train(BpeTokenizer(kind="bpe", vocab_size=600, split=split), [Piece(english[:200_000], True)], print)
    odd = "  two  spaces \n\n  1234567 it's\t\tx\r\n\r\n \u00a0 end.  — “quoted” 語 🙂🙂 \x1c y\u2003 z  "
    for number, text in enumerate([english, (odd + "a") * 4000, odd * 4000]):
        pieces = pieces_of(write(tmp_path / f"{number}.txt", text))
        assert len(pieces) > 1
        assert [id for piece in pieces for id in tokenizer.encode(piece)] == tokenizer.encode(text)


@pytest.mark.parametrize("shift", range(5))
def test_a_cut_never_falls_inside_white_space(tmp_path: Path, shift: int) -> None:
    pieces = pieces_of(write(tmp_path / "a.txt", "x" * shift + "ab \n  " * 100_000))
    assert len(pieces) == 3
    assert all(piece.endswith("b") for piece in pieces[:-1])
    assert all(piece.startswith(" \n  a") for piece in pieces[1:])


@pytest.mark.parametrize("split", ["gpt4", "gpt2"])
def test_a_space_after_any_character_begins_a_token(split: str, english: str) -> None:
    tokenizer = training.train(BpeTokenizer(kind="bpe", vocab_size=400, split=split), [Piece(english[:50_000], True)], print)
    characters = [
        c
        for code in [*range(0x3100), *range(0xA000, 0xABFF), *range(0xFE00, 0x10000), 0x1F642, 0xE0020]
        if not (c := chr(code)).isspace()
    ]
    after = tokenizer.encode(" x")
    together = tokenizer.backend.encode_batch([c + " x" for c in characters])
    alone = tokenizer.backend.encode_batch(characters)
    assert [e.ids for e in together] == [e.ids + after for e in alone]


MEMORY = """
import resource, sys
from tinylm.text.sources import Corpus
from tinylm.text.split import scan
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Corpus([sys.argv[1]]) as small, Corpus([sys.argv[2]]) as large:
    scan(small.pieces())
    before = peak()
    found = scan(large.pieces())
    print(found.characters, peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the unit of ru_maxrss is Linux's")
@pytest.mark.parametrize("unit", ["x", "word "])
def test_one_line_of_fifty_megabytes_streams_in_flat_memory(tmp_path: Path, unit: str) -> None:
    small = write(tmp_path / "small.txt", unit * (4_000_000 // len(unit)))
    large = write(tmp_path / "large.txt", unit * (50_000_000 // len(unit)))
    command = [sys.executable, "-c", MEMORY, str(small), str(large)]
    characters, grown = map(int, subprocess.run(command, capture_output=True, check=True).stdout.split())
    assert characters == 50_000_000
    assert grown < 8_000, "kilobytes more for 46 MB more text"


def test_many_sources_are_described_shortly() -> None:
    assert describe(["a", "b"]) == "a, b"
    assert describe(["a", "b", "c", "d"]) == "a and 3 more"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server on the loopback and the folder it serves."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", folder
        server.shutdown()


def test_a_text_on_the_web_is_read_as_often_as_needed(web: tuple[str, Path]) -> None:
    address, folder = web
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    with Corpus([f"{address}/a.jsonl"]) as corpus:
        (folder / "a.jsonl").unlink()
        assert [piece.text for piece in corpus.pieces()] == [piece.text for piece in corpus.pieces()] == ["one", "two"]


def test_a_missing_page_is_told_with_its_address(web: tuple[str, Path]) -> None:
    address, _ = web
    with pytest.raises(InputError, match=re.escape(f"{address}/nothing.txt: cannot be read")):
        Corpus([f"{address}/nothing.txt"])
