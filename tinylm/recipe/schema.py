"""The schema of a language model's recipe: one typed, frozen class per section, with the meaning and unit of each key.

These classes validate each key. Checks that involve several keys, or files, are in `checks`. The docstring under a key is its
description in the recipe reference.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol, get_args

import yaml
from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from tinylm.errors import InputError
from tinylm.recipe.base import DataVariant as DataVariant
from tinylm.recipe.base import InitFrom as InitFrom
from tinylm.recipe.base import ModelVariant as ModelVariant
from tinylm.recipe.base import ObjectiveVariant as ObjectiveVariant
from tinylm.recipe.base import Section as Section
from tinylm.recipe.chat import ChatSection, DPOObjective, PreferencesSection
from tinylm.recipe.encoder import EncoderSection, MaskedLMObjective
from tinylm.recipe.encoder_decoder import EncoderDecoderSection
from tinylm.recipe.fixed_context import FeedForwardSection, NgramSection
from tinylm.recipe.labels import ClassificationObjective, LabelsSection
from tinylm.recipe.mixture import MixedSource, TrainingSources, flat_sources, mixture_of
from tinylm.recipe.notation import Dumper
from tinylm.recipe.pairs import PairsSection, TranslationObjective
from tinylm.recipe.recurrent import GruSection, LstmSection, RecurrentEncoderDecoderSection, RnnSection
from tinylm.recipe.sections import OpenUnion
from tinylm.recipe.transformer import DecoderSection as DecoderSection
from tinylm.recipe.transformer import LinearRopeScaling as LinearRopeScaling
from tinylm.recipe.transformer import Llama3RopeScaling as Llama3RopeScaling
from tinylm.recipe.transformer import RopeScaling as RopeScaling
from tinylm.recipe.transformer import TransformerSection as TransformerSection
from tinylm.recipe.transformer import YarnRopeScaling as YarnRopeScaling
from tinylm.recipe.values import (
    LORA_TARGETS,
    Alphabet,
    BatchSize,
    BatchSizeOrAuto,
    Betas,
    Characters,
    ClipNorm,
    CompileMode,
    ContextLength,
    Count,
    CountOrZero,
    Epsilon,
    Flag,
    Interval,
    LearningRate,
    Megabytes,
    MirrorUrl,
    Normalizations,
    NotNegative,
    OpenShare,
    OptionalCount,
    OptionalInterval,
    OptionalPositive,
    OptionalShareBelowOne,
    OptionalSmallCount,
    OptionalTemplate,
    Positive,
    RequiredPath,
    RunName,
    RunPaths,
    Seed,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    SmallCount,
    Sources,
    Targets,
    Temperature,
    Texts,
    TokenCount,
    TokenList,
    Trackers,
    VocabSize,
    Warmup,
    Width,
)


def _expand_name(value: object) -> object:
    """Expand the short form `optimizer: adamw` to `optimizer: {name: adamw}`."""
    return {"name": value} if isinstance(value, str) else value


class HeldoutShare(Section):
    """Hold out a fraction of the training text."""

    share: OpenShare = 0.1
    """The fraction to hold out: of the characters with `by: tail`, or of the documents with `by: document`."""
    by: Literal["document", "tail"] = "tail"
    """Which text to hold out. `document`: whole documents, chosen by a hash of their text. `tail`: the end of the text."""


class HeldoutSources(Section):
    """Evaluate on another text."""

    sources: Sources
    """The held-out text. The short form `heldout: b.txt` is equivalent."""


def _expand_heldout(value: object) -> object:
    if isinstance(value, (str, list, tuple)):
        return {"sources": value}
    if isinstance(value, float):
        return {"share": value}
    return value


def _choose_heldout(value: object) -> str:
    return "sources" if isinstance(value, HeldoutSources) or (isinstance(value, dict) and "sources" in value) else "share"


Heldout = Annotated[
    Annotated[HeldoutShare, Tag("share")] | Annotated[HeldoutSources, Tag("sources")],
    Discriminator(_choose_heldout),
    BeforeValidator(_expand_heldout),
]


class TestShare(Section):
    """Set aside a fraction of the training text as the test set. It is chosen in the same way as the held-out text."""

    share: OpenShare = 0.1
    """The fraction to set aside: of the characters with `heldout.by: tail`, or of the documents with `heldout.by: document`."""


def _choose_test(value: object) -> str:
    return "none" if value is None else _choose_heldout(value)


OptionalTest = Annotated[
    Annotated[TestShare, Tag("share")] | Annotated[HeldoutSources, Tag("sources")] | Annotated[None, Tag("none")],
    Discriminator(_choose_test),
    BeforeValidator(_expand_heldout),
]


class DataSection(DataVariant):
    """The text to train on and the text to evaluate on."""

    train: TrainingSources
    """The text to train on: a SOURCE, a list of SOURCEs, which are concatenated, or a mixture. A mixture is a list of sections with
    the keys `source` and `weight`. `heldout` and `test` then hold out a fraction of each source."""
    heldout: Heldout = HeldoutShare()
    """The text to evaluate on: a fraction of the training text, or another SOURCE."""
    test: OptionalTest = None
    """A text that is never used during training, not even to choose the best checkpoint: a fraction of the training text, or
    another SOURCE. `tinylm eval --split test` evaluates on it. `null` means none."""
    field: str = "text"
    """The field of each .jsonl line, or the column of a .csv, .tsv or .parquet file, that contains the text."""
    template: OptionalTemplate = None
    """Combines several fields into the text of a document, for example `"{category}: {body}"`. Replaces `field`. Write braces in
    the text as `{{` and `}}`."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8. `strict` reports an error, and `replace` substitutes U+FFFD."""
    shuffle: Literal["windows", "documents"] = "windows"
    """What to shuffle in each epoch. `windows`: cut the text into windows and shuffle them. `documents`: also shuffle the documents
    before the text is cut."""
    document_mask: Flag = False
    """Process each document in a window separately: attention does not cross documents, and positions restart at 0 in each
    document. If false, the model can attend to earlier documents, which is faster."""
    format: Literal["text"] = "text"
    """What the sources contain: `text` means plain text, which becomes one stream of tokens."""

    def sources(self) -> dict[str, tuple[str, ...]]:
        others = {"heldout": self.heldout, "test": self.test}
        found = {key: text.sources for key, text in others.items() if isinstance(text, HeldoutSources)}
        return {"train": flat_sources(self.train), **found}

    @property
    def mixture(self) -> tuple[MixedSource, ...]:
        """The sources of a mixture, or an empty tuple if `train` is a list of sources to concatenate."""
        return mixture_of(self.train)


