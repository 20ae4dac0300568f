"""How many bytes a training step, its optimiser and an evaluation hold at their height. Imports without torch.

In comes a `model:` section, a vocabulary and the size of a micro-batch; out come bytes, counted operation by operation from what
each saves for its backward pass. `tests/test_footprint.py` holds the count against what torch really saves. Compiled blocks save
less than what is counted here, since their compiler recomputes what is cheap.

Legend: e bytes of a number in matrix products (2 in 16 bits), s in the residual stream (2 in bf16 only).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from tinylm.recipe.schema import ModelSection

Numbers = Literal["fp32", "bf16", "fp16"]

LOSS_BYTES = {"cpu": 16 << 20, "gpu": 512 << 20}
"""Logits that the training loss makes at a time: what a processor's cache holds, or enough rows to fill a GPU."""
LOSS_ROWS = 512
"""At least so many rows of logits at a time: products of fewer are slower, and read the head's gradient more often."""
LOSS_ROWS_OF_HALVES = 4096
"""In float16 at most so many: the gradients of more, summed, could pass its 65504 whatever the scale of the loss."""
EVALUATION_TOKENS = 8192
EVALUATION_LOGITS = 1 << 25
"""Most tokens and logits of an evaluation's batch, as `tinylm.evaluation.perplexity` has them."""

MAPPED = 32 << 20
"""As `tinylm.training.out_of_memory` tells the allocator."""
HOLES = 1.4
"""Fitted to the resident sets of the three recipes of benchmarks/plan_accuracy.py, each in fp32 and in bf16 (1.2 to 1.6)."""


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass over one micro-batch: what it is run on and in which numbers."""

    vocab_size: int
    sequences: int
    precision: Numbers = "fp32"
    on_gpu: bool = False
    recompute: bool = False
    """Activation checkpointing."""
    frozen: bool = False
    """Embedding and head need no gradient, as with LoRA."""

    @property
    def e(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def s(self) -> int:
        return 2 if self.precision == "bf16" else 4


def matrix_shapes(model: ModelSection) -> Counter[tuple[int, int]]:
    """(rows, columns) of the matrices that Muon orthogonalises, with how many there are: in the blocks, and the n-grams' map."""
    width, hidden, layers = model.n_embd, model.feed_forward_width, model.n_layer
    queries, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
    shapes: Counter[tuple[int, int]] = Counter()
    shapes[queries, width] += layers
    shapes[keys, width] += 2 * layers
    shapes[width, queries] += layers
    shapes[hidden, width] += layers * (2 if model.feed_forward == "swiglu" else 1)
    shapes[width, hidden] += layers
    if model.ngram_embeddings:
        shapes[width, len(model.ngram_embeddings) * model.ngram_width] += 1
    return shapes


def _norm_casts(model: ModelSection, at: Pass) -> bool:
    """Autocast computes a layer norm in float32 on CUDA."""
    return model.norm == "layernorm" and at.on_gpu and at.e < 4


def _norm(model: ModelSection, at: Pass, s: int) -> int:
    """What a norm keeps: its input, or what it answers before the gain, and a number or two; its answer is its reader's to keep."""
    if model.norm == "layernorm":
        return model.n_embd * (4 if _norm_casts(model, at) else s) + 8
    return model.n_embd * s + s


def _read(model: ModelSection, at: Pass) -> int:
    """What a linear layer keeps of what a norm gave it."""
    own = model.norm == "layernorm" or model.norm_gain or at.on_gpu or at.e != at.s
    return model.n_embd * at.e if own else 0  # else the norm's answer is what the norm itself keeps


def _embeds_values(model: ModelSection, layer: int) -> bool:
    return layer < model.value_embeddings or layer >= model.n_layer - model.value_embeddings


def _attention(model: ModelSection, at: Pass, layer: int) -> int:
    e, heads, kv_heads = at.e, model.n_head, model.kv_heads
    queries, keys = heads * model.head_width, kv_heads * model.head_width
    looking = queries + keys
    gained, turned = model.qk_norm and model.qk_gain, model.position == "rope"
    blended = model.value_residual and layer > 0
    fused = not model.attention_drops or at.on_gpu  # a CPU has no fused attention with dropout
    views = not (model.qk_norm or turned) and fused  # queries and keys are views of the projection, which is kept for them
    by_norm = model.qk_norm and at.on_gpu
    saved_values = fused or model.value_residual  # by attention, or for the blend of this block or a later one
    total = (looking + keys) * e if views or by_norm or (saved_values and not _embeds_values(model, layer)) else 0
    if model.qk_norm:
        total += (heads + kv_heads) * (4 if at.on_gpu else e)
        total += looking * e if gained or not at.on_gpu else 0
    if fused:
        total += looking * e if turned or (model.qk_norm if at.on_gpu else gained) else 0
        total += keys * e if blended else 0
        total += 4 * heads
    else:  # q, k, v and three maps of every head's scores, in float32
        total += 3 * queries * 4 + 3 * heads * model.context_length * 4
    total += keys * e if _embeds_values(model, layer) and saved_values else 0
    if at.on_gpu and kv_heads != heads and at.precision == "fp32":
        total += 2 * queries * 4  # keys and values repeated for each query head
    return total + queries * e


