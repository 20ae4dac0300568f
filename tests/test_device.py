"""What `tinylm.device` promises of the machine's arithmetic."""

from __future__ import annotations

import subprocess
import sys

FIRST_CALLS = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

VECTORISED = {"acos", "asin", "atan", "cos", "erf", "exp", "log", "sin", "sqrt", "tan", "tanh"}  # by MKL, see ATen/cpu/vml.h


class FirstCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.removesuffix("_")
        if name in VECTORISED:
            self.sizes.setdefault((name, args[0].dtype), args[0].numel())
        return function(*args, **(kwargs or {}))


with FirstCalls() as first:
    from tinylm.model.transformer import Transformer
    from tinylm.recipe.schema import ModelSection

    Transformer(ModelSection(n_layer=1, n_head=1, n_embd=64, context_length=256), 300)
assert {name for name, _ in first.sizes} == VECTORISED, first.sizes
print(max(first.sizes.values()))
"""


def test_every_function_of_one_number_is_called_on_one_number_before_any_model_is_made() -> None:
    """The race that this forestalls shows in one process of eight or so, `benchmarks/same_model.py` looks for it."""
    told = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True)
    assert (told.stdout.strip(), told.stderr) == ("1", "")