def require_text(data: DataVariant) -> DataSection:
    """Return `data` if its format is text. Raises `InputError` otherwise."""
    if not isinstance(data, DataSection):
        raise InputError(f"this needs format text, not {data.format}", where="data.format")
    return data


DATA_VARIANTS = OpenUnion("format", DataSection, LabelsSection, PairsSection, ChatSection, PreferencesSection)
"""The data formats. Code outside the library can add one with `register_data_section`."""


def _default_format(value: object) -> object:
    return {"format": "text", **value} if isinstance(value, dict) else value


DataUnion = Annotated[DataVariant, DATA_VARIANTS, BeforeValidator(_default_format)]


class LearnedTokenizer(Section):
    """Keys shared by all tokenizers that are learned from the training text. The held-out text is never used for this."""

    kind: str
    normalize: Normalizations = ()
    """Normalizations applied to text before encoding. They are lossy: decoding does not restore the original text."""
    special_tokens: TokenList = ()
    """Control tokens in addition to the end-of-text token. Encoding text never produces them."""
    added_tokens: TokenList = ()
    """Strings that are always encoded as one token, wherever they occur in the text."""


class VocabularyTokenizer(LearnedTokenizer):
    """Keys shared by tokenizers that learn a vocabulary of a chosen size."""

    vocab_size: VocabSize = 4096
    """Number of tokens, including the end-of-text, special and added tokens."""
    allow_smaller: Flag = True
    """Learn fewer tokens, with a warning, if the text is too small for `vocab_size`. If false, report an error with the largest
    possible size."""
    max_megabytes: Megabytes = 64
    """Maximum amount of text to learn from, in megabytes. A longer text is sampled evenly."""


