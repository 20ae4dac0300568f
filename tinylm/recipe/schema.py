"""The schema of a language model's recipe: one typed, frozen class per section, with the meaning and unit of each key.

These classes validate each key. Checks that involve several keys, or files, are in `checks`. The docstring under a key is its
description in the recipe reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from tinylm.recipe.notation import Dumper
from tinylm.recipe.presets import DECODER_PRESETS
from tinylm.recipe.sections import OpenUnion
from tinylm.recipe.values import (
    LORA_TARGETS,
    Alphabet,
    AttentionPattern,
    Betas,
    Characters,
    ClipNorm,
    Count,
    CountOrAuto,
    CountOrZero,
    Flag,
    FlagOrAuto,
    Megabytes,
    Normalizations,
    NotNegative,
    OpenShare,
    OptionalCount,
    OptionalPath,
    OptionalPositive,
    OptionalShareBelowOne,
    Orders,
    Positive,
    Seed,
    Share,
    ShareBelowOne,
    Sources,
    Targets,
    Texts,
    TokenList,
    Warmup,
)


class Section(BaseModel):
    """A part of a recipe. Unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


def _expand_name(value: object) -> object:
    """Expand the short form `optimizer: adamw` to `optimizer: {name: adamw}`."""
    return {"name": value} if isinstance(value, str) else value


class HeldoutShare(Section):
    """Hold out a share of the training text."""

    share: OpenShare = 0.1
    """The share to hold out: of the characters with `by: tail`, of the documents with `by: document`."""
    by: Literal["document", "tail"] = "tail"
    """document holds out whole documents, chosen by a hash of their text. tail holds out the end of the text."""


class HeldoutSources(Section):
    """Evaluate on another text."""

    sources: Sources
    """The held-out text. The short form `heldout: b.txt` means the same."""


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


class DataSection(Section):
    """The text to train on and the text to evaluate on."""

    train: Sources
    """The text to train on."""
    heldout: Heldout = HeldoutShare()
    """The text to evaluate on: a share of the training text, or another SOURCE."""
    field: str = "text"
    """The field of each .jsonl line, or the column of a .parquet file, that holds the text."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8. strict is an error; replace substitutes U+FFFD."""
    shuffle: Literal["windows", "documents"] = "windows"
    """What each epoch shuffles: windows keeps the documents in the order of the text and shuffles the windows that it is cut into.
    documents also shuffles the documents before the text is cut."""
    document_mask: Flag = False
    """Compute each document in a window as if it stood by itself: attention does not cross documents, positions start at 0 in each.
    false lets the model attend to earlier documents, which is faster."""
    format: Literal["text"] = "text"
    """What the sources contain: text is plain text, which becomes one stream of tokens."""


class LearnedTokenizer(Section):
    """The keys of all tokenizers that are learned from the training text. The held-out text is never used for this."""

    kind: str
    normalize: Normalizations = ()
    """Normalizations applied to text before it is encoded. They are lossy: decoding does not restore the original text."""
    special_tokens: TokenList = ()
    """Control tokens in addition to the end-of-text token. Encoding text never produces them."""
    added_tokens: TokenList = ()
    """Strings that are always encoded as one token, wherever they occur in the text."""


class VocabularyTokenizer(LearnedTokenizer):
    """The keys of the tokenizers that learn a vocabulary of a given size."""

    vocab_size: Count = 4096
    """Number of tokens, including the end-of-text, special and added tokens."""
    allow_smaller: Flag = True
    """What to do if the text is too small for vocab_size: true learns fewer tokens and warns, false is an error that names the
    largest possible size."""
    max_megabytes: Megabytes = 64
    """Maximum number of megabytes of text to learn from. A longer text is sampled evenly."""


