"""The records that `CompiledStep` fills in and the compiled decoding step reads, and the layout of the weights in memory.

It does not import numba, so that the compiled step can be loaded without it.
"""

from __future__ import annotations

import numpy as np

from tinylm.native import NativeFunction

TILE, PANEL = 64, 32
"""Outputs per tile and per panel."""
ROW_BLOCK = 8
"""Maximum number of rows multiplied at once. The workspace is allocated for a multiple of this number."""
STORE, ADD, GELU, RELU, RELU2, SILU, SWIGLU, SOFTCAP = range(8)
"""Epilogues of a matrix product: store the result, add it to the destination, apply GELU, ReLU, squared ReLU or SiLU to it,
multiply it by the SiLU of the destination, or soft-cap it."""
QKV, ATTENTION_OUTPUT, GATE, UP, DOWN = range(5)
MATRICES_PER_LAYER = 5
"""Indices of a layer's matrices. GATE has no outputs unless the activation is SwiGLU. The head and the n-gram projection are stored
after the matrices of all layers."""

_ADDRESS, _COUNT = np.int64, np.int64
MATRIX = np.dtype(
    [
        ("weights", _ADDRESS),  # (tiles, TILE / PANEL, inputs, PANEL)
        ("weight_bytes", _COUNT),  # bytes per weight: 4 for float32, 2 for bfloat16, 1 for int8
        ("inputs", _COUNT),
        ("outputs", _COUNT),
        ("scales", _ADDRESS),  # one float32 per output; in all address fields, 0 means absent
        ("biases", _ADDRESS),
    ]
)
LAYER = np.dtype(
    [
        (name, _ADDRESS)
        for name in ("attention_gain", "attention_bias", "feed_forward_gain", "feed_forward_bias", "query_gain", "key_gain")
    ]
)
_MODEL = [
    *((name, _ADDRESS) for name in ("layers", "matrices", "embedding", "position_table", "cosines", "sines")),
    *((name, _ADDRESS) for name in ("ngram_table", "ngram_orders")),
    *((name, _ADDRESS) for name in ("embedding_gain", "embedding_bias", "final_gain", "final_bias")),
    *((name, _COUNT) for name in ("layer_count", "width", "heads", "kv_heads", "shifted_heads", "head_width", "activation")),
    *((name, _COUNT) for name in ("layer_norm", "embedding_norm", "ngram_rows", "ngram_width", "ngram_order_count", "pad_id")),
    ("norm_eps", np.float32),
    ("qk_norm_eps", np.float32),  # negative: queries and keys are not normalized
    ("softcap", np.float32),  # 0: no soft-capping
]
_STEP_INPUTS = [
    *((name, _COUNT) for name in ("rows", "capacity", "cache_row_count")),
    ("is_prefill", _COUNT),  # 1: the rows are the tokens of one prompt, and only the last row needs logits
    *((name, _ADDRESS) for name in ("keys", "values", "cached_tokens", "tokens", "positions", "cache_row_indices", "logits")),
]
_WORKSPACE = [  # shared, except for each thread's scratch area, which contains normalized inputs, tile sums and attention scores
    *((name, _ADDRESS) for name in ("residual", "qkv", "attended", "hidden", "scratch")),
    *((name, _COUNT) for name in ("scratch_bytes", "sums_offset", "scores_offset")),
]
_THREADS = [  # addresses of functions (get_thread_num is 0 for a single thread) and of the barrier's two counters
    (name, _ADDRESS) for name in ("get_thread_num", "get_num_threads", "usleep", "barrier")
]
STEP = np.dtype([*_MODEL, *_STEP_INPUTS, *_WORKSPACE, *_THREADS], align=True)
DECODING_STEP = NativeFunction(
    "tinylm.model.kernels", "decode", STEP, ("tinylm.model.step_records", "tinylm.model.ngrams", "tinylm.jit")
)
"""Runs one thread's share of a step, given a pointer to a `STEP` record."""
