"""The recipe: one typed, frozen section per room, each key with its meaning and unit.

A recipe that exists is valid by itself; what depends on two sections or on the outside world is in `checks`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from tinylm.recipe.notation import Dumper
from tinylm.recipe.presets import PRESETS
from tinylm.recipe.values import (
    LORA_TARGETS,
    Alphabet,
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
    """A part of a recipe. Unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


def _named(value: object) -> object:
    """Let `optimizer: adamw` stand for `optimizer: {name: adamw}`."""
    return {"name": value} if isinstance(value, str) else value


class HeldoutShare(Section):
    """Hold out a share of the training text."""

    share: OpenShare = 0.1
    """Of the characters, or of the documents."""
    by: Literal["document", "tail"] = "tail"
    """document: by a hash of each document's text. tail: the last share of the characters."""


class HeldoutSources(Section):
    """Hold out a text of its own."""

    sources: Sources
    """Instead of a share: `heldout: b.txt` says the same."""


def _heldout(value: object) -> object:
    if isinstance(value, (str, list, tuple)):
        return {"sources": value}
    if isinstance(value, float):
        return {"share": value}
    return value


def _heldout_form(value: object) -> str:
    return "sources" if isinstance(value, HeldoutSources) or (isinstance(value, dict) and "sources" in value) else "share"


Heldout = Annotated[
    Annotated[HeldoutShare, Tag("share")] | Annotated[HeldoutSources, Tag("sources")],
    Discriminator(_heldout_form),
    BeforeValidator(_heldout),
]


class DataSection(Section):
    """Which text is learned and which is only measured."""

    train: Sources
    """The text that is learned from."""
    heldout: Heldout = HeldoutShare()
    """The text that is only measured: a SOURCE, or a share of the other."""
    field: str = "text"
    """The field of a .jsonl line or the column of a .parquet file that holds the text."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: an error, or U+FFFD in their place."""


class LearnedTokenizer(Section):
    """What tokenizers of every kind can be asked for. They learn from the training half of the text only."""

    kind: str
    normalize: Normalizations = ()
    """What is done to text before it is encoded, and cannot be undone: nfc, nfd, nfkc, nfkd, lowercase, strip_accents."""
    special_tokens: TokenList = ()
    """Control tokens beside the end of text; text that spells one is still text."""
    added_tokens: TokenList = ()
    """Strings that are always one token, whatever stands around them."""


class VocabularyTokenizer(LearnedTokenizer):
    """A vocabulary of a chosen size, learned from counted words."""

    vocab_size: Count = 4096
    """Tokens wanted, the end-of-text token and all others included."""
    allow_smaller: Flag = True
    """Take fewer, with a warning, where the text has no more to give; false: an error that names the largest that fits."""
    max_megabytes: Megabytes = 64
    """Words are counted in this much text at the most, every n-th piece of a longer one."""


class BpeTokenizer(VocabularyTokenizer):
    """Byte-pair encoding, of bytes or of characters."""

    kind: Literal["bpe"]
    split: str = "gpt4"
    """Where merges may not reach across: gpt4, gpt2, llama3, whitespace, none (lines only) or a regular expression."""
    digits: OptionalCount = None
    """Longest run of digits in one token; null: 2 for gpt4, 3 for llama3, no limit for others."""
    min_frequency: Count = 1
    """Occurrences that a pair needs to be merged."""
    max_token_length: OptionalCount = None
    """Most bytes (of an alphabet of characters: most characters) in a token; null: no limit."""
    alphabet: Alphabet = "bytes"
    """What merges start from: bytes, text (its characters), a number (its most frequent characters), or the characters."""
    byte_fallback: Flag = True
    """Characters outside the alphabet become bytes; false: the unknown token."""
    dropout: ShareBelowOne = 0.0
    """Share of merges left out at random while the training half is encoded (Provilkov et al. 2020); never elsewhere."""