class BpeTokenizer(VocabularyTokenizer):
    """Byte-pair encoding (Sennrich et al. 2016) of bytes or of characters."""

    kind: Literal["bpe"]
    split: str = "gpt4"
    """The pretokenizer, which splits text at boundaries that merges never cross: `gpt4`, `gpt2`, `llama3`, `whitespace`, `none`
    (only lines) or a regular expression."""
    digits: OptionalSmallCount = None
    """Maximum number of digits in one token. `null` means 2 for `gpt4`, 3 for `llama3` and no limit otherwise."""
    min_frequency: Count = 1
    """Minimum number of occurrences that a pair needs to be merged."""
    max_token_length: OptionalCount = None
    """Maximum length of a token, in bytes for `alphabet: bytes` and in characters otherwise. `null` means no limit."""
    alphabet: Alphabet = "bytes"
    """The units that merges start from: `bytes`, `text` (all characters of the text), a number (of its most frequent characters) or
    the characters themselves."""
    byte_fallback: Flag = True
    """Encode characters outside the alphabet as bytes. If false, encode them as the unknown token."""
    dropout: ShareBelowOne = 0.0
    """BPE dropout (Provilkov et al. 2020): the fraction of merges skipped at random when encoding the training text."""


class UnigramTokenizer(VocabularyTokenizer):
    """The unigram language model of SentencePiece (Kudo 2018)."""

    kind: Literal["unigram"]
    split: str = "gpt4"
    """The pretokenizer, as for `bpe`. Tokens never cross its boundaries."""
    digits: OptionalSmallCount = None
    """Maximum number of digits in one token, as for `bpe`."""
    max_token_length: SmallCount = 16
    """Maximum number of characters in a token."""
    alphabet: Characters = "text"
    """Characters that are always tokens: `text` (all its characters), a number (its most frequent ones) or the characters
    themselves."""
    byte_fallback: Flag = True
    """Encode characters outside the alphabet as bytes. If false, encode them as the unknown token."""


class WordPieceTokenizer(VocabularyTokenizer):
    """WordPiece as in BERT: spaces are not part of tokens, and tokens that continue a word begin with `##`."""

    kind: Literal["wordpiece"]
    split: str = "bert"
    """What a word is: `bert` (punctuation is separate), `whitespace`, or a regular expression applied between spaces."""
    min_frequency: Count = 1
    """Minimum number of occurrences that a pair needs to be merged."""
    max_token_length: OptionalCount = None
    """Maximum number of characters in a token. `null` means no limit."""
    alphabet: Characters = "text"
    """Characters that are always tokens: `text` (all its characters), a number (its most frequent ones) or the characters
    themselves. A word with any other character is unknown."""


class WordTokenizer(VocabularyTokenizer):
    """The most frequent whole words. All other words are unknown."""

    kind: Literal["word"]
    split: str = "bert"
    """What a word is, as for `wordpiece`."""
    min_frequency: Count = 1
    """Minimum number of occurrences that a word needs to become a token."""


class CharTokenizer(LearnedTokenizer):
    """One token per character of the training text. Other characters become `<|unknown|>`."""

    kind: Literal["char"]
    min_frequency: Count = 1
    """Minimum number of occurrences that a character needs to become a token."""


class ByteTokenizer(LearnedTokenizer):
    """One token per UTF-8 byte."""

    kind: Literal["byte"]


class FileTokenizer(Section):
    """An existing tokenizer, which is used unchanged."""

    kind: Literal["file"]
    path: RequiredPath
    """A tokenizer.json, a sentencepiece model (`FILE.model`) or a tiktoken rank file (`FILE.tiktoken:SPLIT`, where SPLIT is the
    pretokenizer, as for `bpe`; without it, `llama3`)."""


def _default_tokenizer(value: object) -> object:
    if isinstance(value, dict) and "kind" not in value:
        return {"kind": "file" if "path" in value else "bpe", **value}
    return {"kind": value} if isinstance(value, str) else value


TokenizerSection = (
    BpeTokenizer | UnigramTokenizer | WordPieceTokenizer | WordTokenizer | CharTokenizer | ByteTokenizer | FileTokenizer
)
LEARNED_TOKENIZERS: tuple[type[LearnedTokenizer], ...] = tuple(
    kind for kind in get_args(TokenizerSection) if issubclass(kind, LearnedTokenizer)
)


