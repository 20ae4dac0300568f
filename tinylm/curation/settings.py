"""The settings of a preparation, which determine its result."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from tinylm.curation.cleaning import LINE_RULES
from tinylm.curation.minhash import MinHash
from tinylm.curation.rules import RULES, Rule
from tinylm.data.prepare import load_tokenizer_file
from tinylm.errors import InputError, did_you_mean
from tinylm.recipe.schema import BpeTokenizer, FileTokenizer, TokenizerSection

VERSION = 2
"""Increased when the result for the same settings and text changes, so that the work of an earlier version is not continued."""
GROUPS = ("gopher", "c4", "fineweb")
STEPS = {
    "clean": "normalization of the text",
    "exact_duplicates": "documents whose text is the same as that of an earlier document",
    "near_duplicates": "documents whose word 5-grams are similar to those of an earlier document",
    "contamination": "documents that occur in both the training text and the held-out text",
}
"""The steps, other than quality rules, that can be switched off, with what they remove."""

DEFAULT_TOKENIZER = BpeTokenizer(kind="bpe")
"""The default of recipes."""


@dataclass(frozen=True)
class Settings:
    """What to prepare and how. Raises `InputError` for an unknown rule or step in `without`."""

    sources: tuple[str, ...]
    """The text: files, folders, globs, URLs or builtin:NAME."""
    heldout: tuple[str, ...] = ()
    """The sources of the held-out text, or () to hold out a fraction of the documents."""
    heldout_share: float = 0.1
    """The fraction of the documents to hold out if `heldout` is empty, chosen by a hash of their text."""
    contaminated: Literal["heldout", "train"] = "heldout"
    """The part from which documents are removed that occur in both parts."""
    without: tuple[str, ...] = ()
    """The rules, groups of rules and steps that are switched off."""
    bands: int = 14
    """Number of bands of MinHash values. Near-duplicates agree in all values of at least one band."""
    rows: int = 8
    """Number of MinHash values per band."""
    tokenizer: TokenizerSection = DEFAULT_TOKENIZER
    """The tokenizer to train on the kept text, or a file."""
    field: str = "text"
    """The field with the text in .jsonl and .parquet files."""
    template: str | None = None
    """Text with fields in braces that combines several fields, instead of `field`."""
    errors: str = "strict"
    """What happens to bytes that are not UTF-8: `strict` raises an error and `replace` replaces them."""

    def __post_init__(self) -> None:
        known = [*STEPS, *GROUPS, *(rule.name for rule in RULES), *(rule.name for rule in LINE_RULES)]
        for name in self.without:
            if name not in known:
                hint = did_you_mean(name, known) or "--list-rules lists the rules"
                raise InputError(f"no such rule or step {name!r}", where="--without", hint=hint)

    def uses(self, name: str) -> bool:
        """Whether a rule or step is switched on."""
        return name not in self.without and name.partition("_")[0] not in self.without

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules for documents that are switched on."""
        return tuple(rule for rule in RULES if self.uses(rule.name))

    @property
    def line_rules(self) -> tuple[str, ...]:
        """The rules for lines that are switched on."""
        return tuple(rule.name for rule in LINE_RULES if self.uses(rule.name))

    @property
    def minhash(self) -> MinHash:
        """The hash functions for near-duplicates."""
        return MinHash(self.bands, self.rows)

    @cached_property
    def analysis_key(self) -> str:
        """A hash of the settings that determine how single documents are analyzed."""
        values = self._values()
        names = ("sources", "heldout", "field", "template", "errors", "bands", "rows")
        steps = ["clean"] if self.uses("clean") else []
        return _hash([VERSION, *(values[name] for name in names), steps, self.line_rules, [rule.name for rule in self.rules]])

    @cached_property
    def key(self) -> str:
        """A hash of all settings."""
        tokenizer = load_tokenizer_file(self.tokenizer).fingerprint if isinstance(self.tokenizer, FileTokenizer) else None
        return _hash([VERSION, self._values(), tokenizer])

    def _values(self) -> dict[str, Any]:
        return {**asdict(self), "tokenizer": self.tokenizer.model_dump(), "without": sorted(self.without)}

    def as_dict(self) -> dict[str, Any]:
        """Return the settings for the manifest."""
        names = ("heldout_share", "contaminated", "without", "bands", "rows", "field", "template", "errors")
        return {name: value for name, value in self._values().items() if name in names}


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