class UnigramTokenizer(VocabularyTokenizer):
    """The Unigram language model of SentencePiece (Kudo 2018)."""

    kind: Literal["unigram"]
    split: str = "gpt4"
    """Where pieces may not reach across, as for bpe."""
    digits: OptionalCount = None
    """Longest run of digits in one piece, as for bpe."""
    max_token_length: Count = 16
    """Most characters in a piece."""
    alphabet: Characters = "text"
    """Characters that are pieces of their own: text, a number, or the characters."""
    byte_fallback: Flag = True
    """Other characters become bytes; false: the unknown token."""


class WordPieceTokenizer(VocabularyTokenizer):
    """WordPiece as BERT has it: words without their spaces, `##` before a piece inside a word."""

    kind: Literal["wordpiece"]
    split: str = "bert"
    """What a word is: bert (punctuation apart), whitespace, or a regular expression within what stands between spaces."""
    min_frequency: Count = 1
    """Occurrences that a pair needs to be merged."""
    max_token_length: OptionalCount = None
    """Most characters in a piece; null: no limit."""
    alphabet: Characters = "text"
    """Characters that are pieces of their own: text, a number, or the characters. A word with another is unknown."""


class WordTokenizer(VocabularyTokenizer):
    """Whole words, the most frequent ones; others are unknown."""

    kind: Literal["word"]
    split: str = "bert"
    """What a word is, as for wordpiece."""
    min_frequency: Count = 1
    """Occurrences that a word needs."""


class CharTokenizer(LearnedTokenizer):
    """One token per character of the training half; others become <|unknown|>."""

    kind: Literal["char"]
    min_frequency: Count = 1
    """Occurrences that a character needs."""


class ByteTokenizer(LearnedTokenizer):
    """One token per byte of UTF-8."""

    kind: Literal["byte"]


LEARNED: tuple[type[LearnedTokenizer], ...] = (
    BpeTokenizer,
    UnigramTokenizer,
    WordPieceTokenizer,
    WordTokenizer,
    CharTokenizer,
    ByteTokenizer,
)


class FileTokenizer(Section):
    """A tokenizer.json, used as it is."""

    kind: Literal["file"]
    path: str
    """The file."""


def _tokenizer(value: object) -> object:
    if isinstance(value, dict) and "kind" not in value:
        return {"kind": "file" if "path" in value else "bpe", **value}
    return {"kind": value} if isinstance(value, str) else value


TokenizerSection = (
    BpeTokenizer | UnigramTokenizer | WordPieceTokenizer | WordTokenizer | CharTokenizer | ByteTokenizer | FileTokenizer
)


class InitFrom(Section):
    """A run whose weights to start from, instead of from chance."""

    run: str
    """A run folder, whose best checkpoint is taken, or one checkpoint folder inside it."""
    head: Flag = True
    """false: the head starts anew, and with another tokenizer everything that is looked up by token too."""


def _init_from(value: object) -> object:
    return {"run": value} if isinstance(value, str) else value