MODEL_VARIANTS = OpenUnion(
    "architecture",
    DecoderSection,
    RnnSection,
    LstmSection,
    GruSection,
    FeedForwardSection,
    NgramSection,
    EncoderSection,
    EncoderDecoderSection,
    RecurrentEncoderDecoderSection,
)
"""The architectures. Code outside the library can add one with `register_model_section`."""


DEFAULT_ARCHITECTURE = "decoder"
"""The architecture if a recipe does not set `model.architecture`."""


def _default_architecture(value: object) -> object:
    return {"architecture": DEFAULT_ARCHITECTURE, **value} if isinstance(value, dict) else value


ModelSection = Annotated[ModelVariant, MODEL_VARIANTS, BeforeValidator(_default_architecture)]


class CausalLMObjective(ObjectiveVariant):
    """Predict each token from the tokens before it."""

    data_formats = ("text", "chat")

    name: Literal["causal_lm"] = "causal_lm"
    mask_prompt: Flag = True
    """With the chat format, compute the loss only on the assistant's messages and end-of-turn tokens. If false, compute it on all
    messages."""
    teacher: RunPaths = ()
    """Runs to distill (Hinton et al. 2015): the model also learns to predict the mean of their probabilities. The best checkpoint
    of each run is used, or the one whose folder the path names. The runs must have this tokenizer."""
    teacher_weight: ShareAboveZero = 0.5
    """The share `w` of the teacher in the loss, which is `(1 - w)` times the cross-entropy plus `w` times the Kullback-Leibler
    divergence from the teachers' distribution to the model's."""


OBJECTIVE_VARIANTS = OpenUnion(
    "name", CausalLMObjective, DPOObjective, MaskedLMObjective, ClassificationObjective, TranslationObjective
)
"""The objectives. Code outside the library can add one with `register_objective_section`."""

ObjectiveSection = Annotated[ObjectiveVariant, OBJECTIVE_VARIANTS, BeforeValidator(_expand_name)]


class AdamWOptimizer(Section):
    """AdamW (Loshchilov & Hutter 2019). Weight decay applies only to matrices."""

    name: Literal["adamw"]
    lr: LearningRate = 1e-3
    """Peak learning rate."""
    betas: Betas = (0.9, 0.95)
    """Decay rates for the running averages of the gradient and its square."""
    eps: Epsilon = 1e-8
    """The epsilon added to the denominator."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay for matrices. Each step multiplies them by `1 - learning rate * weight_decay`."""


