"""Read sentence pairs from the message catalogs of programs: all .mo files installed on this machine, or single .po and .mo files.

The messages of a program are in English, and each catalog contains their translations into one language. `polib` reads the files.
"""

from __future__ import annotations

import gettext
import os
import re
import struct
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tinylm.errors import InputError, did_you_mean, missing_extra
from tinylm.text.files import TextFile, open_bytes, read_lines
from tinylm.text.messages import clean_message, placeholders

SUFFIXES = (".po", ".mo")
_LANGPACKS = "/usr/share/locale-langpack"
_MESSAGES = "LC_MESSAGES"
_LISTED_LANGUAGES = 20
"""Maximum number of languages in an error message."""
_ONE, _SEVERAL = 1, 5
"""The English singular is paired with the translation for the first number, and the plural with the one for the second."""


@dataclass
class CatalogCounts:
    """What was read from catalogs, and which messages were skipped."""

    catalogs: int = 0
    messages: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """The number of skipped messages by reason."""
    unreadable: list[str] = field(default_factory=list)
    """Installed catalogs that are damaged."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a program, and its translation."""

    source: str
    target: str
    catalog: str
    """The name of the catalog, which is the same in every language."""
    language: str

    def fields(self) -> dict[str, str]:
        """Return the message as a record. The texts are also available under the language names, for example `en` and `de`."""
        values = {"source": self.source, "target": self.target, "document": self.catalog, "language": self.language}
        return {**values, "en": self.source, self.language or "target": self.target}


def installed_messages(language: str, counts: CatalogCounts) -> Iterator[Message]:
    """Yield the messages from all installed catalogs for a language. Raises `InputError` if there are none."""
    catalogs = find_catalogs(language)
    if not catalogs:
        available = installed_languages()
        listed, more = ", ".join(available[:_LISTED_LANGUAGES]), len(available) - _LISTED_LANGUAGES
        installed = f"catalogs are installed for {listed}" + (f" and {more} more" if more > 0 else "")
        hint = did_you_mean(language, available) or (installed if available else "install a language pack, or use .po files")
        raise InputError(f"no message catalogs for the language {language!r} are installed", where=f"catalog:{language}", hint=hint)
    for name, path in catalogs:
        try:
            yield from read_catalog(path, counts, catalog=name, language=language)
        except InputError as error:
            counts.unreadable.append(str(error))


def find_catalogs(language: str) -> list[tuple[str, str]]:
    """Return the name and path of each installed catalog for a language, sorted by name. Duplicate names are listed once."""
    found: dict[str, str] = {}
    for root in _locale_folders():
        folder = os.path.join(root, language, _MESSAGES)
        for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            if file.endswith(".mo"):
                found.setdefault(file.removesuffix(".mo"), os.path.join(folder, file))
    for packages in _package_folders():
        for folder, _, files in os.walk(packages):
            if os.path.basename(folder) == _MESSAGES and os.path.basename(os.path.dirname(folder)) == language:
                package = os.path.relpath(folder, packages).split(os.sep)[0]
                for file in files:
                    if file.endswith(".mo"):
                        found.setdefault(f"{package}/{file.removesuffix('.mo')}", os.path.join(folder, file))
    return sorted(found.items())


def installed_languages() -> list[str]:
    """Return the languages that have catalogs in the system's locale folders."""
    languages = set()
    for root in _locale_folders():
        for name in os.listdir(root):
            folder = os.path.join(root, name, _MESSAGES)
            if os.path.isdir(folder) and any(file.endswith(".mo") for file in os.listdir(folder)):
                languages.add(name)
    return sorted(languages)


def _locale_folders() -> list[str]:
    prefixes = [sys.prefix, sys.base_prefix, "/usr", "/usr/local", "/opt/homebrew"]
    folders = [os.path.join(prefix, "share", "locale") for prefix in dict.fromkeys(prefixes)]
    return [folder for folder in dict.fromkeys([*folders, _LANGPACKS]) if os.path.isdir(folder)]


def _package_folders() -> list[str]:
    return [
        folder for folder in dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")) if os.path.isdir(folder)
    ]


def read_catalog(path: str, counts: CatalogCounts, *, catalog: str | None = None, language: str | None = None) -> Iterator[Message]:
    """Yield the cleaned messages of a .po or .mo file, which may be compressed.

    If `language` is None, the language is read from the file header. Fuzzy, obsolete, empty and untranslated messages are
    skipped, and so are translations with different placeholders. Message contexts are dropped. If a message has plural forms,
    its singular is paired with the form for 1 and its plural with the form for 5.
    """
    opened = _open(path)
    name = catalog or re.sub(r"\.[pm]o(\.\w+)?$", "", os.path.basename(path), flags=re.IGNORECASE)
    language = language or opened.metadata.get("Language", "")
    counts.catalogs += 1
    for entry in opened:
        if getattr(entry, "obsolete", False) or getattr(entry, "fuzzy", False) or not entry.msgid:
            counts.skipped["fuzzy or obsolete"] += bool(entry.msgid)
            continue
        for source, target in _texts(entry, opened.metadata.get("Plural-Forms", "")):
            counts.messages += 1
            source, target = clean_message(source, target)
            reason = _reason_to_skip(source, target)
            if reason is not None:
                counts.skipped[reason] += 1
            else:
                yield Message(source, target, name, language)


def _reason_to_skip(source: str, target: str) -> str | None:
    if not source or not target:
        return "empty"
    if source == target:
        return "untranslated"
    if not any(character.isalpha() for character in source):
        return "without letters"
    return "different placeholders" if placeholders(source) != placeholders(target) else None


def _texts(entry: Any, plural_forms: str) -> Sequence[tuple[str, str]]:
    if not entry.msgid_plural:
        return [(entry.msgid, entry.msgstr)]
    forms = {int(number): text for number, text in entry.msgstr_plural.items()}
    if not forms:
        return [(entry.msgid, "")]
    one, several = _form_indexes(plural_forms)
    plural = forms.get(several, forms[max(forms)])
    if len(forms) == 1:  # the language does not distinguish singular and plural
        return [(entry.msgid_plural, plural)]
    return [(entry.msgid, forms.get(one, forms[min(forms)])), (entry.msgid_plural, plural)]


def _form_indexes(header: str) -> tuple[int, int]:
    """Return the indexes of the plural forms for the numbers 1 and 5. If the rule is not valid, the first is 0 and the second 1.

    `header` is the Plural-Forms header of the catalog, for example `nplurals=2; plural=(n != 1);`.
    """
    _, _, expression = header.partition("plural=")
    try:
        rule = gettext.c2py(expression.split(";")[0].strip() or "n != 1")
        return rule(_ONE), rule(_SEVERAL)
    except (ValueError, RecursionError, ArithmeticError):
        return 0, 1


def _open(path: str) -> Any:
    try:
        import polib
    except ImportError:
        raise missing_extra("translate", "reading message catalogs") from None
    file = TextFile.at(path, path)
    try:
        with _decompressed(file) as plain:
            return polib.mofile(plain) if file.suffix == ".mo" else polib.pofile(plain)
    except (OSError, ValueError, LookupError, struct.error, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"not a readable message catalog: {reason}", where=path) from None


@contextmanager
def _decompressed(file: TextFile) -> Iterator[str]:
    """Yield the path of a file, or of a temporary decompressed copy, because `polib` reads only plain files."""
    if file.compression is None:
        yield file.path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "catalog")
        with open_bytes(file) as stream, open(copy, "wb") as plain:
            plain.writelines(read_lines(file.name, stream))
        yield copy
