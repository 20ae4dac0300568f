"""Estimate the peak memory of a forward and backward pass, an optimizer step and an evaluation. This module does not import torch.

It computes bytes from a `model:` section, a vocabulary size and a micro-batch by counting the tensors that each operation saves for
its backward pass. `tests/cost/test_memory.py` compares the counts with the tensors that torch saves. Compiled blocks save less,
because the compiler recomputes cheap operations.

Legend: `e` bytes per element in matrix products (4, or 2 in 16-bit precision), `s` bytes per element in the residual stream (4, or
2 in bf16). Unless stated otherwise, activation bytes are per token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tinylm.recipe.schema import MuonOptimizer, TransformerSection
from tinylm.recipe.values import ComputeDtype

LOSS_BYTES = {"cpu": 16 << 20, "gpu": 512 << 20}
"""Size in bytes that the logits of a chunk would have in float32. On a GPU, a chunk is large enough to keep the device busy."""
FUSED_LOSS_BYTES = 2 << 30
"""Maximum size in bytes of a chunk of float32 logits in the compiled loss on CUDA. Large chunks are faster because each chunk reads
and writes the head's whole gradient."""
FUSED_LOSS_SHARE = 4
"""In the compiled loss, a chunk that is larger than in the uncompiled loss contains at most 1 / `FUSED_LOSS_SHARE` of the
micro-batch's rows. With small micro-batches, as on GPUs with little memory, the loss therefore needs little memory."""
FUSED_LOSS_FROM = 1 << 30
"""The loss is compiled if the logits of a micro-batch take at least this many bytes in float32. Compilation takes seconds and saves
about 3 ms per gigabyte on an H200."""
ROW_MULTIPLE = 128
"""The number of rows in a chunk of the compiled loss is a multiple of this, the tile size of matrix products on tensor cores."""
MAX_GRADIENT_KEYS = 1024
"""See `uses_batched_gradient`. With more keys, torch's gradient is as fast and needs less memory."""
GRADIENT_BLOCK = 128
"""The batched gradient of attention processes this many queries at a time. With a causal mask, later keys can then be left out."""
LOSS_BLOCK = 1 << 18
"""On a CPU, the loss is computed for about this many logits at a time, which take 1 MiB in float32 and fit in a core's cache."""
LOSS_ROWS = 512
"""Minimum number of rows in a chunk of logits. Smaller chunks are slower and update the head's gradient more often."""
LOSS_ROWS_FP16 = 4096
"""Maximum number of rows in a float16 chunk. The summed gradients of more rows could exceed 65504 at any loss scale."""
EVALUATION_BATCH_TOKENS = 8192
"""Maximum number of tokens in an evaluation batch, including padding."""
EVALUATION_BATCH_LOGITS = 1 << 25
"""Maximum number of logits in an evaluation batch (128 MiB in float32). With a large vocabulary, this limit is reached first."""
GPU_EVALUATION_TOKENS = 65_536
"""Maximum number of tokens in an evaluation batch on a GPU."""
GPU_EVALUATION_LOGITS = 1 << 28
"""Maximum number of logits that an evaluation on a GPU computes together (1 GiB in float32)."""
_GPU_EVALUATION_SHARE = 4
"""An evaluation batch on a GPU takes at most 1 / `_GPU_EVALUATION_SHARE` of the free memory."""
_BYTES_PER_EVALUATED_LOGIT = 12
"""Logits in bf16, logits in float32, log-probabilities in float32, and temporary values."""
_EVALUATION_WIDTHS = 32
"""Upper bound on the number of float32 values per token and channel that an evaluation stores at a time: the residual stream, a
wide feed-forward layer, and queries, keys and values."""

