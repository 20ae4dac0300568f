"""Baselines for language models: the bits per byte of n-gram models and general-purpose compressors on the same held-out text.

The n-gram models use modified Kneser-Ney smoothing. They are trained on the same tokens as the network and, like the network, score
documents independently. xz and zstd compress the held-out text with the training text as a dictionary.
"""

from __future__ import annotations

import importlib
import lzma
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinylm.data.kneser_ney import count_shard, smooth
from tinylm.data.shards import Shard

MAX_ORDER = 5


def kneser_ney_bits(train: Shard, heldout: Shard, vocab_size: int, size: int) -> dict[str, float]:
    """Return the bits per byte of n-gram models of order 1 to `MAX_ORDER`, by name. `size` is the held-out text's size in bytes."""
    counts = count_shard(train, vocab_size, MAX_ORDER)
    bits = {}
    for order in range(1, MAX_ORDER + 1):
        nats = -np.nansum(smooth(counts.truncated(order), train.end_of_text).logprobs(heldout))
        bits[f"{order}-gram Kneser-Ney"] = float(nats) / math.log(2) / max(size, 1)
    return bits


def compressor_bits(train: bytes, heldout: bytes) -> dict[str, float]:
    """Return the bits per byte of the held-out text when compressed with xz and, if it is installed, zstd.

    Both use the training text as a dictionary.
    """
    sizes = {"xz": _xz_size(train + heldout) - _xz_size(train)}
    zstd_size = _load_zstd()
    if zstd_size is not None:
        sizes["zstd"] = zstd_size(train, heldout)
    return {f"{name} with the training text as dictionary": 8 * size / max(len(heldout), 1) for name, size in sizes.items()}


def _xz_size(data: bytes) -> int:
    """Return the compressed size in bytes, using the highest preset and a window that covers all the data (up to 1.5 GiB)."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(max(len(data), 1 << 16), 1536 << 20)}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))


def _import_optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _load_zstd() -> Callable[[bytes, bytes], int] | None:
    """Return a function (training text, held-out text) -> compressed size in bytes, or None if zstd is not installed.

    The function compresses at level 19 with a window that covers both texts.
    """
    zstd: Any = next((module for name in ("compression.zstd", "backports.zstd") if (module := _import_optional(name))), None)
    if zstd is None:
        return None
    parameters = zstd.CompressionParameter

    def size(train: bytes, heldout: bytes) -> int:
        window = min(max((len(train) + len(heldout)).bit_length(), 10), 30)
        options = {parameters.compression_level: 19, parameters.window_log: window}
        dictionary = zstd.ZstdDict(train, is_raw=True) if len(train) >= 8 else None
        return len(zstd.compress(heldout, options=options, zstd_dict=dictionary))

    return size
