"""Text is read unchanged from every kind of source, in bounded pieces, and errors report the position of the problem."""

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
from tinylm.text.files import BLOCK_BYTES
from tinylm.text.sources import Corpus, describe

POEM = "Ein Gedicht – 詩 🙂\nwith two lines\n"


def documents(*sources: str | Path, field: str = "text", errors: str = "strict") -> list[str]:
    with Corpus([str(source) for source in sources], field=field, errors=errors) as corpus:
        return joined(corpus)


def joined(corpus: Corpus) -> list[str]:
    texts: list[str] = []
    for piece in corpus.pieces():
        assert piece.text, "an empty piece"
        if piece.starts_document:
            texts.append("")
        texts[-1] += piece.text
    return texts


def error_for(*sources: str | Path, field: str = "text") -> str:
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


def test_a_text_file_is_one_document_and_every_byte_is_kept(tmp_path: Path) -> None:
    text = "\ufeffa mark\r\nCRLF\rCR\x00NUL\x85\u2028\u2029\x1c " + POEM + "\n\n \n"
    assert documents(write(tmp_path / "a.txt", text)) == [text]


def test_empty_files_and_lines_are_not_documents(tmp_path: Path) -> None:
    lines = '{"text": "one"}\n\n{"text": ""}\r\n   \n{"text": " "}'
    assert documents(write(tmp_path / "e.txt", ""), write(tmp_path / "a.jsonl", lines)) == ["one", " "]


def test_each_line_of_jsonl_is_a_document_read_from_the_chosen_field(tmp_path: Path) -> None:
    texts = [POEM, "a\r\nb", "\x00 \u2028 \x85", "<|endoftext|>", "\ufeffmark"]
    path = write(tmp_path / "a.jsonl", json_lines(*texts, field="body"))
    assert documents(path, field="body") == texts
    assert "a.jsonl:1: no field 'text'; fields: id, body (choose one with --field," in error_for(path)


def test_jsonl_can_have_a_byte_order_mark_and_windows_line_endings(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')) == ["a", "b"]


def test_escaped_surrogate_pairs_in_jsonl_become_one_character(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "a.jsonl", r'{"text": "\ud83d\ude42\u00e9"}')) == ["🙂é"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("not json", ":2: not JSON"),
        ('{"text": "cut', ":2: not JSON"),
        ("[" * 100_000, ":2: not JSON"),
        ('["a"]', ":2: not a JSON object"),
        ('{"text": null}', ":2: field 'text' must be text, not null"),
        ('{"text": 5}', ":2: field 'text' must be text, not 5"),
        (r'{"text": "half \ud83d of it"}', ":2: field 'text' contains an unpaired surrogate"),
    ],
)
def test_an_invalid_jsonl_line_is_reported_with_its_number(tmp_path: Path, line: str, expected: str) -> None:
    path = write(tmp_path / "a.jsonl", json_lines("fine") + line + "\n")
    assert error_for(path).startswith(f"{path}{expected}")


def test_an_unpaired_surrogate_can_be_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", r'{"text": "\ud83d a\ude42\ud83d\ude42\ud83d"}')
    assert documents(path, errors="replace") == ["\ufffd a\ufffd🙂\ufffd"]


def test_invalid_utf8_in_jsonl_is_reported_with_its_offset_in_the_file(tmp_path: Path) -> None:
    first = json_lines("é" * 5).encode()
    path = write(tmp_path / "a.jsonl", first + b'{"text": "\xff"}\n')
    assert error_for(path).startswith(
        f"{path}: not UTF-8 at byte {len(first) + 10} (use --errors replace, or set data.errors to replace"
    )
    assert documents(path, errors="replace") == ["é" * 5, "\ufffd"]