class BpeTokenizer(VocabularyTokenizer):
    """Byte-pair encoding (Sennrich et al. 2016) of bytes or of characters."""

    kind: Literal["bpe"]
    split: str = "gpt4"
    """The pretokenizer, which splits text at boundaries that merges never cross: gpt4, gpt2, llama3, whitespace, none (only lines)
    or a regular expression."""
    digits: OptionalCount = None
    """Maximum number of digits in one token. null means 2 for gpt4, 3 for llama3 and no limit otherwise."""
    min_frequency: Count = 1
    """Minimum number of occurrences of a pair for it to be merged."""
    max_token_length: OptionalCount = None
    """Maximum length of a token, in bytes for `alphabet: bytes` and in characters otherwise. null means no limit."""
    alphabet: Alphabet = "bytes"
    """The units that merges start from: bytes, text (all characters of the text), a number (of its most frequent characters) or the
    characters themselves."""
    byte_fallback: Flag = True
    """Encode characters outside the alphabet as bytes. false encodes them as the unknown token."""
    dropout: ShareBelowOne = 0.0
    """BPE dropout (Provilkov et al. 2020): the share of merges skipped at random when encoding the training text."""


class UnigramTokenizer(VocabularyTokenizer):
    """The unigram language model of SentencePiece (Kudo 2018)."""

    kind: Literal["unigram"]
    split: str = "gpt4"
    """The pretokenizer, as for bpe. Tokens never cross its boundaries."""
    digits: OptionalCount = None
    """Maximum number of digits in one token, as for bpe."""
    max_token_length: Count = 16
    """Maximum number of characters in a token."""
    alphabet: Characters = "text"
    """Characters that are always tokens: text (all its characters), a number (its most frequent ones) or the characters
    themselves."""
    byte_fallback: Flag = True
    """Encode characters outside the alphabet as bytes. false encodes them as the unknown token."""


class WordPieceTokenizer(VocabularyTokenizer):
    """WordPiece as in BERT: spaces are not part of tokens, and tokens that continue a word begin with `##`."""

    kind: Literal["wordpiece"]
    split: str = "bert"
    """What a word is: bert (punctuation is separate), whitespace, or a regular expression applied between spaces."""
    min_frequency: Count = 1
    """Minimum number of occurrences of a pair for it to be merged."""
    max_token_length: OptionalCount = None
    """Maximum number of characters in a token. null means no limit."""
    alphabet: Characters = "text"
    """Characters that are always tokens: text (all its characters), a number (its most frequent ones) or the characters
    themselves. A word with any other character is unknown."""


class WordTokenizer(VocabularyTokenizer):
    """The most frequent whole words. All other words are unknown."""

    kind: Literal["word"]
    split: str = "bert"
    """What a word is, as for wordpiece."""
    min_frequency: Count = 1
    """Minimum number of occurrences of a word for it to get a token."""


class CharTokenizer(LearnedTokenizer):
    """One token per character of the training text. Other characters become `<|unknown|>`."""

    kind: Literal["char"]
    min_frequency: Count = 1
    """Minimum number of occurrences of a character for it to get a token."""


class ByteTokenizer(LearnedTokenizer):
    """One token per UTF-8 byte."""

    kind: Literal["byte"]


class FileTokenizer(Section):
    """An existing tokenizer.json, which is used unchanged."""

    kind: Literal["file"]
    path: str
    """Path to the tokenizer.json."""


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


class InitFrom(Section):
    """Start from the weights of another run instead of random weights."""

    run: str
    """A run folder, whose best checkpoint is used, or a checkpoint folder."""
    head: Flag = True
    """Load the output head. false initializes it, as well as every table indexed by token if the tokenizer differs."""


def _expand_init_from(value: object) -> object:
    return {"run": value} if isinstance(value, str) else value


class ModelVariant(Section):
    """The base class of the variants of `model:`, one for each architecture. `register_model_section` adds a variant.

    A variant declares the keys `architecture`, whose only value and default is the name of the variant, and `context_length`. Other
    code reads the properties and methods below from every architecture.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """The defaults of the other keys for each value of the key `preset`. Empty for an architecture without this key."""
    objectives: ClassVar[tuple[str, ...]] = ("causal_lm",)
    """The objectives that the model can be trained with, by name. The first one is the default."""

    architecture: str

    if TYPE_CHECKING:  # each variant declares this key itself, which sets its place in the order of keys
        context_length: int

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not cls.presets:
            return values
        default = cls.presets[cls.model_fields["preset"].default]
        preset = values.get("preset")
        return {**(cls.presets.get(preset, default) if isinstance(preset, str) else default), **values}

    @property
    def uses_dropout(self) -> bool:
        """Whether training uses any kind of dropout, and therefore random numbers."""
        return False

    @property
    def pretrained(self) -> InitFrom | None:
        """The value of `init_from`, for architectures with this key: the run whose weights are loaded."""
        return None

    @property
    def pretrained_embeddings(self) -> str | None:
        """The value of `init_embeddings`, for architectures with this key: the vectors that initialize the embedding."""
        return None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield each problem that involves several keys of this section, as (key, message)."""
        yield from ()


