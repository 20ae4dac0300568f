"""Checks that involve several keys of a recipe, or files: sizes divide each other, and files exist and are large enough.

Yields the problems of a recipe, whose keys are each valid, as (key path, message).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence

from tinylm.recipe.embeddings import EmbeddingRecipe, TokenVocabulary, Word2VecMethod
from tinylm.recipe.schema import (
    LENGTHS,
    BpeTokenizer,
    FileTokenizer,
    HeldoutShare,
    HeldoutSources,
    MuonOptimizer,
    Recipe,
    UnigramTokenizer,
    VocabularyTokenizer,
    WordPieceTokenizer,
    WsdSchedule,
)

KeyPath = tuple[str | int, ...]
"""The path of a key from the top of the recipe: ("training", "optimizer", "lr")."""
END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unknown|>"
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".parquet")


def check_recipe(recipe: Recipe, check_files: bool = True) -> Iterator[tuple[KeyPath, str]]:
    """Yield each problem as (key path, message). With `check_files`, also check that files exist and how large they are."""
    yield from _check_model(recipe)
    yield from _check_tokenizer(recipe)
    yield from _check_training(recipe)
    if check_files:
        yield from _check_files(recipe)


def check_embedding_recipe(recipe: EmbeddingRecipe, check_files: bool = True) -> Iterator[tuple[KeyPath, str]]:
    """`check_recipe` for a recipe for embeddings."""
    method = recipe.method
    if isinstance(method, Word2VecMethod) and method.lr_end > method.lr:
        yield ("method", "lr_end"), f"must not exceed lr {method.lr:g}, because the learning rate decays, not {method.lr_end:g}"
    if check_files:
        yield from _missing(("data", "train"), recipe.data.train)
        if isinstance(recipe.vocabulary, TokenVocabulary):
            yield from _missing(("vocabulary", "tokenizer"), (recipe.vocabulary.tokenizer,))


def _check_model(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    model = recipe.model
    if model.init_from is not None and model.init_embeddings is not None:
        yield ("model", "init_embeddings"), "cannot be combined with init_from, which already loads an embedding"
    if model.head_dim is None and model.n_embd % model.n_head:
        divisors = [heads for heads in range(1, model.n_embd + 1) if model.n_embd % heads == 0]
        nearest = min(divisors, key=lambda heads: abs(heads - model.n_head))
        yield (
            ("model", "n_head"),
            f"{model.n_head} heads do not divide the width n_embd {model.n_embd} ({nearest} heads would)",
        )
    elif model.position == "rope" and model.head_width % 2:
        width = "n_embd / n_head" if model.head_dim is None else "head_dim"
        yield ("model", "n_head"), f"rope needs an even head width, and {width} is {model.head_width}"
    if model.n_head % model.kv_heads:
        yield ("model", "n_kv_head"), f"{model.kv_heads} key/value heads do not divide the {model.n_head} query heads"
    if model.position == "sinusoidal" and model.n_embd % 2:
        yield ("model", "n_embd"), f"sinusoidal positions need an even width, not {model.n_embd}"
    if model.rope_theta is not None and model.position != "rope":
        yield ("model", "rope_theta"), f"needs position: rope, and position is {model.position}"
    if model.freeze_embeddings and model.init_embeddings is None:
        yield ("model", "freeze_embeddings"), "needs init_embeddings"
    elif model.freeze_embeddings and model.tie_embeddings:
        yield ("model", "freeze_embeddings"), "cannot be combined with tie_embeddings, which also uses them as the head's weights"
    stride = recipe.evaluation.stride
    if stride is not None and stride > model.context_length:
        yield (
            ("evaluation", "stride"),
            f"must not exceed context_length {model.context_length}, or tokens between windows would be skipped, not {stride}",
        )


def _check_tokenizer(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    tokenizer = recipe.tokenizer
    if isinstance(tokenizer, FileTokenizer):
        return
    both = {*tokenizer.special_tokens} & {*tokenizer.added_tokens}
    if both:
        yield ("tokenizer", "added_tokens"), f"{min(both)!r} is also in special_tokens (remove it from one of them)"
    for key in ("special_tokens", "added_tokens"):
        reserved = {END_OF_TEXT, UNKNOWN} & {*getattr(tokenizer, key)}
        if reserved:
            yield ("tokenizer", key), f"{min(reserved)} is always in the vocabulary (remove it)"
    if isinstance(tokenizer, VocabularyTokenizer):
        extra = len(tokenizer.special_tokens) + len(tokenizer.added_tokens)
        has_bytes = isinstance(tokenizer, (BpeTokenizer, UnigramTokenizer)) and (
            tokenizer.alphabet == "bytes" or tokenizer.byte_fallback
        )
        parts = ["the 256 bytes"] * has_bytes + ["the end-of-text token"] + ["the special and added tokens"] * (extra > 0)
        minimum = 256 * has_bytes + 1 + extra
        if tokenizer.vocab_size < minimum:
            yield (
                ("tokenizer", "vocab_size"),
                f"must be at least {minimum} for {tokenizer.kind} ({listed(parts)}), not {tokenizer.vocab_size}",
            )
    if isinstance(tokenizer, BpeTokenizer) and tokenizer.alphabet == "bytes" and not tokenizer.byte_fallback:
        yield ("tokenizer", "byte_fallback"), "can only be off if alphabet is not bytes"
    if isinstance(tokenizer, (UnigramTokenizer, WordPieceTokenizer)) and tokenizer.alphabet == "bytes":
        yield ("tokenizer", "alphabet"), f"{tokenizer.kind} works on characters (use text, a number, or the characters themselves)"


def _check_training(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    training = recipe.training
    lengths = [key for key in LENGTHS if getattr(training, key) is not None]
    if not lengths:
        yield ("training",), f"set how long to train with one of {', '.join(LENGTHS)}"
    elif len(lengths) > 1:
        yield ("training", lengths[1]), f"only one of {', '.join(LENGTHS)} can be set, and {lengths[0]} is set"
    if training.lora is not None:
        if recipe.model.init_from is None:
            yield ("training", "lora"), "needs a trained model to adapt (set model.init_from to its run)"
        if isinstance(training.optimizer, MuonOptimizer):
            yield ("training", "optimizer"), "must be adamw if lora is set (or remove its name)"
    micro, batch = training.micro_batch_size, training.global_batch_size
    if micro != "auto" and batch % micro:
        divisors = [size for size in range(1, batch + 1) if batch % size == 0]
        nearest = sorted(sorted(divisors, key=lambda size: abs(size - micro))[:2])
        yield (
            ("training", "micro_batch_size"),
            f"{micro} does not divide global_batch_size {batch} ({' or '.join(map(str, nearest))} would)",
        )
    schedule = training.schedule
    if training.steps is not None and schedule.warmup >= 1 and schedule.warmup > training.steps:
        yield (
            ("training", "schedule", "warmup"),
            f"{schedule.warmup} warmup steps exceed the {training.steps} training steps",
        )
    warmup = schedule.warmup / (training.steps or math.inf) if schedule.warmup >= 1 else schedule.warmup
    if isinstance(schedule, WsdSchedule) and warmup <= 1 < warmup + schedule.cooldown:
        yield ("training", "schedule", "cooldown"), "warmup and cooldown together exceed the whole training"
    if training.minutes is not None and schedule.warmup >= 1:
        yield ("training", "schedule", "warmup"), "must be a share below 1 when training.minutes is set"


def _check_files(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Check local files, and the sizes of uncompressed ones. Other sources are checked when `tinylm.text` reads them."""
    sizes = {"training": _plain_size(recipe.data.train)}
    yield from _missing(("data", "train"), recipe.data.train)
    if isinstance(recipe.tokenizer, FileTokenizer):
        yield from _missing(("tokenizer", "path"), (recipe.tokenizer.path,))
    if recipe.model.init_embeddings is not None:
        yield from _missing(("model", "init_embeddings"), (recipe.model.init_embeddings,))
    if recipe.model.init_from is not None and not os.path.exists(os.path.expanduser(recipe.model.init_from.run)):
        yield ("model", "init_from"), f"{recipe.model.init_from.run}: no such run"
    heldout = recipe.data.heldout
    if isinstance(heldout, HeldoutSources):
        yield from _missing(("data", "heldout"), heldout.sources)
        sizes["held-out"] = _plain_size(heldout.sources)
    elif isinstance(heldout, HeldoutShare) and sizes["training"] is not None and heldout.by == "tail":
        sizes["held-out"] = int(sizes["training"] * heldout.share)
    for name, size in sizes.items():
        if size is not None and 0 < size < recipe.model.context_length:
            yield ("model", "context_length"), f"{recipe.model.context_length} is longer than the {name} text ({size:,} bytes)"


def _is_plain(source: str) -> bool:
    special = source == "-" or source.startswith(("builtin:", "hf:", "imported:")) or "://" in source
    return not special and not any(sign in source for sign in "*?[")


def _missing(key: KeyPath, sources: tuple[str, ...]) -> Iterator[tuple[KeyPath, str]]:
    for source in sources:
        if _is_plain(source) and not os.path.exists(os.path.expanduser(source)):
            yield key, f"{source}: no such file or folder"


def _plain_size(sources: tuple[str, ...]) -> int | None:
    """Total size in bytes if every source is a local uncompressed file, else None."""
    paths = [os.path.expanduser(source) for source in sources]
    if all(_is_plain(s) and os.path.isfile(p) and not s.endswith(_COMPRESSED) for s, p in zip(sources, paths, strict=True)):
        return sum(os.path.getsize(path) for path in paths)
    return None


def listed(words: Sequence[str], conjunction: str = "and") -> str:
    """Join words for a sentence: `["a", "b", "c"]` becomes "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {conjunction} {words[-1]}"
