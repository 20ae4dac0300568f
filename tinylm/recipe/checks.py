"""What a recipe's keys demand of each other: batches that divide, heads that fit, files that exist and are large enough."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

from tinylm.recipe.embeddings import EmbeddingRecipe, TokenVocabulary, Word2VecMethod
from tinylm.recipe.schema import (
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
END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unknown|>"
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".parquet")


def contradictions(recipe: Recipe, check_files: bool = True) -> Iterator[tuple[KeyPath, str]]:
    """Each problem as (key path, sentence). Reads nothing but file sizes, and those only with `check_files`."""
    yield from _model(recipe)
    yield from _training(recipe)
    if check_files:
        yield from _files(recipe)


def embedding_contradictions(recipe: EmbeddingRecipe, check_files: bool = True) -> Iterator[tuple[KeyPath, str]]:
    """The same for a recipe of embeddings."""
    method = recipe.method
    if isinstance(method, Word2VecMethod) and method.lr_end > method.lr:
        yield ("method", "lr_end"), f"{method.lr_end:g} is above lr: the rate falls"
    if check_files:
        yield from _missing(("data", "train"), recipe.data.train)
        if isinstance(recipe.vocabulary, TokenVocabulary):
            yield from _missing(("vocabulary", "tokenizer"), (recipe.vocabulary.tokenizer,))


def _model(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    model = recipe.model
    if model.init_from is not None and model.init_embeddings is not None:
        yield ("model", "init_embeddings"), "init_from brings an embedding of its own: give one of them"
    if model.head_dim is None and model.n_embd % model.n_head:
        fitting = [h for h in range(1, model.n_embd + 1) if model.n_embd % h == 0]
        nearest = min(fitting, key=lambda h: abs(h - model.n_head))
        yield (
            ("model", "n_head"),
            f"{model.n_head} heads do not divide the width n_embd {model.n_embd} ({nearest} heads would)",
        )
    elif model.position == "rope" and model.head_width % 2:
        width = "n_embd / n_head" if model.head_dim is None else "head_dim"
        yield ("model", "n_head"), f"rope needs an even head width, and {width} is {model.head_width}"
    if model.n_head % model.kv_heads:
        yield ("model", "n_kv_head"), f"{model.kv_heads} key/value heads do not divide {model.n_head} heads"
    if model.position == "sinusoidal" and model.n_embd % 2:
        yield ("model", "n_embd"), f"sinusoidal positions need an even width, not {model.n_embd}"
    if model.rope_theta is not None and model.position != "rope":
        yield ("model", "rope_theta"), f"only position rope has it, and position is {model.position}"
    if model.freeze_embeddings and model.init_embeddings is None:
        yield ("model", "freeze_embeddings"), "only means something with init_embeddings"
    elif model.freeze_embeddings and model.tie_embeddings:
        yield ("model", "freeze_embeddings"), "tie_embeddings makes them the head's weights too, which must learn"
    stride = recipe.evaluation.stride
    if stride is not None and stride > model.context_length:
        yield (
            ("evaluation", "stride"),
            f"{stride} is more than context_length {model.context_length}: tokens between would be left out",
        )
    yield from _tokenizer(recipe)


def _tokenizer(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    tokenizer = recipe.tokenizer
    if isinstance(tokenizer, FileTokenizer):
        return
    both = {*tokenizer.special_tokens} & {*tokenizer.added_tokens}
    if both:
        yield ("tokenizer", "added_tokens"), f"{min(both)!r} is a special token too"
    for key in ("special_tokens", "added_tokens"):
        taken = {END_OF_TEXT, UNKNOWN} & {*getattr(tokenizer, key)}
        if taken:
            yield ("tokenizer", key), f"{min(taken)} is there already"
    if isinstance(tokenizer, VocabularyTokenizer):
        more = len(tokenizer.special_tokens) + len(tokenizer.added_tokens)
        bytes_ = isinstance(tokenizer, (BpeTokenizer, UnigramTokenizer)) and (
            tokenizer.alphabet == "bytes" or tokenizer.byte_fallback
        )
        parts = ["the 256 bytes"] * bytes_ + ["the end of text"] + ["the special and added tokens"] * (more > 0)
        least = 256 * bytes_ + 1 + more
        if tokenizer.vocab_size < least:
            yield ("tokenizer", "vocab_size"), f"{tokenizer.kind} needs at least {least}: {_listed(parts)}"
    if isinstance(tokenizer, BpeTokenizer) and tokenizer.alphabet == "bytes" and not tokenizer.byte_fallback:
        yield ("tokenizer", "byte_fallback"), "only an alphabet of characters can do without"
    if isinstance(tokenizer, (UnigramTokenizer, WordPieceTokenizer)) and tokenizer.alphabet == "bytes":
        yield ("tokenizer", "alphabet"), f"{tokenizer.kind} is made of characters: text, a number, or the characters"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _training(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    training = recipe.training
    lengths = [key for key in ("steps", "tokens", "epochs", "minutes") if getattr(training, key) is not None]
    if not lengths:
        yield ("training",), "say how long to train with one of steps, tokens, epochs, minutes"
    elif len(lengths) > 1:
        yield ("training", lengths[1]), f"only one of steps, tokens, epochs, minutes can be given, and {lengths[0]} is"
    if training.lora is not None:
        if recipe.model.init_from is None:
            yield ("training", "lora"), "adapts a model that is trained already: name its run with model.init_from"
        if isinstance(training.optimizer, MuonOptimizer):
            yield ("training", "optimizer"), "with lora it is adamw (leave its name out)"
    micro, batch = training.micro_batch_size, training.global_batch_size
    if micro != "auto" and batch % micro:
        fitting = [size for size in range(1, batch + 1) if batch % size == 0]
        near = sorted(sorted(fitting, key=lambda size: abs(size - micro))[:2])
        yield (
            ("training", "micro_batch_size"),
            f"{micro} does not divide global_batch_size {batch} ({' or '.join(map(str, near))} would)",
        )
    schedule = training.schedule
    if training.steps is not None and schedule.warmup >= 1 and schedule.warmup > training.steps:
        yield (
            ("training", "schedule", "warmup"),
            f"{schedule.warmup} steps of warm-up are more than the {training.steps} of training",
        )
    warmup = schedule.warmup / (training.steps or math.inf) if schedule.warmup >= 1 else schedule.warmup
    if isinstance(schedule, WsdSchedule) and warmup <= 1 < warmup + schedule.cooldown:
        yield ("training", "schedule", "cooldown"), "warm-up and cool-down together are more than the whole training"
    if training.minutes is not None and schedule.warmup >= 1:
        yield ("training", "schedule", "warmup"), "with minutes, give the warm-up as a share below 1"


def _files(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Only plain local files are looked at: other sources are read later, by the room that can."""
    sizes = {"train": _plain_size(recipe.data.train)}
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
        sizes["heldout"] = _plain_size(heldout.sources)
    elif isinstance(heldout, HeldoutShare) and sizes["train"] is not None and heldout.by == "tail":
        sizes["heldout"] = int(sizes["train"] * heldout.share)
    for half, size in sizes.items():
        if size is not None and 0 < size < recipe.model.context_length:
            yield (
                ("model", "context_length"),
                f"{recipe.model.context_length} is longer than the {'held-out' if half == 'heldout' else 'training'} text "
                f"({size:,} bytes)",
            )


def _is_plain(source: str) -> bool:
    special = source == "-" or source.startswith(("builtin:", "hf:", "imported:")) or "://" in source
    return not special and not any(sign in source for sign in "*?[")


def _missing(key: KeyPath, sources: tuple[str, ...]) -> Iterator[tuple[KeyPath, str]]:
    for source in sources:
        if _is_plain(source) and not os.path.exists(os.path.expanduser(source)):
            yield key, f"{source}: no such file or folder"


def _plain_size(sources: tuple[str, ...]) -> int | None:
    """Bytes of text when every source is a plain uncompressed file, else None."""
    paths = [os.path.expanduser(source) for source in sources]
    if all(_is_plain(s) and os.path.isfile(p) and not s.endswith(_COMPRESSED) for s, p in zip(sources, paths, strict=True)):
        return sum(os.path.getsize(path) for path in paths)
    return None