class DecoderSection(ModelVariant):
    """A transformer decoder. `preset` sets the defaults of the other keys, each of which can also be set separately.

    With `init_from`, keys that are not set have the values of that run, and its tokenizer is used unless another one is set.
    """

    presets = DECODER_PRESETS

    architecture: Literal["decoder"] = "decoder"
    preset: Literal["modern", "gpt2", "llama"] = "modern"
    """The model whose parts are the defaults of the other keys."""
    n_layer: Count = 6
    """Number of blocks."""
    n_head: Count = 6
    """Number of attention heads in each block."""
    n_kv_head: OptionalCount = None
    """Number of key/value heads, for grouped-query attention (Ainslie et al. 2023). null means n_head."""
    n_embd: Count = 384
    """Width of the residual stream."""
    head_dim: OptionalCount = None
    """Width of an attention head. null means n_embd / n_head."""
    context_length: Count = 256
    """Number of tokens in a training sequence, and the maximum number of tokens the model attends to."""
    attention_window: OptionalCount = None
    """Number of positions that each position attends to, itself included, in the blocks that attention_pattern calls local (Beltagy
    et al. 2020). null means all earlier positions."""
    attention_pattern: AttentionPattern = ("local",)
    """Which blocks use attention_window, repeated over the blocks: [local, local, global] means that every third block attends to
    all earlier positions."""
    norm: Literal["layernorm", "rmsnorm"]
    """The kind of normalization layer."""
    norm_position: Literal["pre", "post"]
    """pre normalizes the input of each attention and feed-forward layer and of the head. post normalizes each residual sum."""
    norm_eps: Positive
    """The epsilon added under the square root of a norm."""
    norm_gain: Flag
    """Multiply the output of norms by a learned gain."""
    position: Literal["learned", "sinusoidal", "rope", "none"]
    """How positions are encoded: by a learned or sinusoidal embedding, by rotating queries and keys (rope), or not at all."""
    rope_theta: OptionalPositive = None
    """The base of the rotary frequencies with `position: rope`. null means 10000."""
    feed_forward: Literal["gelu", "gelu_exact", "relu", "relu2", "swiglu"]
    """The activation of the feed-forward layers. gelu is the tanh approximation of GPT-2, gelu_exact the exact function."""
    feed_forward_multiple: Positive
    """The hidden width of the feed-forward layers as a multiple of n_embd, rounded to the nearest multiple of 8."""
    n_inner: OptionalCount = None
    """The hidden width of the feed-forward layers. null means that feed_forward_multiple determines it."""
    bias: Flag
    """Use a learned bias in linear layers and layer norms."""
    tie_embeddings: Flag
    """Use the weights of the token embedding as those of the head."""
    qk_norm: Flag
    """Apply an RMS norm to the queries and keys of each head, before rotary positions."""
    qk_gain: Flag = True
    """Multiply the output of qk_norm by a learned gain."""
    embedding_norm: Flag
    """Normalize the token embedding before the first block."""
    zero_init_outputs: Flag
    """Initialize the output projections of attention and feed-forward layers to zero, so that every block starts as the identity.
    The head starts near zero, and other matrices have a standard deviation of 0.5 / sqrt(inputs)."""
    ngram_embeddings: Orders = ()
    """Values of n, such as [2, 3]. For each, a hashed embedding of the last n tokens is added to the token embedding (Pagnoni et
    al. 2024). [] means none."""
    ngram_rows: Count = 16384
    """Number of rows of the embedding table for each n."""
    ngram_width: Count = 32
    """Width of the n-gram embedding tables."""
    ngram_dropout: ShareBelowOne = 0.0
    """The share of n-gram embeddings that are dropped in training. Without it, the tables soon memorize a small text."""
    value_embeddings: CountOrZero = 0
    """Number of blocks at the start, and again at the end, whose attention values get a token embedding added (Zhou et al.
    2024)."""
    value_residual: Flag = False
    """Mix the values of the first block into those of later blocks, with a learned weight (Zhou et al. 2024)."""
    embedding_shortcut: Flag = False
    """The input of every block is a learned mix of the residual stream and the embedding."""
    parallel_residual: Flag = False
    """Compute attention and feed-forward layer in parallel from the same input, and add both outputs (GPT-NeoX)."""
    dropout: ShareBelowOne = 0.0
    """Dropout of the embedding and of the output of each attention and feed-forward layer."""
    attention_dropout: OptionalShareBelowOne = None
    """Dropout of the attention probabilities. null means the value of dropout. On a CPU it doubles the time of attention."""
    logit_softcap: OptionalPositive = None
    """Soft cap c of the logits, which become c * tanh(logits / c). null means no cap."""
    init_embeddings: OptionalPath = None
    """Initialize the token embedding with these vectors: a folder from `tinylm embed train`, or a file in any format it reads."""
    freeze_embeddings: Flag = False
    """Do not train the token embedding that init_embeddings loads."""
    init_from: Annotated[InitFrom | None, BeforeValidator(_expand_init_from)] = None
    """The run whose weights are loaded: `init_from: RUN`, or `init_from: {run: RUN, head: off}`."""

    @property
    def uses_dropout(self) -> bool:
        return self.dropout > 0 or self.attention_dropout_p > 0 or (self.ngram_dropout > 0 and bool(self.ngram_embeddings))

    @property
    def pretrained(self) -> InitFrom | None:
        return self.init_from

    @property
    def pretrained_embeddings(self) -> str | None:
        return self.init_embeddings

    @property
    def attention_dropout_p(self) -> float:
        """The probability of attention dropout: `attention_dropout` if it is set, else `dropout`."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def feed_forward_width(self) -> int:
        return self.n_inner or max(8, 8 * round(self.feed_forward_multiple * self.n_embd / 8))

    def window_of(self, layer: int) -> int | None:
        """The attention window of a block, counted from 0, or None if it attends to all earlier positions."""
        return self.attention_window if self.attention_pattern[layer % len(self.attention_pattern)] == "local" else None

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.init_from is not None and self.init_embeddings is not None:
            yield "init_embeddings", "cannot be combined with init_from, which already loads an embedding"
        if self.head_dim is None and self.n_embd % self.n_head:
            divisors = [heads for heads in range(1, self.n_embd + 1) if self.n_embd % heads == 0]
            nearest = min(divisors, key=lambda heads: abs(heads - self.n_head))
            yield "n_head", f"{self.n_head} heads do not divide the width n_embd {self.n_embd} ({nearest} heads would)"
        elif self.position == "rope" and self.head_width % 2:
            width = "n_embd / n_head" if self.head_dim is None else "head_dim"
            yield "n_head", f"rope needs an even head width, and {width} is {self.head_width}"
        if self.n_head % self.kv_heads:
            yield "n_kv_head", f"{self.kv_heads} key/value heads do not divide the {self.n_head} query heads"
        if self.position == "sinusoidal" and self.n_embd % 2:
            yield "n_embd", f"sinusoidal positions need an even width, not {self.n_embd}"
        if self.rope_theta is not None and self.position != "rope":
            yield "rope_theta", f"needs position: rope, and position is {self.position}"
        if self.attention_window is None and self.attention_pattern != ("local",):
            yield "attention_pattern", "needs attention_window"
        if self.freeze_embeddings and self.init_embeddings is None:
            yield "freeze_embeddings", "needs init_embeddings"
        elif self.freeze_embeddings and self.tie_embeddings:
            yield "freeze_embeddings", "cannot be combined with tie_embeddings, which also uses them as the head's weights"


MODEL_VARIANTS = OpenUnion("architecture")
"""The architectures. `register_model_section` adds one from outside the library."""


DEFAULT_ARCHITECTURE = "decoder"
"""The architecture of a recipe without the key `model.architecture`."""


def _default_architecture(value: object) -> object:
    return {"architecture": DEFAULT_ARCHITECTURE, **value} if isinstance(value, dict) else value


ModelSection = Annotated[DecoderSection, MODEL_VARIANTS, BeforeValidator(_default_architecture)]


class ObjectiveVariant(Section):
    """The base class of the variants of `objective:`. `register_objective_section` adds a variant.

    A variant declares the key `name`, whose only value and default is the name of the objective.
    """

    architectures: ClassVar[tuple[str, ...]] = ()
    """The architectures that can be trained with the objective, in addition to those that list it in `objectives`."""

    name: str


class CausalLMObjective(ObjectiveVariant):
    """Predict each token from the tokens before it."""

    name: Literal["causal_lm"] = "causal_lm"


OBJECTIVE_VARIANTS = OpenUnion("name")
"""The objectives. `register_objective_section` adds one from outside the library."""

ObjectiveSection = Annotated[CausalLMObjective, OBJECTIVE_VARIANTS, BeforeValidator(_expand_name)]


class AdamWOptimizer(Section):
    """AdamW (Loshchilov & Hutter 2019). Weight decay applies only to matrices."""

    name: Literal["adamw"]
    lr: Positive = 1e-3
    """Peak learning rate."""
    betas: Betas = (0.9, 0.95)
    """Decay rates of the running averages of the gradient and of its square."""
    eps: Positive = 1e-8
    """The epsilon added to the denominator."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of matrices. Each step decays them by this times the learning rate."""


