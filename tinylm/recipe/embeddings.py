"""The schema of embedding recipes (`kind: embeddings`): a text, the words or tokens to learn vectors for, and the method."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tinylm.recipe.schema import Section, dump_yaml, to_plain
from tinylm.recipe.values import (
    Count,
    CountOrZero,
    Exponent,
    Flag,
    LearningRate,
    Megabytes,
    NotNegative,
    OpenShare,
    OptionalCount,
    OptionalTemplate,
    Positive,
    RequiredPath,
    RunName,
    Seed,
    Share,
    SmallCount,
    Sources,
    Texts,
    Width,
)


class EmbeddingDataSection(Section):
    """The text to train on. There is no held-out text, because vectors are evaluated on tasks such as analogies."""

    train: Sources
    """The text to train on."""
    field: str = "text"
    """The field of each .jsonl line, or the column of a .csv, .tsv or .parquet file, that contains the text."""
    template: OptionalTemplate = None
    """Combines several fields into the text of a document, for example `"{category}: {body}"`. Replaces `field`. Write braces in
    the text as `{{` and `}}`."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8. `strict` reports an error, and `replace` substitutes U+FFFD."""


class WordVocabulary(Section):
    """Words: sequences of letters, digits, marks and underscores, which can contain apostrophes."""

    kind: Literal["words"]
    lowercase: Flag = True
    """Ignore the case of words."""
    min_count: Count = 5
    """Words with fewer occurrences are removed from the text before windows are formed, as in word2vec."""
    max_size: OptionalCount = None
    """Maximum number of words. The most frequent words are kept. `null` means no limit."""


class TokenVocabulary(Section):
    """The tokens of a tokenizer."""

    kind: Literal["tokens"]
    tokenizer: RequiredPath
    """A tokenizer.json, or a run folder that contains one."""
    min_count: Count = 1
    """Tokens with fewer occurrences have no vector."""


class Word2VecMethod(Section):
    """Keys shared by skip-gram and CBOW with negative sampling. The defaults follow Mikolov et al. 2013b."""

    dimensions: Width = 100
    """Number of components in each vector."""
    window: SmallCount = 5
    """Maximum window size on each side. The size at each position is drawn uniformly from 1 to this value."""
    negatives: SmallCount = 5
    """Number of negative samples for each pair of neighbors."""
    exponent: Exponent = 0.75
    """Negative samples are drawn with probability proportional to `count ** exponent`."""
    subsample: NotNegative = 1e-3
    """Words that make up more than this fraction of the text are subsampled. `0` means no subsampling."""
    lr: LearningRate
    """Initial learning rate."""
    lr_end: NotNegative = 1e-4
    """Final learning rate. The rate decays linearly from `lr`."""
    epochs: Count = 5
    """Number of passes over the text."""


class SkipGramMethod(Word2VecMethod):
    """The vector of each word predicts the surrounding words."""

    name: Literal["skipgram"]
    lr: LearningRate = 0.025


class CbowMethod(Word2VecMethod):
    """The mean vector of the surrounding words predicts each word."""

    name: Literal["cbow"]
    lr: LearningRate = 0.05


class GloveMethod(Section):
    """Factorization of log co-occurrence counts. The defaults follow Pennington et al. 2014."""

    name: Literal["glove"]
    dimensions: Width = 100
    """Number of components in each vector."""
    window: SmallCount = 15
    """Window size on each side. A word at distance d adds 1/d to a count."""
    x_max: Positive = 100.0
    """Counts of at least `x_max` have weight 1. Smaller counts have weight `(count / x_max) ** alpha`."""
    alpha: Exponent = 0.75
    """The exponent in the weight of a count (see `x_max`)."""
    lr: LearningRate = 0.05
    """Learning rate of AdaGrad."""
    epochs: Count = 25
    """Number of passes over the co-occurrence counts."""
    buffer_megabytes: Megabytes = 128
    """Size of the buffer in which counts are sorted and summed before they are written to disk."""


Method = Annotated[SkipGramMethod | CbowMethod | GloveMethod, Field(discriminator="name")]


def _default_method(value: object) -> object:
    if isinstance(value, str):
        return {"name": value}
    return {"name": "skipgram", **value} if isinstance(value, dict) else value


def _default_vocabulary(value: object) -> object:
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, dict) and "kind" not in value:
        return {"kind": "tokens" if "tokenizer" in value else "words", **value}
    return value


class WatchSection(Section):
    """The nearest neighbors shown during training."""

    probes: Texts = ()
    """Words whose nearest neighbors are shown. `[]` means five frequent words."""
    neighbours: CountOrZero = 5
    """Number of neighbors to show."""
    every: OpenShare = 0.1
    """The interval between lists of neighbors, as a fraction of the training run."""


class EmbeddingCheckpointSection(Section):
    """Checkpoints during training."""

    every: Share = 0.1
    """The interval between checkpoints, as a fraction of the training run. `0` saves only at the end and when training is
    stopped."""


class EmbeddingRecipe(Section):
    """Word or token vectors, learned from a text."""

    kind: Literal["embeddings"]
    name: RunName = "vectors"
    """The vectors are written to embeddings/NAME."""
    seed: Seed = 1337
    """Seed for the initial vectors and all sampling."""
    data: EmbeddingDataSection
    vocabulary: Annotated[WordVocabulary | TokenVocabulary, Field(discriminator="kind"), BeforeValidator(_default_vocabulary)] = (
        WordVocabulary(kind="words")
    )
    """The units to learn vectors for: words, or the tokens of a tokenizer."""
    method: Annotated[Method, BeforeValidator(_default_method)] = SkipGramMethod(name="skipgram")
    """The method that learns the vectors, as a name or as a section: `skipgram`, `cbow` or `glove`."""
    watch: WatchSection = WatchSection()
    checkpoint: EmbeddingCheckpointSection = EmbeddingCheckpointSection()

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values, including every default. `load_any` reads them back as an equal recipe."""
        values: dict[str, Any] = to_plain(self.model_dump())
        return values

    def to_yaml(self) -> str:
        return dump_yaml(self.as_dict())
