"""Read nanoGPT checkpoints (`ckpt.pt`): GPT-2 with exact GELU, optional biases and `nn.Linear` layers, without a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tinylm.errors import InputError
from tinylm.interchange import hf_architectures
from tinylm.interchange.huggingface import load_pickle
from tinylm.recipe.schema import DecoderSection

_COMPILE_PREFIX = "_orig_mod."
_ARGUMENT_NAMES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "context_length"}


def read(path: Path, *, trust_pickle: bool) -> tuple[DecoderSection, dict[str, Tensor]]:
    """Return a checkpoint's model section and state dict.

    Raises `InputError` if pickles are not trusted or the file is not a nanoGPT checkpoint.
    """
    saved = load_pickle(path, trust_pickle)
    arguments, tensors = saved.get("model_args"), saved.get("model")
    if not isinstance(arguments, Mapping) or not isinstance(tensors, Mapping) or not set(_ARGUMENT_NAMES) <= set(arguments):
        raise InputError("not a nanoGPT checkpoint: `model` or `model_args` is missing or incomplete", where=str(path))
    state = {name.removeprefix(_COMPILE_PREFIX): tensor for name, tensor in tensors.items()}
    values: dict[str, Any] = {ours: arguments[theirs] for theirs, ours in _ARGUMENT_NAMES.items()}
    try:
        model = DecoderSection.model_validate(
            {**values, "preset": "gpt2", "feed_forward": "gelu_exact", "bias": any(name.endswith("c_fc.bias") for name in state)}
        )
    except ValueError as error:
        raise InputError(f"invalid model configuration: {' '.join(str(error).split())}", where=str(path)) from None
    return model, hf_architectures.import_state_dict(state, model, "nanogpt", str(path))
