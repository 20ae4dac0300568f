"""Sentence pairs are read from files and message catalogs, cleaned, and split by document."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from pairs import write_jsonl

from tinylm.errors import InputError
from tinylm.recipe.pairs import AlignedFiles, PairSources, PairsSection
from tinylm.reporting import CollectingReporter
from tinylm.text import catalogs
from tinylm.text.messages import clean_message, placeholders
from tinylm.text.pairs import SentencePair, read_pairs, split

PO = r"""
msgid ""
msgstr ""
"Language: de\n"
"Content-Type: text/plain; charset=UTF-8\n"
"Plural-Forms: nplurals=2; plural=(n != 1);\n"

msgid "_File"
msgstr "_Datei"

msgctxt "verb"
msgid "Open"
msgstr "Öffnen"

msgid "one file"
msgid_plural "%d files"
msgstr[0] "eine Datei"
msgstr[1] "%d Dateien"

msgid "two\n"
"lines"
msgstr "zwei\n"
"Zeilen"

#, fuzzy
msgid "fuzzy"
msgstr "unscharf"

msgid "Deleted %s"
msgstr "Gelöscht"

msgid "OK"
msgstr "OK"

msgid "untranslated"
msgstr ""

#~ msgid "obsolete"
#~ msgstr "veraltet"
"""


def _read(*sources: str | Path, **keys: str) -> tuple[list[SentencePair], CollectingReporter]:
    section = PairsSection(train=PairSources(sources=tuple(map(str, sources))), **keys)  # type: ignore[arg-type]
    reporter = CollectingReporter()
    return read_pairs(section, section.train, reporter), reporter


def _texts(pairs: list[SentencePair]) -> list[tuple[str, str]]:
    return [(pair.source, pair.target) for pair in pairs]


@pytest.fixture
def po_file(tmp_path: Path) -> Path:
    path = tmp_path / "program.po"
    path.write_text(PO, encoding="utf-8")
    return path


def test_catalog_messages_are_cleaned_and_plurals_are_included(po_file: Path) -> None:
    pairs, reporter = _read(po_file)
    assert _texts(pairs) == [
        ("File", "Datei"),
        ("Open", "Öffnen"),
        ("one file", "eine Datei"),
        ("%d files", "%d Dateien"),
        ("two lines", "zwei Zeilen"),
    ]
    assert {pair.document for pair in pairs} == {"program"}
    assert "2 fuzzy or obsolete" in reporter.notes[0]
    assert "1 different placeholders" in reporter.notes[0]
    assert "1 untranslated" in reporter.notes[0]


def test_a_compiled_catalog_has_the_same_messages(po_file: Path, tmp_path: Path) -> None:
    polib = pytest.importorskip("polib")
    polib.pofile(str(po_file)).save_as_mofile(str(tmp_path / "program.mo"))
    assert sorted(_texts(_read(tmp_path / "program.mo")[0])) == sorted(_texts(_read(po_file)[0]))


def test_an_invalid_plural_rule_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "program.po"
    path.write_text(PO.replace("(n != 1)", "n/0"), encoding="utf-8")
    assert _texts(_read(path)[0])[2:4] == [("one file", "eine Datei"), ("%d files", "%d Dateien")]


def test_catalogs_are_read_from_folders_globs_and_compressed_files(po_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "po"
    folder.mkdir()
    (folder / "editor.po.gz").write_bytes(gzip.compress(po_file.read_bytes()))
    (folder / "viewer.po").write_text(PO, encoding="utf-8")
    write_jsonl(folder / "more.jsonl", [{"source": "yes", "target": "ja"}])
    for source in (folder, folder / "*.po*"):
        pairs, _ = _read(source)
        assert {pair.document for pair in pairs} - {"more.jsonl#0"} == {"editor", "viewer"}
        assert _texts(pairs)[:5] == _texts(_read(po_file)[0])
    assert ("yes", "ja") in _texts(_read(folder)[0])
    (folder / "LINGUAS").write_text("de\n", encoding="utf-8")
    assert _texts(_read(folder)[0])[-1] == ("yes", "ja")


def test_languages_can_be_used_as_field_names(po_file: Path) -> None:
    pairs, _ = _read(po_file, source="de", target="en")
    assert ("Datei", "File") in _texts(pairs)
    with pytest.raises(InputError, match=r"no field 'fr'; fields: source, target, document, language, en, de"):
        _read(po_file, target="fr")


def test_installed_catalogs_are_grouped_by_program(po_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polib = pytest.importorskip("polib")
    folder = tmp_path / "locale" / "de" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    polib.pofile(str(po_file)).save_as_mofile(str(folder / "editor.mo"))
    (folder / "broken.mo").write_bytes(b"\xde\x12\x04\x95\0\0")
    monkeypatch.setattr(catalogs, "_locale_folders", lambda: [str(tmp_path / "locale")])
    monkeypatch.setattr(catalogs, "_package_folders", lambda: [])
    pairs, reporter = _read("catalog:de")
    assert {pair.document for pair in pairs} == {"editor"}
    assert any("skipped 1 unreadable catalogs" in warning for warning in reporter.warnings)
    with pytest.raises(InputError, match=r"no message catalogs for the language 'fr' .* \(catalogs are installed for de\)"):
        _read("catalog:fr")
    with pytest.raises(InputError, match=r"'DE' are installed \(did you mean de\?\)"):
        _read("catalog:DE")


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("E_xit", "_Beenden", ("Exit", "Beenden")),
        ("&Save", "&Speichern", ("Save", "Speichern")),
        ("_Open", "開く(_O)", ("Open", "開く")),
        ("_Open...", "Ö_ffnen...", ("Open...", "Öffnen...")),
        ("&Save As...", "Speichern &unter …", ("Save As...", "Speichern unter …")),
        ("Save _as...", "_Speichern unter...", ("Save as...", "Speichern unter...")),
        ("Cut (_X)...", "切り取り(_X)...", ("Cut...", "切り取り...")),
        ("_Replace/Insert", "Ersetzen/_Einfügen", ("Replace/Insert", "Ersetzen/Einfügen")),
        ("<b>_Bold</b>", "<b>_Fett</b>", ("<b>Bold</b>", "<b>Fett</b>")),
        ('<a href="a_b">more</a>', '<a href="a_b">mehr</a>', ('<a href="a_b">more</a>', '<a href="a_b">mehr</a>')),
        ("file_name.txt...", "file_name.txt...", ("file_name.txt...", "file_name.txt...")),
        ("a/b_c", "a/b_c", ("a/b_c", "a/b_c")),
        ("in src/_core", "in src/_core", ("in src/_core", "in src/_core")),
        ("?a=1&b=2", "?a=1&b=2", ("?a=1&b=2", "?a=1&b=2")),
        ("a &amp; b", "a &amp; b", ("a &amp; b", "a &amp; b")),
        ("set use_ssl", "setze use_ssl", ("set use_ssl", "setze use_ssl")),
        ("in ~/.config", "in ~/.config", ("in ~/.config", "in ~/.config")),
        ("MAX_SIZE too big", "MAX_SIZE zu groß", ("MAX_SIZE too big", "MAX_SIZE zu groß")),
    ],
)
def test_accelerator_keys_are_removed_and_identifiers_are_kept(source: str, target: str, expected: tuple[str, str]) -> None:
    assert clean_message(source, target) == expected


def test_placeholders_can_be_in_a_different_order() -> None:
    assert placeholders("%s of %d") == placeholders("%2$d von %1$s")
    assert placeholders("{name} 100%") != placeholders("100%")


def test_aligned_files_must_have_the_same_number_of_lines(tmp_path: Path) -> None:
    (tmp_path / "a.de").write_text("eins\nzwei\n", encoding="utf-8")
    (tmp_path / "a.en").write_text("one\ntwo\n", encoding="utf-8")
    part = AlignedFiles(source=str(tmp_path / "a.de"), target=str(tmp_path / "a.en"))
    section = PairsSection(train=part)
    assert _texts(read_pairs(section, part, CollectingReporter())) == [("eins", "one"), ("zwei", "two")]
    (tmp_path / "a.en").write_text("one\ntwo\nthree\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.de has 2 lines and .*a\.en has 3"):
        read_pairs(section, part, CollectingReporter())


def test_whitespace_is_the_same_as_in_a_sentence_to_translate(tmp_path: Path) -> None:
    (tmp_path / "a.de").write_bytes(b"eins\r\nzwei\r\n")
    (tmp_path / "a.en").write_bytes(b"one\r\ntwo\r\n")
    part = AlignedFiles(source=str(tmp_path / "a.de"), target=str(tmp_path / "a.en"))
    assert _texts(read_pairs(PairsSection(train=part), part, CollectingReporter())) == [("eins", "one"), ("zwei", "two")]
    records = [{"source": "  guten   Tag\n", "target": "good\tday\nto you "}]
    assert _texts(_read(write_jsonl(tmp_path / "a.jsonl", records))[0]) == [("guten Tag", "good day to you")]


def test_a_folder_is_not_an_aligned_file(tmp_path: Path) -> None:
    part = AlignedFiles(source=str(tmp_path), target=str(tmp_path))
    with pytest.raises(InputError, match="is a folder, not a file"):
        read_pairs(PairsSection(train=part), part, CollectingReporter())


def test_pairs_with_an_empty_side_or_extreme_length_ratio_are_skipped_and_counted(tmp_path: Path) -> None:
    records = [
        {"source": "guten Tag", "target": "hello"},
        {"source": " ", "target": "nothing"},
        {"source": "kurz", "target": "very " * 30},
    ]
    pairs, reporter = _read(write_jsonl(tmp_path / "a.jsonl", records))
    assert _texts(pairs) == [("guten Tag", "hello")]
    assert "skipped 2 of 3 pairs: 1 with an empty side, 1 with a length ratio above 4" in reporter.warnings[0]


def test_pairs_are_read_from_the_chosen_columns_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("de\ten\teins\nja\tyes\t1\n", encoding="utf-8")
    assert _texts(_read(tmp_path / "a.tsv", source="de", target="en")[0]) == [("ja", "yes")]


def test_every_pair_must_have_a_target_language_if_there_is_a_language_field(tmp_path: Path) -> None:
    records = [{"source": "ja", "target": "yes", "lang": "en"}, {"source": "ja", "target": "oui", "lang": ""}]
    with pytest.raises(InputError, match=r"a\.jsonl:2: field 'lang' is empty, but it must be the target language"):
        _read(write_jsonl(tmp_path / "a.jsonl", records), language="lang")
    with pytest.raises(InputError, match="toy:reverse: aligned files and generated pairs have no target language"):
        _read("toy:reverse", language="lang")


def test_a_plain_text_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("just text\n", encoding="utf-8")
    with pytest.raises(InputError, match="has no sentence pairs"):
        _read(tmp_path / "a.txt")


def test_a_split_keeps_documents_together() -> None:
    pairs = [SentencePair(f"s{i}", f"t{i}", f"d{i // 7}") for i in range(140)]
    parts = split(pairs, {"heldout": (0.1, "document"), "test": (0.1, "document")})
    documents = {part: {pair.document for pair in members} for part, members in parts.items()}
    assert sum(map(len, parts.values())) == 140
    assert not documents["train"] & documents["heldout"]
    assert not documents["heldout"] & documents["test"]
    assert 14 <= len(parts["heldout"]) <= 21
    assert split(pairs, {"heldout": (0.1, "tail")})["heldout"] == pairs[-14:]
    with pytest.raises(InputError, match="none are left for training"):
        split(pairs[:7], {"heldout": (0.1, "document")})