def block_bytes(model: ModelSection, at: Pass, layer: int) -> int:
    """What block `layer` saves of one token for its backward pass. The block's input counts where an operation of it saves it."""
    e, width, hidden = at.e, model.n_embd, model.feed_forward_width
    total = _attention(model, at, layer)
    total += {"gelu": 2, "gelu_exact": 2, "relu": 1, "relu2": 2, "swiglu": 4}[model.feed_forward] * hidden * e
    if model.parallel_residual and model.norm_position == "post":
        total += _norm(model, at, at.s) + _read(model, at) * (1 if e == at.s else 2)
    else:
        total += 2 * (_norm(model, at, at.s) + _read(model, at))
    if model.parallel_residual and model.norm_position == "pre":
        keeps_input = not _norm_casts(model, at) if model.norm == "layernorm" else at.on_gpu
        total -= width * at.s if keeps_input else 0  # both norms keep the same
    total += width * at.s if model.embedding_shortcut else 0
    total += 2 * width if model.dropout else 0
    return total


def ends_bytes(model: ModelSection, at: Pass) -> int:
    """What is saved of one token before the first block and after the last, the loss's gradient of the hidden states included."""
    width = model.n_embd
    total = 8 + width * at.s  # the id, the gradient
    if model.ngram_embeddings:
        total += len(model.ngram_embeddings) * (8 + model.ngram_width * at.e + (4 if model.ngram_dropout else 0))
    if model.embedding_norm:
        total += _norm(model, at, 4)
    if model.norm_position == "pre":
        total += _norm(model, at, at.s)
    if model.dropout:
        total += width
    return total


def _casts(model: ModelSection, at: Pass) -> int:
    """Copies of the weights in 16 bits, which the linear layers save, and of rotary tables."""
    if at.e == 4:
        return 0
    matrices = sum(rows * columns * count for (rows, columns), count in matrix_shapes(model).items())
    tables = model.n_layer * model.context_length * model.head_width if model.position == "rope" else 0
    return 2 * (matrices + tables)


def kept_bytes(model: ModelSection, at: Pass) -> int:
    """What a forward pass saves for its backward pass, weights and buffers apart, with the gradients that the loss makes ahead.

    With `recompute` only what blocks read, and what is outside them.
    """
    tokens = at.sequences * model.context_length
    head = 0 if at.frozen else 4 * at.vocab_size * model.n_embd
    if at.recompute:
        bare = model.norm == "rmsnorm" and not model.norm_gain and at.s == 4 and not at.on_gpu and not model.dropout
        inputs = model.n_layer - (1 if model.embedding_norm and bare else 0)  # the first one is what that norm keeps
        map_cast = len(model.ngram_embeddings) * model.ngram_width * model.n_embd * 2 if at.e < 4 else 0
        return tokens * (ends_bytes(model, at) + inputs * model.n_embd * at.s + _first_values(model, at)) + head + map_cast
    blocks = sum(block_bytes(model, at, layer) for layer in range(model.n_layer))
    return tokens * (ends_bytes(model, at) + blocks) + head + _casts(model, at)


def _first_values(model: ModelSection, at: Pass) -> int:
    """Blocks that are computed again need the first one's values, a view of its whole projection."""
    keys = model.kv_heads * model.head_width
    if not model.value_residual:
        return 0
    return at.e * (keys if _embeds_values(model, 0) else model.n_head * model.head_width + 2 * keys)