_RATIONAL_BATCH_ELEMENTS = 1 << 20
"""Maximum number of elements in the Gram matrices that `tinylm.optim.rational` processes as one batch (4 MiB in float32). Larger
batches are not faster, because they do not fit in the caches."""
LAPACK_ROWS = 48
"""Larger matrices are inverted in blocks. LAPACK's small factorizations are far slower than matrix products."""
MMAP_THRESHOLD = 32 << 20
"""Freed tensors of at least this many bytes are returned to the operating system (see `tinylm.training.out_of_memory`)."""
FRAGMENTATION = 1.4
"""Ratio of a step's resident set to the bytes of its tensors. Fitted to the three recipes in benchmarks/plan_accuracy.py, each in
fp32 and bf16. The measured ratios were 1.2 to 1.6."""


@dataclass(frozen=True)
class PassConfig:
    """The size, precision, device and options for the forward and backward pass of a micro-batch."""

    vocab_size: int
    sequences: int
    precision: ComputeDtype = "fp32"
    on_gpu: bool = False
    recompute: bool = False
    """Whether activation checkpointing is enabled."""
    frozen: bool = False
    """Whether the embedding and head are frozen, as with LoRA."""
    document_mask: bool = False
    """Whether each sequence has its own attention mask."""

    @property
    def e(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def s(self) -> int:
        return 2 if self.precision == "bf16" else 4


def matrix_shapes(model: TransformerSection) -> Counter[tuple[int, int]]:
    """Count the matrices that Muon updates, by shape (rows, columns): all matrices in the blocks and the n-gram projection."""
    width, hidden, layers = model.n_embd, model.feed_forward_width, model.n_layer
    queries, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
    shapes: Counter[tuple[int, int]] = Counter()
    shapes[queries, width] += layers
    shapes[keys, width] += 2 * layers
    shapes[width, queries] += layers
    shapes[hidden, width] += layers * (2 if model.is_gated else 1)
    shapes[width, hidden] += layers
    if model.ngram_embeddings:
        shapes[width, len(model.ngram_embeddings) * model.ngram_width] += 1
    return shapes


def _norm_runs_in_float32(model: TransformerSection, config: PassConfig) -> bool:
    """Return whether autocast runs the norm in float32, as it does for layer norms on CUDA."""
    return model.norm == "layernorm" and config.on_gpu and config.e < 4


def norm_bytes(model: TransformerSection, config: PassConfig, s: int) -> int:
    """Return the bytes that a norm saves: its input or its output before the gain, and one or two statistics.

    The output of the norm is counted with the operation that reads it.
    """
    if model.norm == "layernorm":
        return model.n_embd * (4 if _norm_runs_in_float32(model, config) else s) + 8
    return model.n_embd * s + s


def _linear_input_bytes(model: TransformerSection, config: PassConfig) -> int:
    """Return the bytes that a linear layer after a norm saves for its input."""
    separate = model.norm == "layernorm" or model.norm_gain or config.on_gpu or config.e != config.s
    return model.n_embd * config.e if separate else 0  # otherwise, the norm already saves the same tensor


def _has_value_embedding(model: TransformerSection, layer: int) -> bool:
    return layer < model.value_embeddings or layer >= model.n_layer - model.value_embeddings


def uses_batched_gradient(keys: int) -> bool:
    """Whether training in bfloat16 on a CPU uses the gradient of attention in `tinylm.model.fused_attention` instead of torch's."""
    return 0 < keys <= MAX_GRADIENT_KEYS


def _has_batched_gradient(model: TransformerSection, config: PassConfig) -> bool:
    on_cpu = config.precision == "bf16" and not config.on_gpu
    return on_cpu and not model.attention_dropout_p and uses_batched_gradient(model.context_length)


def _shared_mask_bytes(model: TransformerSection, config: PassConfig) -> int:
    """Return the bytes per token of the boolean document masks that are saved with the batched gradient of attention.

    Global blocks save the same mask, and each local block its own. With torch's gradient, each block saves a mask in the dtype of
    the matrix products instead.
    """
    if not (config.document_mask and _has_batched_gradient(model, config)):
        return 0
    windows = [model.window_of(layer) for layer in range(model.n_layer)]
    local = sum(window is not None and window < model.context_length for window in windows)
    return model.context_length * (local + (local < model.n_layer))


def _attention_gradient_bytes(model: TransformerSection, config: PassConfig) -> int:
    """Return the bytes of the temporaries in the batched gradient of attention: two score matrices of one block of queries."""
    if not _has_batched_gradient(model, config):
        return 0
    length = model.context_length
    return 2 * config.e * config.sequences * model.n_head * min(GRADIENT_BLOCK, length) * length


def _attention_bytes(model: TransformerSection, config: PassConfig, layer: int) -> int:
    """Return the bytes that attention in block `layer` saves, excluding its norm and the input of its first projection."""
    e, heads, kv_heads = config.e, model.n_head, model.kv_heads
    queries, keys = heads * model.head_width, kv_heads * model.head_width
    qk = queries + keys
    has_gain, rotated = model.qk_norm and model.qk_gain, model.position == "rope"
    mixes_values = model.value_residual and layer > 0
    fused = not model.attention_dropout_p or config.on_gpu  # CPUs have no fused attention with dropout
    # If any view of the query, key and value projection is saved, the whole projection is.
    views = not (model.qk_norm or rotated) and fused  # attention saves queries and keys as views of the projection
    by_norm = model.qk_norm and config.on_gpu
    saved_values = fused or model.value_residual  # saved by attention or for a value residual
    total = (qk + keys) * e if views or by_norm or (saved_values and not _has_value_embedding(model, layer)) else 0
    if model.qk_norm:
        total += (heads + kv_heads) * (4 if config.on_gpu else e)
        total += qk * e if has_gain or not config.on_gpu else 0
    if fused:
        total += qk * e if rotated or (model.qk_norm if config.on_gpu else has_gain) else 0
        total += keys * e if mixes_values else 0
        total += keys * e if model.shifted_key_heads else 0
        total += 4 * heads
        total += model.context_length * e if config.document_mask and not _has_batched_gradient(model, config) else 0
    else:  # q, k, v and three score matrices per head, in float32
        total += 3 * queries * 4 + 3 * heads * model.context_length * 4
    total += keys * e if _has_value_embedding(model, layer) and saved_values else 0
    if config.on_gpu and kv_heads != heads and (config.precision == "fp32" or config.document_mask):
        total += 2 * queries * e  # keys and values are repeated for each query head
    return total + queries * e


def block_bytes(model: TransformerSection, config: PassConfig, layer: int) -> int:
    """Return the bytes that block `layer` saves. The block's input is included only if one of its operations saves it."""
    e, width, hidden = config.e, model.n_embd, model.feed_forward_width
    total = _attention_bytes(model, config, layer)
    total += (4 if model.is_gated else 1 if model.feed_forward == "relu" else 2) * hidden * e
    if model.parallel_residual and model.norm_position == "post":
        total += norm_bytes(model, config, config.s) + _linear_input_bytes(model, config) * (1 if e == config.s else 2)
    else:
        total += 2 * (norm_bytes(model, config, config.s) + _linear_input_bytes(model, config))
    if model.parallel_residual and model.norm_position == "pre":
        saves_input = not _norm_runs_in_float32(model, config) if model.norm == "layernorm" else config.on_gpu
        total -= width * config.s if saves_input else 0  # both norms save the same tensor
    total += width * config.s if model.embedding_shortcut else 0
    total += 2 * width if model.dropout else 0
    return total


def outside_block_bytes(model: TransformerSection, config: PassConfig) -> int:
    """Return the bytes saved before the first block and after the last one.

    This includes the gradient of the hidden states, which the loss computes in the forward pass.
    """
    width = model.n_embd
    total = 8 + width * config.s  # the token id and the gradient
    total += 8 if config.document_mask and model.position == "learned" else 0  # the position in the document
    total += 1 if config.document_mask and model.shifted_key_heads else 0  # where documents begin
    if model.ngram_embeddings:
        total += len(model.ngram_embeddings) * (8 + model.ngram_width * config.e + (4 if model.ngram_dropout else 0))
    if model.embedding_norm:
        total += norm_bytes(model, config, 4)
    if model.norm_position == "pre":
        total += norm_bytes(model, config, config.s)
    if model.dropout:
        total += width
    return total


def _cast_bytes(model: TransformerSection, config: PassConfig) -> int:
    """Return the total bytes of the 16-bit copies of weights and rotary tables that autocast makes and the forward pass saves."""
    if config.e == 4:
        return 0
    matrices = sum(rows * columns * count for (rows, columns), count in matrix_shapes(model).items())
    tables = model.n_layer * model.context_length * model.head_width if model.position == "rope" else 0
    return 2 * (matrices + tables)


def saved_bytes(model: TransformerSection, config: PassConfig) -> int:
    """Return the total bytes that the forward pass of a micro-batch saves, excluding weights and buffers.

    This includes the gradients of the hidden states and the head, which the loss computes in the forward pass. With `recompute`,
    each block saves only its input.
    """
    tokens = config.sequences * model.context_length
    head = 0 if config.frozen else 4 * config.vocab_size * model.n_embd
    if config.recompute:
        # Without a gain, the embedding norm saves its output, which is the input of the first block.
        norm_saves_output = model.norm == "rmsnorm" and not model.norm_gain and not config.on_gpu
        shared = model.embedding_norm and norm_saves_output and config.s == 4 and not model.dropout
        inputs = model.n_layer - (1 if shared else 0)
        projection_cast = len(model.ngram_embeddings) * model.ngram_width * model.n_embd * 2 if config.e < 4 else 0
        per_token = outside_block_bytes(model, config) + inputs * model.n_embd * config.s + _first_values_bytes(model, config)
        return tokens * per_token + head + projection_cast
    blocks = sum(block_bytes(model, config, layer) for layer in range(model.n_layer))
    mask = _shared_mask_bytes(model, config)
    return tokens * (outside_block_bytes(model, config) + blocks + mask) + head + _cast_bytes(model, config)


def _first_values_bytes(model: TransformerSection, config: PassConfig) -> int:
    """Return the bytes saved for the value residual with `recompute`.

    The first block's values are a view of its query, key and value projection, which is therefore saved as a whole.
    """
    keys = model.kv_heads * model.head_width
    if not model.value_residual:
        return 0
    return config.e * (keys if _has_value_embedding(model, 0) else model.n_head * model.head_width + 2 * keys)


def loss_chunk_rows(vocab_size: int, *, on_gpu: bool) -> int:
    """Return the number of rows in each chunk of float32 logits in the training loss."""
    return max(LOSS_ROWS, LOSS_BYTES["gpu" if on_gpu else "cpu"] // (4 * vocab_size))


def loss_block_rows(vocab_size: int) -> int:
    """Return the number of rows for which the training loss on a CPU is computed at a time."""
    return max(1, LOSS_BLOCK // vocab_size)


def fused_loss_rows(rows: int, vocab_size: int, plain: int) -> int:
    """Return the number of rows in each chunk of logits in the compiled loss, for a micro-batch with `rows` rows.

    `plain` is the number of rows in a chunk without compilation. If possible, all chunks have the same number of rows, because the
    kernel is compiled separately for each shape.
    """
    largest = max(plain, min(FUSED_LOSS_BYTES // (4 * vocab_size), rows // FUSED_LOSS_SHARE))
    largest = max(1, largest // ROW_MULTIPLE) * ROW_MULTIPLE
    equal = (chunk for chunk in range(largest, largest // 2, -ROW_MULTIPLE) if rows % chunk == 0)
    return next(equal, largest)


def loss_bytes(model: TransformerSection, config: PassConfig) -> int:
    """Return the total bytes of temporaries in the loss.

    These are hidden states, a chunk of logits and, in 16-bit precision, a copy of the head.

    On a GPU, the loss may or may not be compiled, so the result is the larger of the two sizes.
    """
    tokens = config.sequences * model.context_length
    chunk = loss_chunk_rows(config.vocab_size, on_gpu=config.on_gpu)
    fused_chunk = fused_loss_rows(tokens, config.vocab_size, chunk)
    if config.precision == "fp16":
        chunk, fused_chunk = min(chunk, LOSS_ROWS_FP16), min(fused_chunk, LOSS_ROWS_FP16)
    capped = model.logit_softcap is not None
    rows = min(chunk, tokens)
    if config.on_gpu:  # float32 logits, their log-softmax and, for the gradient, the capped logits
        logits = rows * (12 if capped else 8)
    else:  # the gradients overwrite the logits; only the rows of one block are also stored in float32, and capped
        copies = (config.e < 4) + capped
        logits = rows * config.e + copies * 4 * min(rows, loss_block_rows(config.vocab_size))
    if config.on_gpu and 4 * tokens * config.vocab_size >= FUSED_LOSS_FROM:
        logits = max(logits, min(fused_chunk, tokens) * 2 * config.e)  # the logits and their gradient
    # 16-bit precision also needs a copy of the head's weights and their gradient from one chunk.
    head = (1 if config.frozen else 2) * config.vocab_size * model.n_embd * 2 if config.e < 4 else 0
    return tokens * model.n_embd * config.s + logits * config.vocab_size + head


def activation_bytes(model: TransformerSection, config: PassConfig) -> int:
    """Return the peak bytes in the forward and backward pass of a micro-batch, excluding weights, gradients and optimizer state.

    The peak is either in the loss or at the start of the last block's backward pass. With `recompute`, that backward pass follows
    a second forward pass through the block.
    """
    tokens = config.sequences * model.context_length
    saved = saved_bytes(model, config)
    last = model.n_layer - 1
    feed_forward = tokens * (model.feed_forward_width * (2 if model.is_gated else 1) + model.n_embd) * config.e
    backward = max(feed_forward, _attention_gradient_bytes(model, config))
    if config.recompute:
        casts = _cast_bytes(model, config)
        block = tokens * max(block_bytes(model, config, layer) for layer in {0, last}) + casts // model.n_layer
        return saved + max(casts + loss_bytes(model, config), block + backward)
    return saved + max(loss_bytes(model, config), backward)


def muon_bytes(shapes: Counter[tuple[int, int]], optimizer: MuonOptimizer) -> int:
    """Return the peak bytes of a Muon step, excluding its state. `shapes` counts the matrices by shape.

    They consist of the float32 updates before orthogonalization, the updates that are already orthogonalized, and the temporaries
    of the Newton-Schulz iteration. The iteration processes all matrices with the same shape as one stack. Its temporaries are the
    stack, the matrices before and after an iteration, and two Gram matrices. In bf16, the results are cast to float32 when the
    weights are updated. A rational function needs two (n, n) matrices for each matrix of a batch, memory to invert one of them, and
    the result of the previous batch.
    """
    elements = sum(rows * columns * count for (rows, columns), count in shapes.items())
    if optimizer.orthogonalization == "rational":
        return 4 * elements + _rational_bytes(shapes)
    bf16 = optimizer.computes_in_bf16
    e = 2 if bf16 else 4
    peak = done = 0
    for (rows, columns), count in shapes.items():
        stack = rows * columns * count * e
        grams = 2 * min(rows, columns) ** 2 * count * e
        peak = max(peak, done + 3 * stack + grams)
        done += stack
    return 4 * elements + max(peak, done + (4 * elements if bf16 else 0))


def _rational_bytes(shapes: Counter[tuple[int, int]]) -> int:
    """Return the peak bytes of the results and temporaries of `tinylm.optim.rational`."""
    counts: Counter[int] = Counter()
    elements: Counter[int] = Counter()
    for (rows, columns), count in shapes.items():
        counts[min(rows, columns)] += count
        elements[min(rows, columns)] += rows * columns * count
    peak = done = 0
    for n, count in counts.items():
        batch = min(count, rational_batch(n))
        before_last_batch = done + 4 * elements[n] * (count - batch) // count
        done += 4 * elements[n]
        previous = 4 * n * n * batch if batch < count else 0
        peak = max(peak, done, before_last_batch + previous + (8 * n * n + _inverse_bytes(n)) * batch)
    return peak


def rational_batch(n: int) -> int:
    """Return the maximum number of (n, n) Gram matrices in one batch of `tinylm.optim.rational`."""
    return max(1, _RATIONAL_BATCH_ELEMENTS // (n * n))


def _inverse_bytes(n: int) -> int:
    """Return the peak bytes of temporaries when an (n, n) matrix is inverted by blocks (see `tinylm.optim.rational`)."""
    if n <= LAPACK_ROWS:
        return 8 * n * n  # the Cholesky factor and the inverse
    half = n // 2
    product = 4 * half * (n - half)
    return max(_inverse_bytes(half), product + max(_inverse_bytes(n - half), product))


def evaluation_bytes(model: TransformerSection, vocab_size: int) -> tuple[int, int]:
    """Return the peak bytes for an evaluation batch: first in the blocks, then while the logits and their log-softmax exist.

    An evaluation runs in float32 and saves nothing for a backward pass.
    """
    width, hidden = model.n_embd, model.feed_forward_width
    tokens = _evaluated_tokens(model, vocab_size)
    queries, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
    qk = queries + keys
    values = qk + keys  # The values are a view of the whole projection, which is freed after the next block's projection.
    previous = values if model.n_layer > 1 else 0
    rotation = 2 * qk if model.qk_norm or model.position == "rope" else 0
    attention = 3 * width + values + max(rotation, queries + (qk if rotation else 0))
    activations = 4 if model.is_gated else 3 if model.feed_forward == "relu2" else 2
    feed_forward = 5 * width + values + activations * hidden
    logits = (2 if model.logit_softcap is None else 3) * vocab_size
    return 4 * tokens * (previous + max(attention, feed_forward)), 4 * tokens * (width + logits)


def _evaluated_tokens(model: TransformerSection, vocab_size: int) -> int:
    """Return the number of tokens in an evaluation batch, which contains one or more whole sequences."""
    context = model.context_length
    return context * max(1, min(EVALUATION_BATCH_TOKENS, EVALUATION_BATCH_LOGITS // vocab_size) // context)


def gpu_evaluation_batch(width: int, free_bytes: int) -> tuple[int, int]:
    """Return the maximum numbers of tokens and of logits in an evaluation batch on a GPU with this much free memory."""
    available = free_bytes // _GPU_EVALUATION_SHARE
    tokens = min(max(available // (4 * _EVALUATION_WIDTHS * width), 1), GPU_EVALUATION_TOKENS)
    logits = min(max(available // _BYTES_PER_EVALUATED_LOGIT, EVALUATION_BATCH_LOGITS), GPU_EVALUATION_LOGITS)
    return _power_of_two(tokens), _power_of_two(logits)  # powers of two vary less with the free memory


def _power_of_two(number: int) -> int:
    """Return the largest power of two that is at most `number`."""
    return 1 << (number.bit_length() - 1)


def cpu_peak_bytes(step: int, resident: int, *, largest: int, evaluation: tuple[int, int]) -> int:
    """Return the peak resident set in bytes when training on a CPU, excluding weights and optimizer state.

    `step` is the size in bytes of the tensors that a step allocates and frees. `resident` is the size of the tensors that stay
    allocated, `largest` the size of the largest gradient, and `evaluation` the result of `evaluation_bytes`. The allocator keeps
    freed memory (`training/out_of_memory.py`), which is fast but causes fragmentation. A step takes `FRAGMENTATION` times the bytes
    of its tensors, and the largest gradient cannot reuse the memory it previously occupied. An evaluation is assumed to reuse none
    of this memory, because its tensors have different sizes. Only tensors of `MMAP_THRESHOLD` or more bytes are returned to the
    operating system.
    """
    blocks, logits = evaluation
    logits_are_returned = logits // 2 >= MMAP_THRESHOLD  # the logits and their log-softmax
    unplaced_gradient = largest if largest < MMAP_THRESHOLD else 0
    evaluated = blocks + logits if logits_are_returned else max(blocks, logits)
    return resident + int(FRAGMENTATION * step) + unplaced_gradient + evaluated
