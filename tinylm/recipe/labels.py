"""Labeled texts: the `data:` section for `format: labels`, and the `classification` objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Tag

from tinylm.recipe.base import DataVariant, ObjectiveVariant, Section
from tinylm.recipe.values import ClassWeights, Counts, LabelList, OpenShare, ShareAboveZero, ShareBelowOne, Sources


class StratifiedShare(Section):
    """Set aside a share of each label's texts, chosen by a hash of the text. Equal texts stay together."""

    share: OpenShare = 0.1
    """The share of each label's texts."""


class LabeledSources(Section):
    """Labeled texts in separate files."""

    sources: Sources
    """The labeled texts, in the same formats as `data.train`. The short form `heldout: b.jsonl` is equivalent."""


def _expand(value: object) -> object:
    if isinstance(value, (str, list, tuple)):
        return {"sources": value}
    return {"share": value} if isinstance(value, float) else value


def _choose(value: object) -> str:
    if value is None:
        return "none"
    return "sources" if isinstance(value, LabeledSources) or (isinstance(value, dict) and "sources" in value) else "share"


LabeledPart = Annotated[
    Annotated[StratifiedShare, Tag("share")] | Annotated[LabeledSources, Tag("sources")],
    Discriminator(_choose),
    BeforeValidator(_expand),
]
OptionalLabeledPart = Annotated[
    Annotated[StratifiedShare, Tag("share")] | Annotated[LabeledSources, Tag("sources")] | Annotated[None, Tag("none")],
    Discriminator(_choose),
    BeforeValidator(_expand),
]


class LabelsSection(DataVariant):
    """Texts with one label each: .jsonl, .csv, .tsv or .parquet files, or a folder with one subfolder of text files per label."""

    default_objective = "classification"

    train: Sources
    """The labeled texts to train on."""
    heldout: LabeledPart = StratifiedShare()
    """The labeled texts to evaluate on: a share of each label, or another SOURCE."""
    test: OptionalLabeledPart = None
    """Labeled texts that training never uses, not even to choose the best checkpoint: a share of each label, or another SOURCE.
    `tinylm eval --split test` evaluates on them. `null` means none."""
    text: str = "text"
    """The field or column that contains the text."""
    label: str = "label"
    """The field or column that contains the label. Numbers and booleans become labels in JSON notation. Whitespace around a label
    is removed."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8. `strict` reports an error, and `replace` substitutes U+FFFD."""
    train_share: ShareAboveZero = 1.0
    """The share of each label's training texts to use, for example to measure the effect of less data. Held-out texts do not
    change."""
    truncate: Literal["head", "head_tail"] = "head"
    """Which tokens to use if a text is longer than the context. `head`: those at the beginning. `head_tail`: those at the beginning
    and at the end; the end fills a quarter of the context."""
    format: Literal["labels"] = "labels"
    """What the sources contain: `labels` means texts with one label each."""

    def sources(self) -> dict[str, tuple[str, ...]]:
        others = {"heldout": self.heldout, "test": self.test}
        return {"train": self.train, **{key: part.sources for key, part in others.items() if isinstance(part, LabeledSources)}}


class ClassificationObjective(ObjectiveVariant):
    """Predict a text's label from one vector for the whole text.

    The output layer replaces the language-model head. `tinylm classify` uses the trained model.
    """

    architectures = ("encoder", "decoder", "rnn", "lstm", "gru")
    data_formats = ("labels",)
    filled_in = ("labels", "label_counts")

    name: Literal["classification"] = "classification"
    pool: Literal["auto", "cls", "mean", "last"] = "auto"
    """The vector that represents a text: the hidden state of the first token (`cls`), of the last token (`last`), or the mean over
    all tokens (`mean`). `auto` means `cls` for an encoder and `last` for other models, where only the last position depends on the
    whole text."""
    pooler: Literal["tanh", "relu", "gelu_norm", "none"] = "tanh"
    """The activation of a linear layer between this vector and the output layer: `tanh` as in BERT, `relu` as in DistilBERT,
    `gelu_norm` as in ModernBERT (GELU, followed by a norm), or `none` to omit this layer. With `gelu_norm`, `model.bias` sets
    whether the layer has a bias."""
    label_smoothing: ShareBelowOne = 0.0
    """The share of the target probability that is spread uniformly over all labels."""
    token_dropout: ShareBelowOne = 0.0
    """The fraction of a text's tokens to remove in training, different ones in each epoch (word dropout, Iyyer et al. 2015). It
    reduces overfitting to single words. At least one token remains."""
    class_weights: ClassWeights = "none"
    """The weight of each label in the loss: `none`, `balanced` (inversely proportional to its frequency in the training texts), or
    a number for each label. A label without a number has weight 1. At least one weight must be above 0."""
    labels: LabelList = ()
    """The labels in output order. `[]` means all labels in the training texts, sorted. The run's recipe lists them."""
    label_counts: Counts = ()
    """Number of training texts with each label. Training sets this key, and the run's recipe lists the counts."""