def test_each_parquet_row_is_a_document(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"row {number} {POEM}" for number in range(600)]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"n": list(range(600)), "body": pa.array(texts, pa.string()).cast(kind)}), tmp_path / "a.parquet")
        assert documents(tmp_path / "a.parquet", field="body") == texts
    assert "a.parquet: no column 'text'; columns: n, body" in error_for(tmp_path / "a.parquet")


def test_a_damaged_parquet_file_is_an_error(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    assert "no.parquet: not a Parquet file" in error_for(write(tmp_path / "no.parquet", "plain text"))
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    assert "null.parquet row 2: field 'text' must be text, not null" in error_for(tmp_path / "null.parquet")
    pq.write_table(pa.table({"text": [f"{n} {POEM}" for n in range(5000)]}), tmp_path / "b.parquet", compression="gzip")
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    assert "b.parquet: the file is damaged or truncated" in error_for(write(tmp_path / "b.parquet", bytes(content)))


def test_invalid_utf8_in_parquet_is_reported_with_its_row(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 2, 5)))
    pq.write_table(
        pa.table({"text": pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"ok\x61\xff\x62"))}), tmp_path / "a.parquet"
    )
    assert "a.parquet row 2: not UTF-8 at byte 1" in error_for(tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet", errors="replace") == ["ok", "a\ufffdb"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_equals_plain_text(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    text = POEM * 50_000  # longer than one block
    half = text.encode()[: len(text.encode()) // 2]
    assert documents(write(tmp_path / f"a.txt.{suffix}", compress(text.encode()))) == [text]
    assert documents(write(tmp_path / f"a.jsonl.{suffix}", compress(json_lines("a", "b").encode()))) == ["a", "b"]
    appended = compress(half) + compress(text.encode()[len(half) :])
    assert documents(write(tmp_path / f"two.txt.{suffix}", appended)) == [text], "both concatenated archives must be read"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_damaged_archive_is_an_error_and_is_never_read_partially(tmp_path: Path, suffix: str) -> None:
    whole = COMPRESS[suffix](os.urandom(100_000).hex().encode())
    for name, content in {
        "cut": whole[: len(whole) // 2],
        "tail": whole[:-1],
        "plain": b"just text, whatever the name says",
    }.items():
        path = write(tmp_path / f"{name}.txt.{suffix}", content)
        assert error_for(path).startswith(f"{path}: the file is damaged or truncated: ")


def test_a_corrupt_gzip_file_is_an_error(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(POEM.encode() * 1000))
    content[len(content) // 2] ^= 0xFF
    assert "a.txt.gz: the file is damaged or truncated" in error_for(write(tmp_path / "a.txt.gz", bytes(content)))


def test_a_folder_is_walked_in_sorted_order_without_hidden_empty_and_binary_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.rst", "README"):
        write(tmp_path / name, name)
    write(tmp_path / "a.jsonl", json_lines("line 1", "line 2"))
    write(tmp_path / "c.txt.gz", gzip.compress(b"compressed"))
    for hidden in (".hidden", ".git/config", "a/.b/c.txt"):
        write(tmp_path / hidden, "hidden")
    write(tmp_path / "__init__.py", "")
    binary = [write(tmp_path / "image.png", b"\x89PNG\x00\x01"), write(tmp_path / "a/latin1.txt", b"caf\xe9 caf\xe9")]
    (tmp_path / "broken").symlink_to("nowhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    with Corpus([str(tmp_path)]) as corpus:
        assert joined(corpus) == ["README", "line 1", "line 2", "b.txt", "compressed", "a/z.md", "a/b/c.rst"]
        assert corpus.skipped == sorted(map(str, binary))


def test_cyclic_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "tree" / "a.txt", "one line")
    write(tmp_path / "tree" / "deep" / "b.txt", "another")
    (tmp_path / "tree" / "again").symlink_to(".")
    (tmp_path / "tree" / "deep" / "up").symlink_to("..")
    (tmp_path / "tree" / "deep" / "self").symlink_to("self")
    for pattern in ("tree/**/*.txt", "tree", "tree/**", "**/*.txt", "tree/*/*.txt"):
        assert sorted(documents(tmp_path / pattern)) == ["another", "one line"], pattern


def test_a_character_that_straddles_the_end_of_the_inspected_bytes_does_not_make_a_file_binary(tmp_path: Path) -> None:
    for shift in range(4):
        write(tmp_path / f"{shift}.txt", "x" * (8192 - shift) + "🙂")
    with Corpus([str(tmp_path)]) as corpus:
        assert corpus.skipped == []


def test_globs_lists_and_repeated_sources_keep_their_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "deep/d.txt"):
        write(tmp_path / name, name)
    assert documents(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert documents(tmp_path / "**/*.txt") == ["a.txt", "b.txt", "deep/d.txt"]
    assert documents(tmp_path / "c.md", tmp_path / "*.txt", tmp_path / "c.md") == ["c.md", "a.txt", "b.txt", "c.md"]


def test_a_file_whose_name_looks_like_a_glob_is_read_as_a_file(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "a[1]?.txt", "here")) == ["here"]


def test_standard_input_can_be_read_repeatedly(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(POEM.encode())

    monkeypatch.setattr(sys, "stdin", Stdin)
    with Corpus(["-"]) as corpus:
        assert joined(corpus) == joined(corpus) == [POEM]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="requires named pipes")
def test_a_pipe_can_be_read_repeatedly(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(POEM,))
    writer.start()
    with Corpus([str(pipe)]) as corpus:
        assert joined(corpus) == joined(corpus) == [POEM]
    writer.join()


def test_urls_are_read_through_fsspec(tmp_path: Path) -> None:
    import fsspec

    plain = write(tmp_path / "a.txt", POEM)
    lines = write(tmp_path / "b.jsonl.gz", gzip.compress(json_lines("one", "two").encode()))
    assert documents(plain.as_uri(), lines.as_uri()) == [POEM, "one", "two"]
    with fsspec.open("memory://here/c.md", "wb") as file:
        file.write(POEM.encode())
    assert documents("memory://here/c.md") == [POEM]


def test_a_url_query_is_not_part_of_the_file_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_errors_for_missing_sources_are_one_line_long(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "only").mkdir()
    write(tmp_path / "only/a.bin", b"\0\1")
    for source, expected in {
        f"{tmp_path}/none.txt": "none.txt: no such file or folder",
        f"{tmp_path}/*.none": "*.none: no such file or folder",
        f"{tmp_path}/empty": "empty: no text in this folder",
        f"{tmp_path}/only": "only: no text in this folder; it contains only files that are not text",
        f"file://{tmp_path}/none.txt": "none.txt: cannot be read: ",
        "nothing://at/all": "nothing://at/all: cannot be read: Protocol not known",
        "builtin:python-doc": "unknown builtin text; available: python-docs, python-docstrings (did you mean python-docs?)",
    }.items():
        message = error_for(source)
        assert expected in message
        assert "\n" not in message


@pytest.fixture
def _datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the `datasets` library offline and with a temporary cache."""
    library = pytest.importorskip("datasets", reason="requires tinylm[datasets]")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("_datasets")
def test_a_dataset_is_read_row_by_row_from_the_requested_split(tmp_path: Path) -> None:
    texts = [f"row {number},\r\n 世界" for number in range(10)]
    for split, part in {"train": texts[:8], "test": texts[8:]}.items():
        write(tmp_path / "data" / f"{split}.jsonl", "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in part))
    source = f"hf:{tmp_path}/data"
    assert documents(source) == documents(f"{source}:train") == texts[:8]
    assert documents(f"{source}:test") == texts[8:]
    assert documents(f"{source}:train[:25%]") == texts[:2]
    with Corpus([source]) as corpus:
        assert list(corpus.pieces()) == list(corpus.pieces()), "a dataset must be readable repeatedly"
    assert "row 1: field 'n' must be text, not 1" in error_for(source, field="n")
    assert "data: no column 'body'" in error_for(source, field="body")
    for wrong, expected in {f"{source}:nosuch": "cannot be read: Unknown split", f"hf:{tmp_path}/none": "cannot be read: "}.items():
        assert expected in error_for(wrong)


def test_the_error_for_a_missing_extra_includes_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {"parquet": write(tmp_path / "a.parquet", "x"), "zst": write(tmp_path / "a.txt.zst", "x"), "datasets": "hf:any"}
    for module in ("pyarrow", "datasets", "backports.zstd", "backports", "compression"):
        monkeypatch.setitem(sys.modules, module, None)
    for extra, path in paths.items():
        assert f'pip install "tinylm[{extra}]"' in error_for(path)


@pytest.mark.parametrize(
    "before", [0, 1, 1000, BLOCK_BYTES - 3, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES - 2]
)
def test_invalid_utf8_is_reported_with_the_file_and_the_exact_offset(tmp_path: Path, before: int) -> None:
    filling = ("é" * (before // 2) + "x" * (before % 2)).encode()
    for wrong in (b"\xff then more", "🙂".encode()[:3] + b"x", "🙂".encode()[:3], "é".encode()[:1]):
        content = filling + wrong
        with pytest.raises(UnicodeDecodeError) as reference:
            content.decode()
        path = write(tmp_path / "a.txt", content)
        assert error_for(path).startswith(f"{path}: not UTF-8 at byte {reference.value.start} (")
        assert documents(path, errors="replace") == [content.decode(errors="replace")]


@pytest.mark.parametrize("shift", range(5))
def test_a_character_that_spans_two_blocks_is_decoded(tmp_path: Path, shift: int) -> None:
    text = "x" * (BLOCK_BYTES - shift) + "🙂 and more"
    assert documents(write(tmp_path / "a.txt", text)) == [text]


MEMORY = """
import resource, sys
from tinylm.text.sources import Corpus
from tinylm.text.split import scan
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Corpus([sys.argv[1]]) as small, Corpus([sys.argv[2]]) as large:
    scan(small.pieces())
    before = peak()
    counts = scan(large.pieces())
    print(counts.characters, peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="requires Linux, where ru_maxrss is in kilobytes")
@pytest.mark.parametrize("unit", ["x", "word "])
def test_a_fifty_megabyte_line_is_streamed_in_constant_memory(tmp_path: Path, unit: str) -> None:
    small = write(tmp_path / "small.txt", unit * (4_000_000 // len(unit)))
    large = write(tmp_path / "large.txt", unit * (50_000_000 // len(unit)))
    command = [sys.executable, "-c", MEMORY, str(small), str(large)]
    characters, grown = map(int, subprocess.run(command, capture_output=True, check=True).stdout.split())
    assert characters == 50_000_000
    assert grown < 8_000, "memory must grow by less than 8 MB for 46 MB more text"


def test_many_sources_are_described_briefly() -> None:
    assert describe(["a", "b"]) == "a, b"
    assert describe(["a", "b", "c", "d"]) == "a and 3 more"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Start a local web server. Return its URL and the folder that it serves."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", folder
        server.shutdown()


def test_text_from_a_web_server_can_be_read_repeatedly(web: tuple[str, Path]) -> None:
    address, folder = web
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    with Corpus([f"{address}/a.jsonl"]) as corpus:
        (folder / "a.jsonl").unlink()
        assert [piece.text for piece in corpus.pieces()] == [piece.text for piece in corpus.pieces()] == ["one", "two"]


def test_a_missing_web_page_is_an_error_with_its_url(web: tuple[str, Path]) -> None:
    address, _ = web
    with pytest.raises(InputError, match=re.escape(f"{address}/nothing.txt: cannot be read")):
        Corpus([f"{address}/nothing.txt"])