class MuonOptimizer(Section):
    """Muon (Jordan et al. 2024) for the matrices of the blocks, and AdamW for embeddings, head, gains and biases."""

    name: Literal["muon"]
    lr: Positive = 0.02
    """Peak learning rate of Muon. At a learning rate of 1, the root mean square of an update is about 1 / sqrt(columns)."""
    momentum: ShareBelowOne = 0.95
    """Nesterov momentum."""
    momentum_warmup: CountOrZero = 0
    """Number of steps over which the momentum rises from 0.85 to its value."""
    newton_schulz: Literal["polar_express", "classic"] = "polar_express"
    """Coefficients of the Newton-Schulz iteration: polar_express (Amsel et al. 2025) or classic (Jordan et al. 2024)."""
    newton_schulz_steps: Count = 3
    """Number of Newton-Schulz iterations. 3 with polar_express are about as accurate as 5 with classic."""
    newton_schulz_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the Newton-Schulz iteration. auto means bf16 on hardware with bf16 matrix units (GPUs since Ampere, CPUs with
    AMX) and fp32 otherwise."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of the weights that Muon updates. Each step decays them by this times the learning rate."""
    cautious_weight_decay: Flag = False
    """Apply weight decay only to weights that the update moves toward zero (Chen et al. 2025)."""
    adamw_lr: Positive = 4e-3
    """Peak learning rate of the weights that AdamW updates."""
    betas: Betas = (0.9, 0.95)
    """The betas of AdamW."""
    eps: Positive = 1e-8
    """The epsilon of AdamW."""