class MuonOptimizer(Section):
    """Muon (Jordan et al. 2024) for the matrices of the blocks, and AdamW for embeddings, head, gains and biases."""

    name: Literal["muon"]
    lr: LearningRate = 0.02
    """Peak learning rate for Muon. At a learning rate of 1, the root mean square of an update is about 1 / sqrt(columns)."""
    momentum: ShareBelowOne = 0.95
    """Nesterov momentum."""
    momentum_warmup: CountOrZero = 0
    """Number of steps over which the momentum rises from 0.85 to the value of `momentum`."""
    orthogonalization: Literal["auto", "newton_schulz", "rational"] = "auto"
    """How updates are orthogonalized: by Newton-Schulz iterations, or by a rational function of the singular values (see
    `tinylm.optim.rational`), which always computes in fp32 and takes 0.3 to 0.7 times as long on CPUs without bf16 matrix units,
    less for wide models. There, `auto` means `rational` if the keys that start with `newton_schulz` keep their defaults.
    Otherwise, it means `newton_schulz`."""
    newton_schulz: Literal["polar_express", "classic"] = "polar_express"
    """Coefficients of the Newton-Schulz iteration: `polar_express` (Amsel et al. 2025) or `classic` (Jordan et al. 2024)."""
    newton_schulz_steps: SmallCount = 3
    """Number of Newton-Schulz iterations. 3 iterations with `polar_express` are about as accurate as 5 with `classic`."""
    newton_schulz_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the Newton-Schulz iteration. `auto` means `bf16` on hardware with bf16 matrix units (GPUs since Ampere, CPUs
    with AMX) and `fp32` otherwise."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay for the weights that Muon updates. Each step multiplies them by `1 - learning rate * weight_decay`."""
    cautious_weight_decay: Flag = False
    """Apply weight decay only to weights that the update moves toward zero (Chen et al. 2025)."""
    adamw_lr: LearningRate = 4e-3
    """Peak learning rate for the weights that AdamW updates."""
    betas: Betas = (0.9, 0.95)
    """The betas of AdamW."""
    eps: Epsilon = 1e-8
    """The epsilon of AdamW."""

    @model_validator(mode="before")
    @classmethod
    def _accept_former_name(cls, values: object) -> object:
        """Accept `zolotarev`, an earlier rational function, as a synonym for `rational`, so that older runs can still be read."""
        if isinstance(values, dict) and values.get("orthogonalization") == "zolotarev":
            return {**values, "orthogonalization": "rational"}
        return values

    @property
    def computes_in_bf16(self) -> bool:
        """Whether updates are orthogonalized in bf16, if `newton_schulz_dtype` is not `auto`."""
        return self.newton_schulz_dtype == "bf16" and self.orthogonalization != "rational"

    def resolved(self, device_type: str, *, has_bf16_units: bool) -> MuonOptimizer:
        """Replace each `auto` with the value for a device of this type, such as "cpu"."""
        orthogonalization, dtype = self.orthogonalization, self.newton_schulz_dtype
        if orthogonalization == "auto":
            defaults = MuonOptimizer(name="muon")
            keys = ("newton_schulz", "newton_schulz_steps", "newton_schulz_dtype")
            has_defaults = all(getattr(self, key) == getattr(defaults, key) for key in keys)
            on_slow_cpu = device_type == "cpu" and not has_bf16_units
            orthogonalization = "rational" if on_slow_cpu and has_defaults else "newton_schulz"
        if dtype == "auto":
            dtype = "bf16" if has_bf16_units else "fp32"
        return self.model_copy(update={"orthogonalization": orthogonalization, "newton_schulz_dtype": dtype})


Optimizer = Annotated[MuonOptimizer | AdamWOptimizer, Field(discriminator="name")]


def _default_optimizer(value: object) -> object:
    """Use Muon for `auto` or if there is no name. It reached a lower loss than AdamW (docs/lab-notebook.md, "Ablation")."""
    if isinstance(value, dict) and value.get("name", "auto") == "auto":
        return {**value, "name": "muon"}
    return value


class ScheduleWithFloor(Section):
    """Keys shared by schedules that end at a minimum learning rate."""

    warmup: Warmup = 0.02
    """Length of the linear warmup: a number of steps, or a fraction of the training run if below 1."""
    floor: Share = 0.0
    """Final learning rate as a fraction of the peak learning rate."""


class WsdSchedule(ScheduleWithFloor):
    """Warmup, then the peak learning rate, then a linear cooldown to the floor (Hu et al. 2024)."""

    name: Literal["wsd"]
    cooldown: Share = 0.6
    """The fraction of the training run spent in cooldown."""


class CosineSchedule(ScheduleWithFloor):
    """Warmup, then decay to the floor along half a cosine."""

    name: Literal["cosine"]


class LinearSchedule(ScheduleWithFloor):
    """Warmup, then linear decay to the floor."""

    name: Literal["linear"]


class ConstantSchedule(Section):
    """Warmup, then the peak learning rate."""

    name: Literal["constant"]
    warmup: Warmup = 0.02
    """Length of the linear warmup: a number of steps, or a fraction of the training run if below 1."""


class InverseSqrtSchedule(Section):
    """Warmup, then decay with the inverse square root of the completed fraction of the training run."""

    name: Literal["inverse_sqrt"]
    warmup: Warmup = 0.1
    """Length of the linear warmup: a number of steps, or a fraction of the training run if below 1."""


class NoamSchedule(Section):
    """The schedule of Vaswani et al. (2017): lr * width^-0.5 * min(step^-0.5, step * warmup^-1.5), usually with an lr of 1 or 2."""

    name: Literal["noam"]
    warmup: Count = 4000
    """Length of the linear warmup, in steps."""
    width: Width = 512
    """The width in the formula, usually `n_embd`."""


Schedule = Annotated[
    WsdSchedule | CosineSchedule | LinearSchedule | ConstantSchedule | InverseSqrtSchedule | NoamSchedule,
    Field(discriminator="name"),
]


