"""Sentence pairs: the `data:` section for `format: pairs`, and the `translation` objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Tag

from tinylm.recipe.base import DataVariant, ObjectiveVariant, Section
from tinylm.recipe.values import OpenShare, OptionalPath, OptionalWidth, Positive, RequiredPath, ShareBelowOne, Sources

CATALOG = "catalog:"
"""Prefix of a source that consists of a language's installed message catalogs, such as `catalog:de`."""
TOY = "toy:"
"""Prefix of generated sources, such as `toy:reverse`."""


class AlignedFiles(Section):
    """Two text files. Each line in the target file is the translation of the same line in the source file."""

    source: RequiredPath
    """The file to translate from."""
    target: RequiredPath
    """The file to translate to."""


class PairSources(Section):
    """Sentence pairs in separate files."""

    sources: Sources
    """The sentence pairs. The short form `heldout: b.jsonl` is equivalent."""


class PairShare(Section):
    """Set aside a share of the sentence pairs."""

    share: OpenShare = 0.1
    """The share of the pairs."""
    by: Literal["document", "tail"] = "document"
    """Which pairs to set aside. `document`: whole documents, chosen by a hash of their name. A document is a message catalog, or
    all pairs with the same `document` field. Without this field, every 100 consecutive pairs form a document. `tail`: the last
    pairs."""


def _expand(value: object) -> object:
    if isinstance(value, (str, list, tuple)):
        return {"sources": value}
    return {"share": value} if isinstance(value, float) else value


def _choose(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, AlignedFiles) or (isinstance(value, dict) and {"source", "target"} & value.keys()):
        return "aligned"
    return "sources" if isinstance(value, PairSources) or (isinstance(value, dict) and "sources" in value) else "share"


_ALIGNED = Annotated[AlignedFiles, Tag("aligned")]
_SOURCES = Annotated[PairSources, Tag("sources")]
_SHARE = Annotated[PairShare, Tag("share")]
Pairs = Annotated[_ALIGNED | _SOURCES, Discriminator(_choose), BeforeValidator(_expand)]
PairPart = Annotated[_ALIGNED | _SOURCES | _SHARE, Discriminator(_choose), BeforeValidator(_expand)]
OptionalPairPart = Annotated[
    _ALIGNED | _SOURCES | _SHARE | Annotated[None, Tag("none")], Discriminator(_choose), BeforeValidator(_expand)
]


class PairsSection(DataVariant):
    """Sentences and their translations: records, tables, two aligned files, .po and .mo files, or `catalog:LANGUAGE`.

    `catalog:de` reads the German message catalogs of installed programs. Each message has the fields `source` (English), `target`,
    `language`, `en`, and a field named after the language, here `de`. `toy:reverse` generates letter sequences and their reversals.
    """

    default_objective = "translation"

    train: Pairs
    """The sentence pairs to train on: a SOURCE, a list of them, or `{source: a.de, target: a.en}`."""
    heldout: PairPart = PairShare()
    """The sentence pairs to evaluate on: a share of the documents, or other files."""
    test: OptionalPairPart = None
    """Sentence pairs that training never uses, not even to choose the best checkpoint: a share, or other files. `tinylm eval
    --split test` evaluates on them. `null` means none."""
    source: str = "source"
    """The field or column that contains the sentence to translate."""
    target: str = "target"
    """The field or column that contains the translation."""
    document: str = "document"
    """The field or column that contains the name of a pair's document, if there is one."""
    language: OptionalPath = None
    """The field or column that contains the target language. Each source sentence then starts with a control token such as `<2de>`,
    so that one model can translate into several languages. `null` means a single language."""
    max_length_ratio: Positive = 4.0
    """Skip a pair if one side has more than this many times the characters of the other side. Pairs are kept if both sides have at
    most 20 characters."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What to do with repeated training pairs."""
    overlap: Literal["drop", "keep"] = "drop"
    """What to do with held-out and test pairs whose source sentence also occurs in the training pairs."""
    batch_tokens: OptionalWidth = None
    """Maximum number of source and target tokens in a batch, including padding. A batch of short sentences then contains more pairs
    than one of long sentences, but at most `training.global_batch_size`. `null` means `training.global_batch_size` pairs in every
    batch."""
    vocabulary: Literal["shared", "separate"] = "shared"
    """`shared`: learn one tokenizer from both sides. `separate`: learn one tokenizer per side."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8. `strict` reports an error, and `replace` substitutes U+FFFD."""
    format: Literal["pairs"] = "pairs"
    """What the sources contain: `pairs` means sentences and their translations."""

    def sources(self) -> dict[str, tuple[str, ...]]:
        parts = {"train": self.train, "heldout": self.heldout, "test": self.test}
        return {key: paths_of(part) for key, part in parts.items() if isinstance(part, (AlignedFiles, PairSources))}


def paths_of(part: AlignedFiles | PairSources) -> tuple[str, ...]:
    """Return the sources of a section as a tuple."""
    return (part.source, part.target) if isinstance(part, AlignedFiles) else part.sources


class TranslationObjective(ObjectiveVariant):
    """Predict each token of a translation from the source sentence and the tokens before it."""

    data_formats = ("pairs",)
    filled_in = ("source_vocab_size",)

    name: Literal["translation"] = "translation"
    label_smoothing: ShareBelowOne = 0.1
    """The share of the target probability that is spread uniformly over the vocabulary in the training loss (Szegedy et al. 2016).
    The held-out loss does not use label smoothing."""
    select: Literal["loss", "bleu"] = "loss"
    """The metric that selects the best checkpoint: the held-out loss, or the BLEU of greedy translations of the held-out
    sentences, which takes longer."""
    source_vocab_size: OptionalWidth = None
    """The size of the source vocabulary with `data.vocabulary: separate`. Training sets this key."""