Optimizer = Annotated[MuonOptimizer | AdamWOptimizer, Field(discriminator="name")]


def _default_optimizer(value: object) -> object:
    """Use Muon for `auto` or if there is no name. It reached a lower loss than AdamW (docs/lab-notebook.md, "Ablation")."""
    if isinstance(value, dict) and value.get("name", "auto") == "auto":
        return {**value, "name": "muon"}
    return value


class ScheduleWithFloor(Section):
    """The keys of the schedules whose learning rate falls at the end."""

    warmup: Warmup = 0.02
    """Linear warmup: a number of steps, or below 1 a share of the training."""
    floor: Share = 0.0
    """Final learning rate as a share of the peak learning rate."""


class WsdSchedule(ScheduleWithFloor):
    """Warmup, then the peak learning rate, then a linear cooldown to the floor (Hu et al. 2024)."""

    name: Literal["wsd"]
    cooldown: Share = 0.6
    """The share of the training spent in cooldown."""


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
    """Linear warmup: a number of steps, or below 1 a share of the training."""


Schedule = Annotated[WsdSchedule | CosineSchedule | LinearSchedule | ConstantSchedule, Field(discriminator="name")]


def _default_schedule(value: object) -> object:
    return {"name": "wsd", **value} if isinstance(value, dict) else value


class LoraSection(Section):
    """Low-rank adaptation (Hu et al. 2022). Each weight W is frozen, and a trained product (alpha / rank) B A is added to it, which
    starts at zero."""

    rank: Count = 8
    """Number of rows of A and number of columns of B."""
    alpha: Positive = 16.0
    """The product B A is scaled by alpha / rank."""
    targets: Targets = LORA_TARGETS
    """The linear layers of each block that get an adapter."""


