"""Checks that involve several keys of a recipe, or files: sizes divide each other, and files exist and are large enough.

Yields the problems of a recipe as (key path, message). Each key by itself has already been validated.
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
    """Yield each problem as (key path, message). With `check_files`, also check that files exist and are large enough."""
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
    model, objective = recipe.model, recipe.objective
    for key, problem in model.problems():
        yield ("model", key), problem
    if objective.name not in model.objectives and model.architecture not in objective.architectures:
        yield (
            ("objective",),
            f"architecture {model.architecture} cannot be trained with {objective.name} (only with {listed(model.objectives)})",
        )
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
    duplicates = {*tokenizer.special_tokens} & {*tokenizer.added_tokens}
    if duplicates:
        yield ("tokenizer", "added_tokens"), f"{min(duplicates)!r} is also in special_tokens (remove it from one of them)"
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
        if recipe.model.pretrained is None:
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
    """Check that local files exist, and the sizes of uncompressed files. `tinylm.text` checks other sources when it reads them."""
    sizes = {"training": _plain_size(recipe.data.train)}
    yield from _missing(("data", "train"), recipe.data.train)
    if isinstance(recipe.tokenizer, FileTokenizer):
        yield from _missing(("tokenizer", "path"), (recipe.tokenizer.path,))
    vectors, pretrained = recipe.model.pretrained_embeddings, recipe.model.pretrained
    if vectors is not None:
        yield from _missing(("model", "init_embeddings"), (vectors,))
    if pretrained is not None and not os.path.exists(os.path.expanduser(pretrained.run)):
        yield ("model", "init_from"), f"{pretrained.run}: no such run"
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
    return not special and not any(character in source for character in "*?[")


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