def _default_schedule(value: object) -> object:
    return {"name": "wsd", **value} if isinstance(value, dict) else value


class LoraSection(Section):
    """Low-rank adaptation (Hu et al. 2022). Each weight W is frozen, and a trained product (alpha / rank) B A is added to it. The
    product starts at zero."""

    rank: Width = 8
    """Number of rows in A and of columns in B."""
    alpha: Positive = 16.0
    """The product B A is scaled by `alpha / rank`."""
    targets: Targets = LORA_TARGETS
    """The linear layers of each block that have an adapter."""


LENGTHS = ("steps", "tokens", "epochs", "minutes")
"""The keys of `training:` that set the training length."""


class GuardsSection(Section):
    """What to do about non-finite losses and gradients, and about loss spikes."""

    patience: Count = 3
    """Number of consecutive steps skipped for a non-finite loss or gradient before a rollback to the last good checkpoint."""
    rollbacks: CountOrZero = 1
    """Maximum number of rollbacks. After a rollback, training continues past the offending batches. Once the limit is reached,
    training stops with a report."""
    spike: OptionalPositive = 12.0
    """Flag a loss that is this many robust standard deviations above the median of the last 64 losses. A robust standard deviation
    is 1.48 times the median absolute deviation. `null` means never."""


class TrainingSection(Section):
    """Training length, batch size, precision and optimizer. Set exactly one of `steps`, `tokens`, `epochs` and `minutes`."""

    steps: OptionalCount = None
    """Number of optimizer steps."""
    tokens: TokenCount = None
    """Number of training tokens, rounded up to whole steps."""
    epochs: OptionalPositive = None
    """Number of passes over the training text, rounded up to whole steps."""
    minutes: OptionalPositive = None
    """Wall-clock minutes of training, including compilation and evaluation. The schedule then follows the elapsed time."""
    global_batch_size: BatchSize = 64
    """Number of sequences per optimizer step."""
    micro_batch_size: BatchSizeOrAuto = "auto"
    """Number of sequences per forward pass. It must divide `global_batch_size`. `auto` chooses a size that fits in memory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of matrix products. Weights and optimizer state are always float32. `auto` chooses `bf16` or `fp16` if the device
    supports it and it is faster, else `fp32`."""
    lora: LoraSection | None = None
    """Train only low-rank adapters of the model that `model.init_from` loads. The optimizer is then AdamW."""
    optimizer: Annotated[Optimizer, BeforeValidator(_default_optimizer), BeforeValidator(_expand_name)] = MuonOptimizer(name="muon")
    """The optimizer, as a name or as a section: `muon`, `adamw` or `auto`, which means `muon`."""
    schedule: Annotated[Schedule, BeforeValidator(_default_schedule), BeforeValidator(_expand_name)] = WsdSchedule(name="wsd")
    """The learning rate schedule, as a name or as a section: `wsd`, `cosine`, `linear`, `constant`, `inverse_sqrt` or `noam`."""
    clip_grad_norm: ClipNorm = 1.0
    """Maximum global gradient norm. `off` means no clipping."""
    ema: OptionalShareBelowOne = None
    """Decay of an exponential moving average of the weights, such as 0.999. Evaluations, samples and the saved model then use the
    averages. In step `t`, the decay is at most `(1 + t) / (10 + t)`. `null` means no average."""
    compile: CompileMode = "auto"
    """Compile the model with torch.compile. `on` compiles each block. `model` compiles all blocks together, which takes longer.
    `graph` compiles each block and runs a micro-batch's forward and backward pass as one CUDA graph, for small models on a GPU.
    `auto` compiles if that saves more time than it takes, unless batches differ in length, as with sentence pairs. In long runs on
    a GPU, it tries `on` and `model` and keeps the faster."""
    activation_checkpointing: Flag = False
    """Save only the input of each block and recompute the rest in the backward pass. This saves memory but takes more time."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes share the model. `ddp` replicates it, and `fsdp` shards it. `auto` uses `ddp` if the model fits in
    memory and `fsdp` otherwise."""
    guards: GuardsSection = GuardsSection()
    """What to do about non-finite losses and loss spikes."""
    log_every: Count = 10
    """Number of steps between lines in metrics.jsonl."""

    @model_validator(mode="before")
    @classmethod
    def _adamw_for_lora(cls, values: Any) -> Any:
        """Default to AdamW with LoRA. Muon orthogonalizes whole matrices, which is not meaningful for low-rank factors."""
        if not isinstance(values, dict) or values.get("lora") is None:
            return values
        optimizer = _expand_name(values.get("optimizer", {}))
        if not isinstance(optimizer, dict) or optimizer.get("name", "auto") != "auto":
            return values
        return {**values, "optimizer": {**optimizer, "name": "adamw"}}