LENGTHS = ("steps", "tokens", "epochs", "minutes")
"""The keys of `training:` that set the training length."""


class GuardsSection(Section):
    """What to do about non-finite losses and gradients, and about loss spikes."""

    patience: Count = 3
    """Number of consecutive steps skipped for a non-finite loss or gradient before a rollback to the last good checkpoint."""
    rollbacks: CountOrZero = 1
    """Maximum number of rollbacks, each of which continues past the offending batches. After that, training stops with a report."""
    spike: OptionalPositive = 12.0
    """Flag a loss that is this many deviations above the median of the last 64. A deviation is 1.48 times the median absolute
    deviation. null means never."""


class TrainingSection(Section):
    """Training length, batch size, precision and optimizer. Set exactly one of steps, tokens, epochs and minutes."""

    steps: OptionalCount = None
    """Number of optimizer steps."""
    tokens: OptionalCount = None
    """Number of training tokens, rounded up to whole steps."""
    epochs: OptionalPositive = None
    """Number of passes over the training text, rounded up to whole steps."""
    minutes: OptionalPositive = None
    """Wall-clock minutes of training, including compilation and evaluation. The schedule then follows the elapsed time."""
    global_batch_size: Count = 64
    """Number of sequences per optimizer step."""
    micro_batch_size: CountOrAuto = "auto"
    """Number of sequences per forward pass. It must divide global_batch_size. auto chooses a size that fits in memory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of matrix products. Weights and optimizer state are always float32. auto chooses bf16 or fp16 if the
    device supports it and it is faster, else fp32."""
    lora: LoraSection | None = None
    """Train only low-rank adapters of the model that `model.init_from` loads. The optimizer is then AdamW."""
    optimizer: Annotated[Optimizer, BeforeValidator(_default_optimizer), BeforeValidator(_expand_name)] = MuonOptimizer(name="muon")
    """The optimizer, as a name or as a section: muon, adamw or auto, which means muon."""
    schedule: Annotated[Schedule, BeforeValidator(_default_schedule), BeforeValidator(_expand_name)] = WsdSchedule(name="wsd")
    """The learning rate schedule, as a name or as a section: wsd, cosine, linear or constant."""
    clip_grad_norm: ClipNorm = 1.0
    """Maximum norm of the gradient of all parameters together. off means no clipping."""
    compile: FlagOrAuto = "auto"
    """Compile the blocks with torch.compile. auto compiles if that saves more time than the compilation takes."""
    activation_checkpointing: Flag = False
    """Save only the input of each block and recompute the rest in the backward pass. This saves memory and takes more time."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes share the model: ddp replicates it, fsdp shards it, auto uses ddp if the model fits in memory."""
    guards: GuardsSection = GuardsSection()
    """What to do about non-finite losses and loss spikes."""
    log_every: Count = 10
    """Number of steps between lines of metrics.jsonl."""

    @model_validator(mode="before")
    @classmethod
    def _adamw_for_lora(cls, values: Any) -> Any:
        """With LoRA, the default is AdamW. Muon orthogonalizes full matrices, which makes no sense for low-rank factors."""
        if not isinstance(values, dict) or values.get("lora") is None:
            return values
        optimizer = _expand_name(values.get("optimizer", {}))
        if not isinstance(optimizer, dict) or optimizer.get("name", "auto") != "auto":
            return values
        return {**values, "optimizer": {**optimizer, "name": "adamw"}}


class EvaluationSection(Section):
    """Evaluation on the held-out text during training."""

    every: Count = 100
    """Number of steps between evaluations. The last step is always evaluated."""
    max_tokens: OptionalCount = None
    """Evaluate only on the first max_tokens held-out tokens. null means all."""
    stride: OptionalCount = None
    """Number of tokens from the start of one window to the next. Below context_length, tokens are scored with more context, which
    takes more time. null means context_length."""


class CheckpointSection(Section):
    """Checkpoints during training."""

    every: Count = 100
    """Number of steps between checkpoints. Evaluated steps and the last step are saved as well."""
    keep: CountOrZero = 2
    """Number of recent checkpoints to keep in addition to best and last."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What to do if a checkpoint cannot be written, for example because the disk is full: stop the training, or continue with a
    warning and try again at the next checkpoint."""


