"""What a recipe will cost, before it costs it: parameters, batches, FLOPs, memory, time. Imports without torch.

Everything is arithmetic on the recipe, the vocabulary and the number of training tokens; the only measurement is how fast
this machine multiplies matrices.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

from tinylm.errors import InputError
from tinylm.recipe.schema import ModelSection, MuonOptimizer, Recipe, TrainingSection

EFFICIENCY = 0.5
"""Share of the matrix-product peak that a training step is assumed to reach."""
CPU_MICRO_BATCH_TOKENS = 2048
"""Beyond this a forward pass on a CPU gains nothing and only leaves the caches."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the height of a training step, beside what the program itself needs."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Plan:
    """The names are the keys of `tinylm plan --json`; `steps` and what follows from it are None for `minutes`."""

    parameters: int
    parameters_non_embedding: int
    context_length: int
    vocab_size: int
    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    tokens_per_step: int
    steps: int
    tokens: int
    epochs: float
    flops: float
    memory_bytes: Memory
    checkpoint_bytes: int
    seconds_estimate: float


def parameter_counts(model: ModelSection, vocab_size: int) -> dict[str, int]:
    """Trainable numbers by part: embeddings (a tied head counted here), tables that are looked up, head, matrices, the rest."""
    width, hidden = model.n_embd, model.feed_forward_width
    queries, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
    norm = width * (model.norm_gain + (model.norm_gain and model.bias and model.norm == "layernorm"))
    inputs = 2 * hidden if model.feed_forward == "swiglu" else hidden
    matrices = width * (queries + 2 * keys) + queries * width + width * inputs + hidden * width
    biases = (queries + 2 * keys) + width + inputs + width if model.bias else 0
    norms_per_block = 1 if model.norm_position == "post" and model.parallel_residual else 2
    small = norms_per_block * norm + biases + (2 * model.head_width if model.qk_norm and model.qk_gain else 0)
    small += 2 if model.embedding_shortcut else 0
    outside = (norm if model.norm_position == "pre" else 0) + (norm if model.embedding_norm else 0)
    return {
        "embedding": vocab_size * width,
        "positions": model.context_length * width if model.position == "learned" else 0,
        "tables": len(model.ngram_embeddings) * model.ngram_rows * model.ngram_width
        + min(2 * model.value_embeddings, model.n_layer) * vocab_size * keys,
        "head": 0 if model.tie_embeddings else vocab_size * width,
        "matrices": model.n_layer * matrices + len(model.ngram_embeddings) * model.ngram_width * width,
        "rest": model.n_layer * small + outside + (model.n_layer - 1 if model.value_residual else 0),
    }


def flops_per_token(model: ModelSection, vocab_size: int) -> float:
    """Forward and backward: 6 per weight of every matrix product, the head included, and causal attention's own products."""
    counts = parameter_counts(model, vocab_size)
    attention = 6 * model.n_layer * model.context_length * model.n_head * model.head_width
    return 6.0 * (counts["matrices"] + vocab_size * model.n_embd) + attention