class ModelSection(Section):
    """The transformer. `preset` gives the parts their defaults; each can be set on its own.

    With `init_from`, what is not set is as in that run, the tokenizer too.
    """

    preset: Literal["modern", "gpt2", "llama"] = "modern"
    """What the parts below are by default."""
    n_layer: Count = 6
    """Blocks."""
    n_head: Count = 6
    """Heads of attention in each."""
    n_kv_head: OptionalCount = None
    """Key/value heads for grouped-query attention; null: as many as n_head."""
    n_embd: Count = 384
    """Width of the residual stream."""
    head_dim: OptionalCount = None
    """Width of a head; null: n_embd / n_head."""
    context_length: Count = 256
    """Tokens in a training sequence, and the most that the model looks back."""
    norm: Literal["layernorm", "rmsnorm"]
    """Which norm there is before (or after) attention and feed-forward."""
    norm_position: Literal["pre", "post"]
    """Before each of them, with one more before the head, or after each sum."""
    norm_eps: Positive
    """What is added under the square root."""
    norm_gain: Flag
    """Norms multiply by a learned gain."""
    position: Literal["learned", "sinusoidal", "rope", "none"]
    """How positions are told: a learned or a sinusoidal embedding, rotary queries and keys, or not."""
    rope_theta: OptionalPositive = None
    """Base of the rotary frequencies, for position rope; null: 10000."""
    feed_forward: Literal["gelu", "gelu_exact", "relu", "relu2", "swiglu"]
    """gelu is GPT-2's, by tanh; gelu_exact by the error function."""
    feed_forward_multiple: Positive
    """Hidden width over n_embd; the product is rounded to the nearest multiple of 8."""
    n_inner: OptionalCount = None
    """Hidden width as a number; null: by feed_forward_multiple."""
    bias: Flag
    """Linear layers and layer norms add a learned bias."""
    tie_embeddings: Flag
    """The head is the token embedding."""
    qk_norm: Flag
    """RMS-normalise queries and keys per head before positions are applied."""
    qk_gain: Flag = True
    """With qk_norm: multiply them by a learned gain."""
    embedding_norm: Flag
    """Normalise the token embedding before the first block."""
    zero_init_outputs: Flag
    """Start the last projection of each attention and feed-forward at zero, so that every block starts as the identity, the
    head near zero, and the other matrices at 0.5 / sqrt(inputs)."""
    ngram_embeddings: Orders = ()
    """Orders n of the n-grams whose hashed embedding is added to each token's (Pagnoni et al. 2024): [2, 3]; []: none."""
    ngram_rows: Count = 16384
    """Rows of the table of each order."""
    ngram_width: Count = 32
    """Numbers in a row."""
    ngram_dropout: ShareBelowOne = 0.0
    """Share of the positions whose n-gram of an order is left out while training: tables learn a text by heart very soon."""
    value_embeddings: CountOrZero = 0
    """How many first and how many last blocks add an embedding of the token to their values (Zhou et al. 2024)."""
    value_residual: Flag = False
    """Blend the first block's values into every later block's, in a learned share (Zhou et al. 2024)."""
    embedding_shortcut: Flag = False
    """Every block reads a learned blend of the residual stream and the embedding."""
    parallel_residual: Flag = False
    """Attention and feed-forward read the same input and are added together (GPT-NeoX)."""
    dropout: ShareBelowOne = 0.0
    """Of the embedding, and of what each block adds."""
    attention_dropout: OptionalShareBelowOne = None
    """Of attention's probabilities; null: as `dropout`. A CPU has no fused attention with it: it takes twice the time."""
    logit_softcap: OptionalPositive = None
    """Cap c: logits become c * tanh(logits / c)."""
    init_embeddings: OptionalPath = None
    """Start the token embedding from these vectors: a folder of `tinylm embed train`, or a file of any format it reads."""
    freeze_embeddings: Flag = False
    """Leave the token embedding as init_embeddings made it."""
    init_from: Annotated[InitFrom | None, BeforeValidator(_init_from)] = None
    """A run to start from (all its weights, or {run: RUN, head: off})."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "modern")
        return {**PRESETS.get(preset if isinstance(preset, str) else "modern", PRESETS["modern"]), **values}

    @property
    def uses_dropout(self) -> bool:
        """Whether training draws random numbers: dropout of any kind."""
        return self.dropout > 0 or self.attention_drops > 0 or (self.ngram_dropout > 0 and bool(self.ngram_embeddings))

    @property
    def attention_drops(self) -> float:
        """`attention_dropout`, or what it is by default."""
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


class AdamWOptimizer(Section):
    """AdamW (Loshchilov & Hutter 2019); decay on matrices only."""

    name: Literal["adamw"]
    lr: Positive = 1e-3
    """Learning rate at its peak."""
    betas: Betas = (0.9, 0.95)
    """Decay of the means of gradients and of their squares."""
    eps: Positive = 1e-8
    """Added to the root of the latter."""
    weight_decay: NotNegative = 0.1
    """Decoupled, on matrices, times lr."""


class MuonOptimizer(Section):
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for embeddings, head, gains and biases."""

    name: Literal["muon"]
    lr: Positive = 0.02
    """Rate of the matrices: per unit of rate the update's root-mean-square is about 1 / sqrt(columns)."""
    momentum: ShareBelowOne = 0.95
    """Nesterov momentum."""
    momentum_warmup: CountOrZero = 0
    """Steps over which the momentum rises from 0.85."""
    newton_schulz: Literal["polar_express", "classic"] = "polar_express"
    """Coefficients of the iteration that makes updates orthogonal (Amsel et al. 2025; Jordan et al. 2024)."""
    newton_schulz_steps: Count = 3
    """Iterations: 3 of polar_express do what 5 of classic do."""
    newton_schulz_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on devices with units for it (GPUs since Ampere, processors with AMX), else fp32."""
    weight_decay: NotNegative = 0.1
    """Decoupled, on what Muon updates, times lr."""
    cautious_weight_decay: Flag = False
    """Decay only where the update moves a weight towards zero (Chen et al. 2025)."""
    adamw_lr: Positive = 4e-3
    """Rate of what AdamW updates."""
    betas: Betas = (0.9, 0.95)
    """Of AdamW."""
    eps: Positive = 1e-8
    """Of AdamW."""


Optimizer = Annotated[MuonOptimizer | AdamWOptimizer, Field(discriminator="name")]


def _optimizer(value: object) -> object:
    """`auto`, and a mapping without a name, mean Muon: it needed the fewest seconds to every loss in benchmarks/README.md."""
    value = _named(value)
    if isinstance(value, dict) and value.get("name", "auto") == "auto":
        return {**value, "name": "muon"}
    return value


class ScheduleWithFloor(Section):
    warmup: Warmup = 0.02
    """Linear warm-up: steps, or a share of the training when below 1."""
    floor: Share = 0.0
    """Rate at the end, as a share of the peak."""


class WsdSchedule(ScheduleWithFloor):
    """Warm-up, stable, linear cool-down (Hu et al. 2024)."""

    name: Literal["wsd"]
    cooldown: Share = 0.6
    """Share of the training spent cooling down."""


class CosineSchedule(ScheduleWithFloor):
    """Warm-up, then half a cosine down to the floor."""

    name: Literal["cosine"]


class LinearSchedule(ScheduleWithFloor):
    """Warm-up, then a straight line down to the floor."""

    name: Literal["linear"]


class ConstantSchedule(Section):
    """Warm-up, then the peak rate."""

    name: Literal["constant"]
    warmup: Warmup = 0.02
    """Linear warm-up: steps, or a share of the training when below 1."""


Schedule = Annotated[WsdSchedule | CosineSchedule | LinearSchedule | ConstantSchedule, Field(discriminator="name")]


def _schedule(value: object) -> object:
    value = _named(value)
    return {"name": "wsd", **value} if isinstance(value, dict) else value


class LoraSection(Section):
    """Low-rank adaptation (Hu et al. 2022): W stays, and (alpha / rank) B A, which starts at zero, is learned beside it."""

    rank: Count = 8
    """Rows of A and columns of B."""
    alpha: Positive = 16.0
    """What is added is scaled by alpha / rank."""
    targets: Targets = LORA_TARGETS
    """The matrices of every block that get an addition."""


class GuardsSection(Section):
    """What happens when a loss or a gradient is not a number, or a loss jumps."""

    patience: Count = 3
    """Steps in a row without a usable gradient, each left out, before the training goes back to its last good checkpoint."""
    rollbacks: CountOrZero = 1
    """How often it goes back, and on past the text that did it, before it gives up with a report."""
    spike: OptionalPositive = 12.0
    """Flag a loss so many deviations (1.48 times the median absolute one) above the median of the last 64; null: never."""


class TrainingSection(Section):
    """How long, in what batches, with which optimiser. Exactly one of steps, tokens, epochs, minutes."""

    steps: OptionalCount = None
    """Optimiser steps."""
    tokens: OptionalCount = None
    """Tokens read in all, rounded up to whole steps."""
    epochs: OptionalPositive = None
    """Passes over the text, rounded up to whole steps."""
    minutes: OptionalPositive = None
    """Wall-clock of training, compiling and evaluating included; the schedule follows the clock."""
    global_batch_size: Count = 64
    """Sequences per optimiser step."""
    micro_batch_size: CountOrAuto = "auto"
    """Sequences per forward pass; it must divide global_batch_size."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of matrix products; weights and optimiser state stay float32."""
    lora: LoraSection | None = None
    """Train low-rank additions to the model of `model.init_from`, and nothing else; the optimizer is then AdamW."""
    optimizer: Annotated[Optimizer, BeforeValidator(_optimizer)] = MuonOptimizer(name="muon")
    """muon, adamw or auto (muon); alone or with their keys."""
    schedule: Annotated[Schedule, BeforeValidator(_schedule)] = WsdSchedule(name="wsd")
    """How the rates rise and fall: wsd, cosine, linear, constant; alone or with their keys."""
    clip_grad_norm: ClipNorm = 1.0
    """The most that the norm of all gradients together may be."""
    compile: FlagOrAuto = "auto"
    """Fuse the element-wise work of the blocks (torch.compile); auto: where the training is long enough to earn it back."""
    activation_checkpointing: Flag = False
    """Keep only what each block reads and compute the rest again for the backward pass: less memory, more time."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes: ddp (the whole model in each), fsdp (spread over them), auto: ddp where the model leaves room."""
    guards: GuardsSection = GuardsSection()
    """What happens when numbers go bad."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""

    @model_validator(mode="before")
    @classmethod
    def _adamw_for_lora(cls, values: Any) -> Any:
        """What an unnamed optimizer is: Muon's updates, of full rank, have no meaning for two factors."""
        if not isinstance(values, dict) or values.get("lora") is None:
            return values
        optimizer = _named(values.get("optimizer", {}))
        if not isinstance(optimizer, dict) or optimizer.get("name", "auto") != "auto":
            return values
        return {**values, "optimizer": {**optimizer, "name": "adamw"}}


