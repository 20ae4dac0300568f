"""Checks that involve several recipe keys or files: for example, sizes must be divisible, and files must exist.

The functions yield problems as (key path, message). Individual keys have already been validated.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence

from pydantic import BaseModel

from tinylm import hints
from tinylm.recipe.arithmetic import divisors
from tinylm.recipe.chat import ChatSection, DPOObjective, PreferencesSection
from tinylm.recipe.embeddings import EmbeddingDataSection, EmbeddingRecipe, TokenVocabulary, Word2VecMethod
from tinylm.recipe.encoder import MASK, MaskedLMObjective
from tinylm.recipe.fixed_context import NgramSection
from tinylm.recipe.labels import ClassificationObjective
from tinylm.recipe.mixture import MixtureShares, mixture_problems
from tinylm.recipe.pairs import CATALOG, TOY, PairShare, PairsSection, TranslationObjective
from tinylm.recipe.schema import (
    LENGTHS,
    MODEL_VARIANTS,
    OBJECTIVE_VARIANTS,
    BpeTokenizer,
    CausalLMObjective,
    DataSection,
    DecoderSection,
    FileTokenizer,
    HeldoutShare,
    HeldoutSources,
    ModelVariant,
    MuonOptimizer,
    NoamSchedule,
    ObjectiveVariant,
    Recipe,
    TestShare,
    TrainingSection,
    UnigramTokenizer,
    VocabularyTokenizer,
    WordPieceTokenizer,
    WsdSchedule,
)
from tinylm.recipe.shipped import hint_to_train

KeyPath = tuple[str | int, ...]
"""The path of a key from the top of the recipe: ("training", "optimizer", "lr")."""
END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unknown|>"
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".parquet")


def check_recipe(recipe: Recipe, check_files: bool = True) -> Iterator[tuple[KeyPath, str]]:
    """Yield each problem as (key path, message). With `check_files`, also check that files exist and are large enough."""
    if isinstance(recipe.data, DataSection):
        yield from _check_data(recipe.data)
        yield from _check_shares(recipe.data)
        yield from _check_mixture(recipe, recipe.data)
    if isinstance(recipe.data, ChatSection | PreferencesSection):
        yield from _check_chat(recipe, recipe.data)
    yield from _check_model(recipe)
    yield from _check_tokenizer(recipe)
    yield from _check_training(recipe)
    if check_files:
        yield from _check_files(recipe)


def check_embedding_recipe(recipe: EmbeddingRecipe, check_files: bool = True) -> Iterator[tuple[KeyPath, str]]:
    """Like `check_recipe`, but for an embedding recipe."""
    yield from _check_data(recipe.data)
    method = recipe.method
    if isinstance(method, Word2VecMethod) and method.lr_end > method.lr:
        yield ("method", "lr_end"), f"must be at most lr {method.lr:g}, not {method.lr_end:g} (the learning rate decays from lr)"
    if check_files:
        yield from _missing(("data", "train"), recipe.data.train)
        if isinstance(recipe.vocabulary, TokenVocabulary):
            yield from _missing(("vocabulary", "tokenizer"), (recipe.vocabulary.tokenizer,))


def _check_data(data: DataSection | EmbeddingDataSection) -> Iterator[tuple[KeyPath, str]]:
    if data.template is not None and data.field != "text":
        yield ("data", "template"), f"replaces field, so only one of them can be set (add {{{data.field}}} to the template)"


def _check_shares(data: DataSection) -> Iterator[tuple[KeyPath, str]]:
    heldout, test = data.heldout, data.test
    if isinstance(heldout, HeldoutShare) and isinstance(test, TestShare) and heldout.share + test.share >= 1:
        yield ("data", "test"), f"the held-out share {heldout.share:g} and the test share {test.share:g} leave no training text"


def _check_mixture(recipe: Recipe, data: DataSection) -> Iterator[tuple[KeyPath, str]]:
    problems = [(("data", "train", *path), problem) for path, problem in mixture_problems(data.train)]
    yield from problems
    if problems or not data.mixture:
        return
    if not recipe.model.needs_full_window:
        problem = "architecture counts the whole text once, so weights have no effect (list only sources)"
        yield ("data", "train"), f"the {recipe.model.architecture} {problem}"
    if recipe.training.minutes is not None and MixtureShares.of(data.mixture).change:
        index = next(index for index, item in enumerate(data.mixture) if len(set(item.weights)) > 1)
        problem = "two weights require training.steps, tokens or epochs, because the data order must not depend on the clock"
        yield ("data", "train", index, "weight"), problem


def _check_chat(recipe: Recipe, data: ChatSection | PreferencesSection) -> Iterator[tuple[KeyPath, str]]:
    for key, problem in data.problems() if isinstance(data, ChatSection) else ():
        yield ("data", key), problem
    model, stride = recipe.model, recipe.evaluation.stride
    if not isinstance(model, DecoderSection):
        yield ("data", "format"), f"the {data.format} format requires the decoder architecture, not {model.architecture}"
    if stride is not None:
        yield ("evaluation", "stride"), f"has no effect with the {data.format} format (remove the key)"
    if recipe.sampling.every is not None and not all(prompt.strip() for prompt in recipe.sampling.prompts):
        yield ("sampling", "prompts"), f"with the {data.format} format, prompts are user messages, which must not be empty"


def _check_model(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    model, objective = recipe.model, recipe.objective
    for key, problem in model.problems():
        yield ("model", key), problem
    if not _can_train(type(model), type(objective)):
        objectives = [name for name, section in OBJECTIVE_VARIANTS.sections.items() if _can_train(type(model), section)]
        architectures = [name for name, section in MODEL_VARIANTS.sections.items() if _can_train(section, type(objective))]
        hint = f" (set model.architecture: {listed(architectures, 'or')})" if architectures else ""
        problem = f"cannot be trained with {objective.name}, only with {listed(objectives)}"
        yield ("objective",), f"the {model.architecture} architecture {problem}{hint}"
    yield from _check_objective(recipe)
    yield from _check_architecture(recipe)
    yield from _check_translation(recipe)
    stride = recipe.evaluation.stride
    if stride is not None and stride > model.context_length:
        yield (
            ("evaluation", "stride"),
            f"must be at most context_length {model.context_length}, not {stride} (tokens between windows would be skipped)",
        )


def _can_train(model: type[BaseModel], objective: type[BaseModel]) -> bool:
    """Whether a model variant can be trained with an objective variant."""
    assert issubclass(model, ModelVariant)
    assert issubclass(objective, ObjectiveVariant)
    architecture, name = model.model_fields["architecture"].default, objective.model_fields["name"].default
    return name in model.objectives or architecture in objective.architectures


def _check_objective(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    objective, model, training = recipe.objective, recipe.model, recipe.training
    if recipe.data.format not in objective.data_formats:
        needed = listed(objective.data_formats, "or")
        yield ("data", "format"), f"the {objective.name} objective requires the {needed} format, not {recipe.data.format}"
    if isinstance(objective, MaskedLMObjective | ClassificationObjective) and recipe.evaluation.stride is not None:
        yield ("evaluation", "stride"), f"has no effect with the {objective.name} objective (remove the key)"
    if isinstance(objective, CausalLMObjective) and not objective.mask_prompt and not isinstance(recipe.data, ChatSection):
        yield ("objective", "mask_prompt"), f"has no effect with the {recipe.data.format} format (remove the key)"
    if isinstance(objective, CausalLMObjective):
        yield from _check_teacher(objective, model)
    if isinstance(objective, DPOObjective) and (model.pretrained is None or not model.pretrained.head):
        problem = "requires a reference model (set model.init_from to a run that was fine-tuned on conversations)"
        if model.pretrained is not None:
            problem = "must start from the reference model, including its head (remove model.init_from.head)"
        yield ("objective",), f"the dpo objective {problem}"
    if isinstance(objective, MaskedLMObjective):
        if len(set(objective.rate)) > 1 and training.minutes is not None:
            yield (
                ("objective", "rate"),
                "two rates require training.steps, tokens or epochs, because masks must not depend on the clock",
            )
        if recipe.sampling.every is not None and not all(MASK in prompt for prompt in recipe.sampling.prompts):
            yield ("sampling", "prompts"), f"the {objective.name} objective requires {MASK} in every prompt"
    if isinstance(objective, ClassificationObjective) and objective.pool == "cls" and not model.bidirectional:
        yield (
            ("objective", "pool"),
            f"cls is the first token, which cannot depend on the text in the {model.architecture} architecture (use last)",
        )


def _check_teacher(objective: CausalLMObjective, model: ModelVariant) -> Iterator[tuple[KeyPath, str]]:
    if objective.teacher and model.learns_by_counting:
        yield ("objective", "teacher"), f"has no effect with the {model.architecture} architecture (remove the key)"
    if not objective.teacher and objective.teacher_weight != CausalLMObjective.model_fields["teacher_weight"].default:
        yield ("objective", "teacher_weight"), "has no effect without objective.teacher (remove the key)"


def _check_translation(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Check combinations of keys for sentence pairs."""
    data, model = recipe.data, recipe.model
    if isinstance(recipe.objective, TranslationObjective) and recipe.evaluation.stride is not None:
        yield ("evaluation", "stride"), "has no effect with the translation objective (remove the key)"
    if not isinstance(data, PairsSection):
        return
    heldout, test = data.heldout, data.test
    if isinstance(heldout, PairShare) and isinstance(test, PairShare) and heldout.share + test.share >= 1:
        yield ("data", "test"), f"the held-out share {heldout.share:g} and the test share {test.share:g} leave no training pairs"
    if data.vocabulary == "separate" and getattr(model, "tie_embeddings", None) == "all":
        yield ("model", "tie_embeddings"), "all requires data.vocabulary: shared (use output or none)"
    if data.vocabulary == "separate" and isinstance(recipe.tokenizer, FileTokenizer):
        yield ("data", "vocabulary"), "separate requires a learned tokenizer, not tokenizer.path"
    if recipe.sampling.every is not None and (data.vocabulary == "separate" or data.language is not None):
        yield ("sampling", "every"), "requires data.vocabulary: shared, and no data.language"
    if isinstance(recipe.tokenizer, BpeTokenizer) and recipe.tokenizer.dropout:
        yield ("tokenizer", "dropout"), "has no effect with the pairs format (remove the key)"
    if isinstance(recipe.training.schedule, NoamSchedule) and recipe.training.minutes is not None:
        yield ("training", "schedule"), "noam counts steps, so it requires training.steps, tokens or epochs"