def loss_bytes(model: ModelSection, at: Pass) -> int:
    """What the loss needs beside what it keeps: the hidden states, a chunk of logits, the head in 16 bits."""
    tokens = at.sequences * model.context_length
    chunk = max(LOSS_ROWS, LOSS_BYTES["gpu" if at.on_gpu else "cpu"] // (4 * at.vocab_size))
    if at.precision == "fp16":
        chunk = min(chunk, LOSS_ROWS_OF_HALVES)
    copies = 8 if at.on_gpu else 4 + (at.e if at.e < 4 else 0)  # in float32; in 16 bits beside the product, or its own slopes
    if model.logit_softcap is not None:
        copies = 12 if at.on_gpu else 8  # and what the cap is computed from
    head = (1 if at.frozen else 2) * at.vocab_size * model.n_embd * 2 if at.e < 4 else 0  # the weights, and the gradient of a chunk
    return tokens * model.n_embd * at.s + min(chunk, tokens) * at.vocab_size * copies + head


def activation_bytes(model: ModelSection, at: Pass) -> int:
    """The height of a forward and backward pass over weights, gradients and optimiser state.

    Reached when the loss is computed, or just after, when the last block begins its backward pass (and, with `recompute`, has been
    computed again).
    """
    tokens = at.sequences * model.context_length
    kept = kept_bytes(model, at)
    last = model.n_layer - 1
    backward = tokens * (model.feed_forward_width * (2 if model.feed_forward == "swiglu" else 1) + model.n_embd) * at.e
    if at.recompute:
        casts = _casts(model, at)
        block = tokens * max(block_bytes(model, at, layer) for layer in {0, last}) + casts // model.n_layer
        return kept + max(casts + loss_bytes(model, at), block + backward)
    return kept + max(loss_bytes(model, at), backward)


def muon_bytes(model: ModelSection, *, half: bool) -> int:
    """The height of a step of Muon over its state: every update in float32, those already orthogonal, and a stack in the iteration.

    The iteration holds the stack, the matrices before and after a step, and two Gram matrices. `half`: in bf16, which is
    cast to float32 when the weights move.
    """
    e = 2 if half else 4
    shapes = matrix_shapes(model)
    numbers = sum(rows * columns * count for (rows, columns), count in shapes.items())
    height = done = 0
    for (rows, columns), count in shapes.items():
        stack = rows * columns * count * e
        grams = 2 * min(rows, columns) ** 2 * count * e
        height = max(height, done + 3 * stack + grams)
        done += stack
    return 4 * numbers + max(height, done + (4 * numbers if half else 0))


def evaluation_bytes(model: ModelSection, vocab_size: int) -> tuple[int, int]:
    """The heights of an evaluation, one after the other: a block's own tensors, then logits and their log-softmax.

    It computes in float32 and saves nothing.
    """
    width, hidden = model.n_embd, model.feed_forward_width
    tokens = _evaluated_tokens(model, vocab_size)
    queries, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
    looking = queries + keys
    values = looking + keys  # a view of the whole projection; those of the block before live until the next are there
    before = values if model.n_layer > 1 else 0
    placing = 2 * looking if model.qk_norm or model.position == "rope" else 0
    attention = 3 * width + values + max(placing, queries + (looking if placing else 0))
    feed = 5 * width + values + {"gelu": 2, "gelu_exact": 2, "relu": 2, "relu2": 3, "swiglu": 4}[model.feed_forward] * hidden
    logits = (2 if model.logit_softcap is None else 3) * vocab_size
    return 4 * tokens * (before + max(attention, feed)), 4 * tokens * (width + logits)


def _evaluated_tokens(model: ModelSection, vocab_size: int) -> int:
    context = model.context_length
    return context * max(1, min(EVALUATION_TOKENS, EVALUATION_LOGITS // vocab_size) // context)


def host_bytes(model: ModelSection, vocab_size: int, step: int, rest: int) -> int:
    """The height of a training's resident set on a CPU, over weights and optimiser state.

    `step`: bytes of tensors that come and go in a step; `rest`: of those that stay. Freed memory is kept
    (`training/memory.py`), which spares the system's work and leaves holes: steps take `HOLES` times what their tensors need; the
    largest gradient finds its old place taken by smaller tensors; and measuring, whose tensors have other sizes, is taken to find
    no room at all. Only tensors of `MAPPED` bytes are given back.
    """
    blocks, logits = evaluation_bytes(model, vocab_size)
    mapped = 4 * _evaluated_tokens(model, vocab_size) * vocab_size >= MAPPED
    tables = len(model.ngram_embeddings) * model.ngram_rows * model.ngram_width
    largest = 4 * max(tables, vocab_size * model.n_embd)
    moved = largest if largest < MAPPED else 0
    return rest + int(HOLES * step) + moved + (blocks + logits if mapped else max(blocks, logits))
