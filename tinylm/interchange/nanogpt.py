"""nanoGPT's `ckpt.pt`: GPT-2 with an exact GELU, biases or none, plain linear layers, and no tokenizer beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tinylm.errors import InputError
from tinylm.interchange import hf_architectures
from tinylm.interchange.huggingface import unpickled
from tinylm.recipe.schema import ModelSection

_COMPILED = "_orig_mod."
_ARGUMENTS = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "context_length"}


def read(path: Path, *, trust_pickle: bool) -> tuple[ModelSection, dict[str, Tensor]]:
    """The parts and weights of a checkpoint. Raises `InputError` for a pickle that is not trusted or is no such checkpoint."""
    saved = unpickled(path, trust_pickle)
    arguments, tensors = saved.get("model_args"), saved.get("model")
    if not isinstance(arguments, Mapping) or not isinstance(tensors, Mapping) or not set(_ARGUMENTS) <= set(arguments):
        raise InputError("is no checkpoint of nanoGPT: it lacks `model` or `model_args`", where=str(path))
    plain = {name.removeprefix(_COMPILED): tensor for name, tensor in tensors.items()}
    parts: dict[str, Any] = {ours: arguments[theirs] for theirs, ours in _ARGUMENTS.items()}
    try:
        model = ModelSection.model_validate(
            {**parts, "preset": "gpt2", "feed_forward": "gelu_exact", "bias": any(name.endswith("c_fc.bias") for name in plain)}
        )
    except ValueError as error:
        raise InputError(f"not the shape of a model: {' '.join(str(error).split())}", where=str(path)) from None
    return model, hf_architectures.state_of(plain, model, "nanogpt", str(path))