def _check_architecture(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Check that the architecture supports the values of keys in other sections."""
    model, training, data = recipe.model, recipe.training, recipe.data
    name = f"the {model.architecture} architecture"
    for key, values in model.training_values.items():
        if getattr(training, key) not in values:
            yield ("training", key), f"{name} does not support this value (remove the key)"
    for key, field in TrainingSection.model_fields.items():
        if model.training_keys is not None and key not in model.training_keys and getattr(training, key) != field.default:
            yield ("training", key), f"has no effect with {name} (remove the key)"
    if isinstance(data, DataSection) and data.document_mask and model.reads_across_documents:
        yield ("data", "document_mask"), f"{name} does not support it"
    if isinstance(model, NgramSection):
        if training.epochs is not None and training.epochs > 1:
            yield ("training", "epochs"), f"must be at most 1 for {name}, which counts the text once"
        if isinstance(data, DataSection) and data.shuffle != "windows":
            yield ("data", "shuffle"), f"has no effect with {name} (remove the key)"


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
            yield ("training", "lora"), "requires a trained model to adapt (set model.init_from to its run)"
        if isinstance(training.optimizer, MuonOptimizer):
            yield ("training", "optimizer"), "must be adamw if lora is set (remove the key to use the default)"
    micro, batch = training.micro_batch_size, training.global_batch_size
    if micro != "auto" and batch % micro:
        nearest = sorted(sorted(divisors(batch), key=lambda size: abs(size - micro))[:2])
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
        yield ("training", "schedule", "cooldown"), "warmup and cooldown together are longer than the training run"
    if training.minutes is not None and schedule.warmup >= 1:
        yield ("training", "schedule", "warmup"), "must be a share below 1 when training.minutes is set"


def _check_files(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Check that local files exist and that uncompressed files are large enough. `tinylm.text` checks other sources on reading."""
    mixture = recipe.data.mixture if isinstance(recipe.data, DataSection) else ()
    for key, sources in recipe.data.sources().items():
        if key != "train" or not mixture:
            yield from _missing(("data", key), sources)
    for index, item in enumerate(mixture):
        yield from _missing(("data", "train", index, "source"), item.source)
    if isinstance(recipe.tokenizer, FileTokenizer):
        yield from _missing(("tokenizer", "path"), (_file_of(recipe.tokenizer.path),))
    vectors, pretrained = recipe.model.pretrained_embeddings, recipe.model.pretrained
    if vectors is not None:
        yield from _missing(("model", "init_embeddings"), (vectors,))
    if pretrained is not None and not os.path.exists(os.path.expanduser(pretrained.run)):
        yield ("model", "init_from"), _no_such_run(pretrained.run)
    if isinstance(recipe.objective, CausalLMObjective):
        for run in recipe.objective.teacher:
            if not os.path.exists(os.path.expanduser(run)):
                yield ("objective", "teacher"), _no_such_run(run)
    if isinstance(recipe.data, DataSection):
        yield from _check_sizes(recipe.data, recipe.model.context_length if recipe.model.needs_full_window else 1)


def _no_such_run(run: str) -> str:
    hint = hint_to_train(run)
    return f"{run}: no such run" + (f" ({hint})" if hint else "")


def _file_of(path: str) -> str:
    """Return the file of a tokenizer, without the split in `FILE.tiktoken:SPLIT`."""
    file, separator, _ = path.partition(".tiktoken:")
    return f"{file}.tiktoken" if separator else path


def _check_sizes(data: DataSection, context_length: int) -> Iterator[tuple[KeyPath, str]]:
    """Check that uncompressed files have at least `context_length` bytes."""
    sizes, heldout = {"training": _plain_size(data.sources()["train"])}, data.heldout
    for index, item in enumerate(data.mixture):
        size = _plain_size(item.source)
        if size is not None and size < context_length:
            problem = "is empty" if not size else f"has {size:,} bytes, fewer than context_length {context_length:,}"
            yield ("data", "train", index, "source"), f"{item.name} {problem} (use more text or remove the source)"
    if isinstance(heldout, HeldoutSources):
        sizes["held-out"] = _plain_size(heldout.sources)
    elif isinstance(heldout, HeldoutShare) and sizes["training"] is not None and heldout.by == "tail":
        sizes["held-out"] = int(sizes["training"] * heldout.share)
    if isinstance(data.test, HeldoutSources):
        sizes["test"] = _plain_size(data.test.sources)
    for name, size in sizes.items():
        if size is not None and 0 < size < context_length:
            yield ("model", "context_length"), f"{context_length} is longer than the {name} text ({size:,} bytes)"


def _is_plain(source: str) -> bool:
    special = source == "-" or source.startswith(("builtin:", "hf:", "imported:", CATALOG, TOY)) or "://" in source
    return not special and not any(character in source for character in "*?[")


def _missing(key: KeyPath, sources: tuple[str, ...]) -> Iterator[tuple[KeyPath, str]]:
    for source in sources:
        if _is_plain(source) and not os.path.exists(os.path.expanduser(source)):
            parts = [part for part in re.split(r"[,;\s]+", source) if part]
            several = len(parts) > 1 and any(os.path.exists(os.path.expanduser(part)) or "." in part for part in parts)
            hint = f"write several as a list: [{', '.join(parts)}]" if several else hints.number(str(key[-1]), source)
            yield key, f"{source}: no such file or folder" + (f" ({hint})" if hint else "")


def _plain_size(sources: tuple[str, ...]) -> int | None:
    """Return the total size in bytes if every source is a local uncompressed file, else None."""
    paths = [os.path.expanduser(source) for source in sources]
    if all(_is_plain(s) and os.path.isfile(p) and not s.endswith(_COMPRESSED) for s, p in zip(sources, paths, strict=True)):
        return sum(os.path.getsize(path) for path in paths)
    return None


def listed(words: Sequence[str], conjunction: str = "and") -> str:
    """Join words for a sentence: `["a", "b", "c"]` becomes "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {conjunction} {words[-1]}"