def training_steps(training: TrainingSection, context_length: int, train_tokens: int) -> int | None:
    """Optimiser steps that the recipe asks for; None when the clock decides. `train_tokens` is the length of one epoch."""
    per_step = training.global_batch_size * context_length
    if training.steps is not None:
        return training.steps
    if training.tokens is not None:
        return math.ceil(training.tokens / per_step)
    if training.epochs is not None:
        sequences = max(1, (train_tokens - 1) // context_length)
        return max(1, math.ceil(training.epochs * sequences / training.global_batch_size))
    return None


def activation_bytes(model: ModelSection, vocab_size: int, sequences: int, *, half: bool = False) -> int:
    """What a forward pass of `sequences` keeps for its backward pass; `half` for 16-bit autocast."""
    tokens = sequences * model.context_length
    width, hidden = model.n_embd, model.feed_forward_width
    queries, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
    projections = 2 * (queries + 2 * keys) + (2 * (queries + keys) if model.position == "rope" else 0)
    projections += queries + keys if model.qk_norm else 0
    feed = {"swiglu": 5, "gelu": 2, "relu": 1, "relu2": 3}[model.feed_forward] * hidden
    per_layer = 4 * width + projections + 2 * queries + feed + (2 * width + 1 if model.dropout else 0)
    logits = (3 if model.logit_softcap is None else 4) * vocab_size
    return tokens * (model.n_layer * per_layer + 3 * width) * (2 if half else 4) + tokens * logits * 4


def memory(recipe: Recipe, vocab_size: int, micro_batch_size: int, *, half: bool = False) -> Memory:
    """Weights, gradients and optimiser state are float32 whatever the precision."""
    counts = parameter_counts(recipe.model, vocab_size)
    parameters = sum(counts.values())
    muon = isinstance(recipe.training.optimizer, MuonOptimizer)
    slots = 2 * parameters - (counts["matrices"] if muon else 0)
    activations = activation_bytes(recipe.model, vocab_size, micro_batch_size, half=half)
    return Memory(4 * parameters, 4 * parameters, 4 * slots, activations)


def choose_micro_batch(recipe: Recipe, vocab_size: int, memory_bytes: int, most_tokens: int | None, *, half: bool = False) -> int:
    """The recipe's micro-batch, or for `auto` the largest divisor of the global batch that should fit in 60 % of the memory."""
    training, context = recipe.training, recipe.model.context_length
    if training.micro_batch_size != "auto":
        return training.micro_batch_size
    batch = training.global_batch_size
    for size in (size for size in range(batch, 0, -1) if batch % size == 0):
        fits = memory(recipe, vocab_size, size, half=half).total <= 0.6 * memory_bytes
        if fits and (most_tokens is None or size * context <= most_tokens):
            return size
    return 1


def host_memory_bytes() -> int:
    """This machine's memory; 8 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 << 30


def matmul_flops() -> float:
    """Floating-point operations per second of a float32 matrix product here, measured in about 0.1 s."""
    import numpy as np

    size = 768
    a = np.ones((size, size), dtype=np.float32)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def make_plan(recipe: Recipe, vocab_size: int, train_tokens: int, *, peak_flops: float | None = None) -> Plan:
    """The cost of a recipe on a text of `train_tokens`, on this machine's CPU unless `peak_flops` says otherwise.

    Raises `InputError` when the text is shorter than one sequence.
    """
    model, training = recipe.model, recipe.training
    if train_tokens <= model.context_length:
        raise InputError(
            f"the training text has about {train_tokens:,} tokens, fewer than context_length {model.context_length:,} + 1",
            where="model.context_length",
        )
    counts = parameter_counts(model, vocab_size)
    parameters = sum(counts.values())
    micro = choose_micro_batch(recipe, vocab_size, host_memory_bytes(), CPU_MICRO_BATCH_TOKENS)
    tokens_per_step = training.global_batch_size * model.context_length
    per_token = flops_per_token(model, vocab_size)
    speed = (peak_flops or matmul_flops()) * EFFICIENCY
    steps = training_steps(training, model.context_length, train_tokens)
    if steps is None:
        steps = max(1, int((training.minutes or 0) * 60 * speed / (per_token * tokens_per_step)))
    costs = memory(recipe, vocab_size, micro)
    return Plan(
        parameters=parameters,
        parameters_non_embedding=parameters - counts["embedding"] - counts["positions"] - counts["tables"] - counts["head"],
        context_length=model.context_length,
        vocab_size=vocab_size,
        global_batch_size=training.global_batch_size,
        micro_batch_size=micro,
        gradient_accumulation_steps=training.global_batch_size // micro,
        tokens_per_step=tokens_per_step,
        steps=steps,
        tokens=steps * tokens_per_step,
        epochs=steps * tokens_per_step / train_tokens,
        flops=per_token * steps * tokens_per_step,
        memory_bytes=costs,
        checkpoint_bytes=costs.weights + costs.optimizer,
        seconds_estimate=per_token * steps * tokens_per_step / speed,
    )
