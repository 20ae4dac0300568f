"""Encode tensors as JSON for the page: little-endian bytes in base64, with a type and a shape. `page_core.js` decodes them."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
from torch import Tensor

Kind = Literal["f4", "f2", "i4", "u2", "u1"]
"""32-bit and 16-bit floats, 32-bit integers, and numbers between 0 and 1 stored in 16 or 8 bits."""


def encode(tensor: Tensor, kind: Kind) -> dict[str, Any]:
    """Encode a tensor. `u2` and `u1` store numbers from 0 to 1 as multiples of 1/65,535 and 1/255."""
    values = tensor.detach().cpu().float().numpy() if kind != "i4" else tensor.detach().cpu().numpy()
    if kind == "f2":
        limit = float(np.finfo(np.float16).max)
        values = values.clip(-limit, limit)
    elif kind in ("u2", "u1"):
        values = np.rint(values.clip(0, 1) * (65535 if kind == "u2" else 255))
    stored = np.ascontiguousarray(values, dtype=f"<{kind}")
    return {"type": kind, "shape": list(values.shape), "data": base64.b64encode(stored.tobytes()).decode("ascii")}
