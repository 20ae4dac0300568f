"""Check inspection results against TransformerLens, an independent implementation that loads an exported copy of the model."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.inspection import attribution, logit_lens
from tinylm.interchange import huggingface
from tinylm.model.base import Model
from tinylm.tokenizer import Tokenizer


@torch.no_grad()
def largest_differences(network: Model, tokenizer: Tokenizer, ids: list[int]) -> dict[str, float]:
    """Return the largest absolute differences in attention patterns, residuals, logit-lens outputs and per-head attributions.

    The attribution target at each position is the next token. Raises `InputError` if transformer-lens is not installed, or if
    transformers has no class for the model.
    """
    if find_spec("transformer_lens") is None:
        raise InputError("needs transformer-lens", where="--verify", hint="pip install transformer-lens")
    network = network.cpu()
    _, unsupported = huggingface.select_class(network.model)
    if unsupported:
        problem = f"TransformerLens cannot load a model with {', '.join(unsupported)}"
        raise InputError(problem, where="--verify", hint="it can load models with the gpt2 or llama preset")
    tokens = torch.tensor([ids])
    with tempfile.TemporaryDirectory() as folder:
        huggingface.write(Path(folder), network, tokenizer, card="")
        bridge = _load(folder)
        _, theirs = bridge.run_with_cache(tokens)
    _, ours = network.run_with_cache(tokens)
    layers = range(network.depth)
    patterns = [(ours[f"blocks.{i}.attn.pattern"], theirs[f"blocks.{i}.attn.hook_pattern"]) for i in layers]
    residuals = [(ours[f"blocks.{i}.resid_post"], theirs[f"blocks.{i}.hook_resid_post"]) for i in layers]
    return {
        "patterns": max(_difference(*pair) for pair in patterns),
        "residuals": max(_difference(*pair) for pair in residuals),
        "logit lens": _difference(logit_lens(network, tokens, ours), _lens(bridge, theirs)),
        "attribution": _attribution_difference(network, tokens, theirs),
    }


def _load(folder: str) -> Any:
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    with huggingface.quiet(transformers):
        return TransformerBridge.boot_transformers(folder, device="cpu")


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def _lens(bridge: Any, cache: Any) -> Tensor:
    """Apply TransformerLens's logit lens: normalize each accumulated residual again and project it to the vocabulary."""
    residuals = cache.apply_ln_to_stack(cache.accumulated_resid(layer=-1), layer=-1, recompute_ln=True)
    return torch.stack([bridge.unembed(residual) for residual in residuals])


def _attribution_difference(network: Model, tokens: Tensor, cache: Any) -> float:
    """Return the largest difference between head contributions. TransformerLens does not multiply by the gain of the final norm."""
    targets = torch.cat((tokens[:, 1:], tokens[:, :1]), dim=1)
    heads, labels = cache.stack_head_results(return_labels=True, apply_ln=True)
    gain = getattr(getattr(network, "final_norm", None), "weight", None)
    direction = network.output_embedding().weight[targets] * (1.0 if gain is None else gain)
    ours = attribution(network, tokens, targets)
    rows = torch.stack([ours.contributions[ours.components.index(label)] for label in labels])
    return _difference(rows, (heads * direction).sum(-1))