class SamplingSection(Section):
    """Samples generated during training, written to samples.md."""

    every: OptionalCount = None
    """Number of steps between samples. null means no samples."""
    prompts: Texts = ("",)
    """The prompts to continue. An empty prompt starts a new document."""
    max_new_tokens: Count = 80
    """Number of tokens to generate for each prompt."""
    temperature: NotNegative = 0.8
    """Sampling temperature. 0 is greedy."""
    top_k: OptionalCount = 50
    """Sample from the top_k most likely tokens. null means all."""


class Recipe(Section):
    """A complete experiment: text, tokenizer, model, training, evaluation, checkpoints and samples."""

    name: str = "run"
    """The run is written to runs/NAME."""
    seed: Seed = 1337
    """Seed of the initial weights, the data order and dropout."""
    data: DataSection
    tokenizer: Annotated[TokenizerSection, Field(discriminator="kind"), BeforeValidator(_default_tokenizer)] = BpeTokenizer(
        kind="bpe"
    )
    """How text is split into tokens: a tokenizer that is learned from the training text, or an existing one."""
    model: ModelSection = Field(default_factory=lambda: DecoderSection.model_validate({}))
    """The network: its architecture, by default decoder, and the keys of this architecture."""
    objective: ObjectiveSection = CausalLMObjective()
    """What the model learns to predict, as a name or as a section. The default for architecture decoder is causal_lm."""
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    sampling: SamplingSection = SamplingSection()

    @model_validator(mode="before")
    @classmethod
    def _default_objective(cls, values: Any) -> Any:
        """If the objective has no name, set it to the default objective of the architecture."""
        if not isinstance(values, dict):
            return values
        objective = _expand_name(values.get("objective", {}))
        if not isinstance(objective, dict):
            return values
        model = values.get("model")
        architecture = model.get("architecture") if isinstance(model, dict) else getattr(model, "architecture", None)
        section = MODEL_VARIANTS.sections(DecoderSection).get(str(architecture), DecoderSection)
        assert issubclass(section, ModelVariant)
        return {**values, "objective": {"name": section.objectives[0], **objective}}

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain values, including every default. `load` reads them back as an equal recipe."""
        values: dict[str, Any] = to_plain(self.model_dump())
        heldout = values["data"]["heldout"]
        values["data"]["heldout"] = heldout.get("sources", heldout)
        for key in LENGTHS:
            if values["training"][key] is None:
                del values["training"][key]
        return values

    def to_yaml(self) -> str:
        return dump_yaml(self.as_dict())


def register_model_section(section: type[ModelVariant]) -> None:
    """Add an architecture to `model:`. Recipes, `--set`, error messages and the reference then include the keys of `section`.

    Raises `ValueError` if the architecture already exists, or if `section` does not have the key `context_length`.
    """
    if "context_length" not in section.model_fields:
        raise ValueError(f"{section.__name__} needs the key context_length")
    _register(MODEL_VARIANTS, "model", section)


def register_objective_section(section: type[ObjectiveVariant]) -> None:
    """Add an objective to `objective:`. Raises `ValueError` if an objective with this name already exists."""
    _register(OBJECTIVE_VARIANTS, "objective", section)


def _register(variants: OpenUnion, key: str, section: type[Section]) -> None:
    field = section.model_fields[variants.discriminator]
    if field.default in variants.sections(Recipe.model_fields[key].annotation):
        raise ValueError(f"{variants.discriminator} {field.default} exists already")
    variants.add(section)
    Recipe.model_rebuild(force=True)


def unregister_section(section: type[ModelVariant] | type[ObjectiveVariant]) -> None:
    """Remove an architecture or objective that was registered."""
    (MODEL_VARIANTS if issubclass(section, ModelVariant) else OBJECTIVE_VARIANTS).remove(section)
    Recipe.model_rebuild(force=True)


def dump_yaml(values: dict[str, Any]) -> str:
    """The YAML text of a recipe."""
    text: str = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    return text


def to_plain(value: Any) -> Any:
    """`value` with tuples converted to lists at every level, because YAML has no tuples."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, as in `--set`: {"a": {"b": 1}} becomes {"a.b": 1}."""
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
    """The keys in which two recipes differ, each with the values before and after."""
    old, new = flattened(before.as_dict()), flattened(after.as_dict())
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}
