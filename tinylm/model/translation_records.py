"""The records that `CompiledTranslation` fills in and the compiled decoding step for translation reads.

It does not import numba, so that the compiled step can be loaded without it.
"""

from __future__ import annotations

import numpy as np

from tinylm.native import NativeFunction

QKV, ATTENTION_OUTPUT, CROSS_QUERY, CROSS_OUTPUT, GATE, UP, DOWN = range(7)
MATRICES_PER_LAYER = 7
"""Indices of a layer's matrices. GATE has no outputs unless the activation is SwiGLU. The head is stored after all layers."""
ROWS = 6
"""Number of rows that are multiplied at once. The workspace is allocated for a multiple of this number."""
COMPUTE_LOGITS, FIND_TOP = range(2)
"""What a call does: compute the logits of the next tokens, or find the largest logits."""

_ADDRESS, _COUNT = np.int64, np.int64
LAYER = np.dtype(
    [
        *((f"{norm}_{kind}", _ADDRESS) for norm in ("attention", "cross", "feed_forward") for kind in ("gain", "bias")),
        *((name, _ADDRESS) for name in ("query_gain", "key_gain", "cross_query_gain")),  # 0 means absent
    ]
)
_MODEL = [
    *((name, _ADDRESS) for name in ("layers", "matrices", "embedding", "start", "position_table", "cosines", "sines")),
    *((name, _ADDRESS) for name in ("embedding_gain", "embedding_bias", "final_gain", "final_bias")),
    *((name, _COUNT) for name in ("layer_count", "width", "heads", "kv_heads", "head_width", "activation", "vocab_size")),
    *((name, _COUNT) for name in ("layer_norm", "embedding_norm", "post_norm")),
    ("norm_eps", np.float32),
    ("qk_norm_eps", np.float32),  # negative: queries and keys are not normalized
    ("softcap", np.float32),  # 0: no soft-capping
    ("embedding_scale", np.float32),
]
_INPUTS = [
    *((name, _COUNT) for name in ("task", "rows", "position")),
    *((name, _ADDRESS) for name in ("tokens", "sentences", "origins")),  # see `_CompiledState`
    ("origin_capacity", _COUNT),
    *((name, _ADDRESS) for name in ("keys", "values")),  # (positions, layers, row capacity, K, D)
    ("row_capacity", _COUNT),
    *((name, _ADDRESS) for name in ("memory_keys", "memory_values")),  # (layers, sentences, memory capacity, K, D)
    ("memory_lengths", _ADDRESS),
    *((name, _COUNT) for name in ("sentence_count", "memory_capacity")),
    ("logits", _ADDRESS),  # (rows, V)
    ("top_count", _COUNT),
    *((name, _ADDRESS) for name in ("top_logits", "top_ids", "exp_sums")),  # (rows, top count), the same, and (rows,)
]
_WORKSPACE = [  # shared, except for each thread's scratch area, which contains sums, attention scores and byte offsets
    *((name, _ADDRESS) for name in ("residual", "normed", "qkv", "attended", "hidden", "scratch")),
    *((name, _COUNT) for name in ("scratch_bytes", "scores_offset", "offsets_offset")),
]
_THREADS = [(name, _ADDRESS) for name in ("get_thread_num", "get_num_threads", "usleep", "barrier")]
STEP = np.dtype([*_MODEL, *_INPUTS, *_WORKSPACE, *_THREADS], align=True)
TRANSLATION_STEP = NativeFunction(
    "tinylm.model.translation_kernels",
    "decode",
    STEP,
    ("tinylm.model.translation_records", "tinylm.model.kernels", "tinylm.model.step_records", "tinylm.jit"),
)
"""Runs one thread's share of a step, given a pointer to a `STEP` record."""
