"""Documents are read from one field of each record, or from several fields combined by a template."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from pathlib import Path

import pytest

from tinylm.errors import InputError
from tinylm.text.sources import Corpus


def documents(*sources: Path, **options: str) -> list[str]:
    with Corpus([str(source) for source in sources], **options) as corpus:  # type: ignore[arg-type]
        return [piece.text for piece in corpus.pieces()]


def error_for(*sources: Path, **options: str) -> str:
    with pytest.raises(InputError) as caught:
        documents(*sources, **options)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


TICKETS = 'id,category,body\n1,"net, lan","two\nlines and a ""quote"""\n\n2,disk,full\n'


def test_each_table_row_is_a_document(tmp_path: Path) -> None:
    table = write(tmp_path / "a.csv", TICKETS)
    assert documents(table, field="body") == ['two\nlines and a "quote"', "full"]
    assert documents(table, template="{category}: {body}") == ['net, lan: two\nlines and a "quote"', "disk: full"]
    assert documents(write(tmp_path / "a.csv.gz", gzip.compress(TICKETS.encode())), field="category") == ["net, lan", "disk"]


def test_tables_of_random_text_written_by_the_csv_module_are_read_unchanged(tmp_path: Path) -> None:
    generator = random.Random(0)
    rows = [["".join(generator.choices('a,;\t"\n\r é語', k=generator.randrange(9))) for _ in range(3)] for _ in range(300)]
    for suffix, dialect in ((".csv", "excel"), (".tsv", "excel-tab")):
        written = io.StringIO(newline="")
        csv.writer(written, dialect).writerows([["id", "text", "note"], *rows])
        path = write(tmp_path / f"t{suffix}", "\ufeff" + written.getvalue())
        assert documents(path, template="{text}|{note}") == [f"{text}|{note}" for _, text, note in rows]


def test_semicolon_delimiters_are_detected(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "s.csv", "id;text\n1;a, b\n")) == ["a, b"]


def test_a_long_document_in_a_table_is_read_completely(tmp_path: Path) -> None:
    text = "word " * 60_000
    assert "".join(documents(write(tmp_path / "l.csv", f"text\n{text}\n"))) == text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("id,body\n1,x\n", "a.csv: no column 'text'; columns: id, body (choose one with --field"),
        ("id,tekst\n1,x\n", "no column 'text'; columns: id, tekst (did you mean tekst?"),
        ("text,text\n1,x\n", "a.csv: has 2 columns named 'text'"),
        ("id,text\n1,x\n2\n", "a.csv:3: 1 values for 2 columns"),
        ('id,text\n1,"open\n', "a.csv:2: not a valid table: unexpected end of data"),
        ('id,text\n1,"a" b\n', "a.csv:2: not a valid table"),
        (b"id,text\n1,caf\xe9\n", "a.csv: not UTF-8 at byte 13"),
    ],
)
def test_an_invalid_table_is_reported_with_the_line_number(tmp_path: Path, content: str | bytes, expected: str) -> None:
    assert expected in error_for(write(tmp_path / "a.csv", content))


def test_quotes_in_a_tsv_file_are_text_if_they_do_not_enclose_values(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw.tsv", 'en\tde\n"Hi" he said\t"Hallo" sagte er\n5" pipe\tein "Rohr\n"x"\ty\n')
    assert documents(raw, template="{en}|{de}") == ['"Hi" he said|"Hallo" sagte er', '5" pipe|ein "Rohr', '"x"|y']
    assert documents(write(tmp_path / "raw.tsv.gz", gzip.compress(raw.read_bytes())), field="de")[1] == 'ein "Rohr'
    assert documents(write(tmp_path / "quoted.tsv", 'en\tde\n"a ""b"""\t"c\td"\n'), template="{en}|{de}") == ['a "b"|c\td']
    assert "a.tsv:2: 1 values for 2 columns" in error_for(write(tmp_path / "a.tsv", 'en\tde\n"a"\n'), field="en")


def test_a_table_without_column_names_is_reported(tmp_path: Path) -> None:
    message = error_for(write(tmp_path / "a.tsv", "Guten Tag\tGood day\n"))
    assert "no column 'text'; columns: Guten Tag, Good day" in message
    assert "the first line must contain the column names" in message


def test_a_template_combines_jsonl_fields(tmp_path: Path) -> None:
    records = [{"n": 3, "ok": True, "a b": "x", "t": "{n}"}, {"n": 0.5, "ok": False, "a b": "", "t": "y"}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    assert documents(path, template="{{{n}}} {ok} {a b}/{t}") == ["{3} true x/{n}", "{0.5} false /y"]
    assert "a.jsonl:1: no field 'title'; fields: n, ok, a b, t (correct --template" in error_for(path, template="{title}")
    assert "field 'n' must be text, not 3" in error_for(path, field="n")
    write(path, '{"t": null}\n')
    assert "a.jsonl:1: field 't' must be text, not null" in error_for(path, template="- {t}")


def test_a_template_combines_parquet_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="requires tinylm[parquet]")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1, 2], "body": ["é", "b"]}), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet", template="{id}: {body}, {body}") == ["1: é, é", "2: b, b"]


@pytest.mark.parametrize("template", ["", "no field", "{", "}", "a {} b", "{a", "a}", "{a{b}}"])
def test_an_invalid_template_is_an_error(tmp_path: Path, template: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": "x"}\n')
    assert error_for(path, template=template).startswith(f"--template: {template!r} ")


def test_choosing_a_field_of_plain_text_is_an_error(tmp_path: Path) -> None:
    text, table = write(tmp_path / "a.txt", "x"), write(tmp_path / "a.csv", "body\ny\n")
    assert "a.txt: --field (data.field) has no effect on plain text" in error_for(text, field="body")
    assert "--template (data.template) has no effect on plain text" in error_for(text, template="{body}")
    assert documents(text, table, field="body") == ["x", "y"]
    assert documents(text) == ["x"]


def test_empty_documents_are_kept_on_request(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": ""}\n{"text": "one"}\n{"text": ""}\n')
    with Corpus([str(path)]) as corpus:
        assert [piece.text for piece in corpus.pieces(keep_empty=True)] == ["", "one", ""]
        assert [piece.text for piece in corpus.pieces()] == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\xff", "is a PNG image, not UTF-8 text"),
        ("a.jpeg", b"\xff\xd8\xff\xe0 JFIF", "is a JPEG image"),
        (
            "a.txt",
            b"%PDF-1.7\n%\xe2\xe3",
            "is a PDF document, not UTF-8 text (convert it to text first, for",
        ),
        ("a.txt", gzip.compress(b"text", mtime=0), "is gzip-compressed, not UTF-8 text (add .gz to the file name)"),
        ("a.txt", "text".encode("utf-16"), "is UTF-16 text, not UTF-8 text (convert it with: iconv"),
        ("a.docx", b"PK\x03\x04\0\xff", "is a ZIP archive, or a document such as .docx"),
    ],
)
def test_a_file_that_is_not_text_is_identified(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    assert expected in error_for(write(tmp_path / name, content))


def test_text_that_begins_like_another_format_is_text(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "a.txt", "BM is short for bookmark")) == ["BM is short for bookmark"]