MINUTES_INTERVAL = 0.125
"""Default of `evaluation.every` and `checkpoint.every` with `training.minutes`."""


class EvaluationSection(Section):
    """Evaluation on the held-out text during training."""

    every: Interval = 100
    """Number of steps between evaluations, or a fraction of the training run if below 1. The last step is always evaluated. With
    `training.minutes`, the default is 0.125."""
    patience: OptionalCount = None
    """Stop training after this many evaluations in a row without a better value of the primary metric. `null` means never."""
    max_tokens: TokenCount = None
    """Evaluate only on the first `max_tokens` held-out tokens. `null` means all."""
    stride: OptionalCount = None
    """Number of tokens from the start of one window to the next. A stride below `context_length` scores tokens with more context
    but takes more time. `null` means `context_length`."""


class CheckpointSection(Section):
    """Checkpoints during training."""

    every: Interval = 100
    """Number of steps between checkpoints, or a fraction of the training run if below 1. Evaluated steps and the last step are also
    saved. With `training.minutes`, the default is 0.125."""
    keep: CountOrZero = 2
    """Number of recent checkpoints to keep in addition to `best` and `last`."""
    keep_every: OptionalInterval = None
    """Number of steps between checkpoints that are never removed, or a fraction of the training run if below 1. `tinylm inspect
    --checkpoints all` compares them. `null` means none."""
    optimizer: Literal["keep", "drop"] = "keep"
    """What to do with the optimizer state, about two thirds of a checkpoint, when training is complete. `drop` removes it, and the
    run can then no longer be resumed."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What to do if a checkpoint cannot be written, for example because the disk is full: stop training, or continue with a
    warning and try again at the next checkpoint."""
    mirror: MirrorUrl = None
    """URL of a folder, such as `s3://bucket/runs`, to which the run folder is copied after each checkpoint. `tinylm train --resume`
    downloads the copy if the run folder does not exist or is older. `null` means no copy."""


class SamplingSection(Section):
    """Samples generated during training, written to samples.md."""

    every: OptionalInterval = None
    """Number of steps between samples, or a fraction of the training run if below 1. `null` means no samples."""
    prompts: Texts = ("",)
    """The prompts to continue. An empty prompt starts a new document."""
    max_new_tokens: ContextLength = 80
    """Number of tokens to generate for each prompt."""
    temperature: Temperature = 0.8
    """Sampling temperature. `0` means greedy decoding."""
    top_k: OptionalCount = 50
    """Sample from the `top_k` most likely tokens. `null` means all."""


