"""Importing tinylm warms up MKL's vector math to avoid a race that could change results."""

from __future__ import annotations

import subprocess
import sys

FIRST_CALLS = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

VECTORIZED = {"acos", "asin", "atan", "cos", "erf", "exp", "log", "sin", "sqrt", "tan", "tanh"}  # by MKL, see ATen/cpu/vml.h


class FirstCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.removesuffix("_")
        if name in VECTORIZED:
            self.sizes.setdefault((name, args[0].dtype), args[0].numel())
        return function(*args, **(kwargs or {}))


with FirstCalls() as first:
    from tinylm.model.transformer import Transformer
    from tinylm.recipe.schema import DecoderSection

    Transformer(DecoderSection(n_layer=1, n_head=1, n_embd=64, context_length=256), 300)
assert {name for name, _ in first.sizes} == VECTORIZED, first.sizes
print(max(first.sizes.values()))
"""


def test_every_vector_math_function_is_first_called_on_a_single_number() -> None:
    """Without the warm-up, a race changes the results in one process out of eight. `benchmarks/same_model.py` also checks this."""
    result = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("1", "")