class EvaluationSection(Section):
    """Measuring on the held-out text while training."""

    every: Count = 100
    """Steps between evaluations; the last step is always evaluated."""
    max_tokens: OptionalCount = None
    """Evaluate on the first this many held-out tokens only; null: on all."""
    stride: OptionalCount = None
    """Tokens between windows; fewer than context_length: more context for each token, and more time. null: context_length."""


class CheckpointSection(Section):
    every: Count = 100
    """Steps between checkpoints; evaluated steps and the last one are always saved."""
    keep: CountOrZero = 2
    """Recent checkpoints kept beside best and last."""
    on_failure: Literal["stop", "continue"] = "stop"
    """When the disk refuses one (full, read-only, removed): end the training, or warn and try again at the next."""


class SamplingSection(Section):
    """What the model writes as it learns, into samples.md."""

    every: OptionalCount = None
    """Steps between samples; null: none."""
    prompts: Texts = ("",)
    """What is continued; the empty text begins a document."""
    max_new_tokens: Count = 80
    """Length of each."""
    temperature: NotNegative = 0.8
    """0 takes the likeliest token."""
    top_k: OptionalCount = 50
    """Choose among this many likeliest tokens; null: among all."""


class Recipe(Section):
    """A whole experiment: text, tokenizer, model, training, and how it is measured and kept."""

    name: str = "run"
    """The run goes to runs/NAME."""
    seed: Seed = 1337
    """Of starting weights, data order and dropout."""
    data: DataSection
    tokenizer: Annotated[TokenizerSection, Field(discriminator="kind"), BeforeValidator(_tokenizer)] = BpeTokenizer(kind="bpe")
    model: ModelSection = Field(default_factory=lambda: ModelSection.model_validate({}))
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    sampling: SamplingSection = SamplingSection()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, defaults written out, in the notation that `load` reads back to an equal recipe."""
        values: dict[str, Any] = plain(self.model_dump())
        heldout = values["data"]["heldout"]
        values["data"]["heldout"] = heldout.get("sources", heldout)
        for key in ("steps", "tokens", "epochs", "minutes"):
            if values["training"][key] is None:
                del values["training"][key]
        return values

    def to_yaml(self) -> str:
        return written(self.as_dict())


def written(values: dict[str, Any]) -> str:
    """Plain values as the YAML of a recipe."""
    text: str = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    return text


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down: what YAML can hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}: the keys as `--set` names them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class Described(Protocol):
    """A recipe of any kind."""

    def as_dict(self) -> dict[str, Any]: ...


def changes(before: Described, after: Described) -> dict[str, tuple[Any, Any]]:
    """The keys in which two recipes differ, with both values."""
    old, new = flattened(before.as_dict()), flattened(after.as_dict())
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}