class Recipe(Section):
    """A complete experiment: text, tokenizer, model, training, evaluation, checkpoints and samples."""

    name: RunName = "run"
    """The run is written to runs/NAME."""
    seed: Seed = 1337
    """Seed for the initial weights, the data order and dropout."""
    data: DataUnion
    """What to train on and what to evaluate on: the format (by default `text`) and its keys."""
    tokenizer: Annotated[TokenizerSection, Field(discriminator="kind"), BeforeValidator(_default_tokenizer)] = BpeTokenizer(
        kind="bpe"
    )
    """How text is split into tokens: a tokenizer that is learned from the training text, or an existing one."""
    model: ModelSection = Field(default_factory=lambda: DecoderSection.model_validate({}))
    """The network: its architecture (by default `decoder`) and the keys of this architecture."""
    objective: ObjectiveSection = CausalLMObjective()
    """What the model learns to predict, as a name or as a section. The default for the decoder architecture is `causal_lm`."""
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    sampling: SamplingSection = SamplingSection()
    tracking: Trackers = ()
    """Experiment trackers to log to: `tensorboard`, `wandb`, `trackio`, or a list of them."""

    @model_validator(mode="before")
    @classmethod
    def _default_intervals(cls, values: Any) -> Any:
        """With `training.minutes`, set the intervals to fractions of the run. Slow machines then evaluate as often as fast ones."""
        training = values.get("training") if isinstance(values, dict) else None
        if not isinstance(training, dict) or training.get("minutes") is None:
            return values
        sections = {name: values.get(name) or {} for name in ("evaluation", "checkpoint")}
        return {**values, **{name: {"every": MINUTES_INTERVAL, **s} for name, s in sections.items() if isinstance(s, dict)}}

    @model_validator(mode="before")
    @classmethod
    def _default_objective(cls, values: Any) -> Any:
        """If the objective has no name, use the data format's default or, if there is none, the architecture's default."""
        if not isinstance(values, dict):
            return values
        objective = _expand_name(values.get("objective", {}))
        if not isinstance(objective, dict):
            return values
        data = values.get("data")
        data_format = data.get("format") if isinstance(data, dict) else getattr(data, "format", None)
        data_section = DATA_VARIANTS.sections.get(str(data_format), DataSection)
        assert issubclass(data_section, DataVariant)
        if data_section.default_objective is not None:
            return {**values, "objective": {"name": data_section.default_objective, **objective}}
        model = values.get("model")
        architecture = model.get("architecture") if isinstance(model, dict) else getattr(model, "architecture", None)
        section = MODEL_VARIANTS.sections.get(str(architecture), DecoderSection)
        assert issubclass(section, ModelVariant)
        return {**values, "objective": {"name": section.objectives[0], **objective}}

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values, including every default. `load` reads them back as an equal recipe."""
        values: dict[str, Any] = to_plain(self.model_dump())
        for key in ("train", "heldout", "test"):
            text = values["data"].get(key)
            if isinstance(text, dict):
                values["data"][key] = text.get("sources", text)
        for key in LENGTHS:
            if values["training"][key] is None:
                del values["training"][key]
        return values

    def to_yaml(self) -> str:
        return dump_yaml(self.as_dict())


def register_model_section(section: type[ModelVariant]) -> None:
    """Add an architecture to `model:`. Recipes, `--set`, error messages and the reference then support the keys of `section`.

    Raises `ValueError` if the architecture already exists, or if `section` does not have the key `context_length`.
    """
    if "context_length" not in section.model_fields:
        raise ValueError(f"{section.__name__} needs the key context_length")
    _register(MODEL_VARIANTS, section)


def register_objective_section(section: type[ObjectiveVariant]) -> None:
    """Add an objective to `objective:`. Raises `ValueError` if an objective with this name already exists."""
    _register(OBJECTIVE_VARIANTS, section)


def register_data_section(section: type[DataVariant]) -> None:
    """Add a format to `data:`. Raises `ValueError` if the format already exists."""
    _register(DATA_VARIANTS, section)


def _register(variants: OpenUnion, section: type[Section]) -> None:
    tag = section.model_fields[variants.discriminator].default
    if tag in variants.sections:
        raise ValueError(f"{variants.discriminator} {tag} already exists")
    variants.add(section)
    Recipe.model_rebuild(force=True)


def unregister_section(section: type[Section]) -> None:
    """Remove a registered architecture, objective or data format."""
    for base, variants in ((ModelVariant, MODEL_VARIANTS), (ObjectiveVariant, OBJECTIVE_VARIANTS), (DataVariant, DATA_VARIANTS)):
        if issubclass(section, base):
            variants.remove(section)
    Recipe.model_rebuild(force=True)


def dump_yaml(values: dict[str, Any]) -> str:
    """Return the values of a recipe as YAML text."""
    text: str = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    return text


def to_plain(value: Any) -> Any:
    """Convert tuples to lists at every level, because YAML has no tuples."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join nested keys with dots, as in `--set`: {"a": {"b": 1}} becomes {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class AnyRecipe(Protocol):
    """A recipe for a language model or for embeddings."""

    def as_dict(self) -> dict[str, Any]: ...


def changes(before: AnyRecipe, after: AnyRecipe) -> dict[str, tuple[Any, Any]]:
    """Return the keys that differ between two recipes, with the old and new values."""
    old, new = flattened(before.as_dict()), flattened(after.as_dict())
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}
