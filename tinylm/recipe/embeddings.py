"""The recipe of `kind: embeddings`: which text, which units get a vector, which method learns them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tinylm.recipe.schema import Section, plain, written
from tinylm.recipe.values import (
    Count,
    CountOrZero,
    Flag,
    NotNegative,
    OpenShare,
    OptionalCount,
    Positive,
    Seed,
    Share,
    Sources,
    Texts,
)


class EmbeddingDataSection(Section):
    """Which text is learned: all of it, since vectors are judged by what they are used for and not by a held-out loss."""

    train: Sources
    """The text, all of which is learned from."""
    field: str = "text"
    """The field of a .jsonl line or the column of a .parquet file that holds the text."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: an error, or U+FFFD in their place."""


class WordVocabulary(Section):
    """Words: runs of letters, digits, marks and underscores, with apostrophes inside."""

    kind: Literal["words"]
    lowercase: Flag = True
    """Words are the same whatever their case."""
    min_count: Count = 5
    """Rarer words are taken out of the text before windows are cut, as word2vec does."""
    max_size: OptionalCount = None
    """Keep only this many of the most frequent; null: all."""


class TokenVocabulary(Section):
    """The tokens of a tokenizer."""

    kind: Literal["tokens"]
    tokenizer: str
    """A tokenizer.json, or a run folder that holds one."""
    min_count: Count = 1
    """Rarer tokens get no vector."""


class Word2VecMethod(Section):
    """What skip-gram and CBOW share: negative sampling (Mikolov et al. 2013b), with the defaults published there."""

    dimensions: Count = 100
    """Numbers in a vector."""
    window: Count = 5
    """Widest window on each side; each position draws its own from 1 to this."""
    negatives: Count = 5
    """Words drawn at random to be told from each true neighbour."""
    exponent: NotNegative = 0.75
    """Negatives are drawn by count to this power."""
    subsample: NotNegative = 1e-3
    """Words above this share of the text are thinned out; 0: none are."""
    lr: Positive
    """Learning rate at the start."""
    lr_end: NotNegative = 1e-4
    """The rate falls on a straight line from lr to this."""
    epochs: Count = 5
    """Passes over the text."""


class SkipGramMethod(Word2VecMethod):
    """A word's vector predicts the words around it."""

    name: Literal["skipgram"]
    lr: Positive = 0.025


class CbowMethod(Word2VecMethod):
    """The mean of the vectors around a word predicts it."""

    name: Literal["cbow"]
    lr: Positive = 0.05


class GloveMethod(Section):
    """A factorization of the logarithms of co-occurrence counts (Pennington et al. 2014), with its published defaults."""

    name: Literal["glove"]
    dimensions: Count = 100
    """Numbers in a vector."""
    window: Count = 15
    """Words on each side; one at distance d counts 1/d."""
    x_max: Positive = 100.0
    """Counts from here on weigh fully, smaller ones (count / x_max) ** alpha."""
    alpha: NotNegative = 0.75
    """See x_max."""
    lr: Positive = 0.05
    """AdaGrad's."""
    epochs: Count = 25
    """Passes over the table of counts."""
    buffer_megabytes: Count = 128
    """Counts are sorted and summed in memory up to this, and then on disk."""


Method = Annotated[SkipGramMethod | CbowMethod | GloveMethod, Field(discriminator="name")]


def _method(value: object) -> object:
    if isinstance(value, str):
        return {"name": value}
    return {"name": "skipgram", **value} if isinstance(value, dict) else value


def _vocabulary(value: object) -> object:
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, dict) and "kind" not in value:
        return {"kind": "tokens" if "tokenizer" in value else "words", **value}
    return value


class WatchSection(Section):
    """What is shown while the vectors form."""

    probes: Texts = ()
    """Words whose nearest neighbours are shown; none given: five from the frequent ones."""
    neighbours: CountOrZero = 5
    """How many of them."""
    every: OpenShare = 0.1
    """Share of the training between two looks at them."""


class EmbeddingCheckpointSection(Section):
    every: Share = 0.1
    """Share of the training between two checkpoints; 0: only at the end and when stopped."""


class EmbeddingRecipe(Section):
    """Vectors of words or tokens, from a text."""

    kind: Literal["embeddings"]
    name: str = "vectors"
    """The vectors go to embeddings/NAME."""
    seed: Seed = 1337
    """Of starting vectors and everything drawn."""
    data: EmbeddingDataSection
    vocabulary: Annotated[WordVocabulary | TokenVocabulary, Field(discriminator="kind"), BeforeValidator(_vocabulary)] = (
        WordVocabulary(kind="words")
    )
    method: Annotated[Method, BeforeValidator(_method)] = SkipGramMethod(name="skipgram")
    watch: WatchSection = WatchSection()
    checkpoint: EmbeddingCheckpointSection = EmbeddingCheckpointSection()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, defaults written out, in the notation that is read back to an equal recipe."""
        values: dict[str, Any] = plain(self.model_dump())
        return values

    def to_yaml(self) -> str:
        return written(self.as_dict())
