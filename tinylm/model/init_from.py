"""`model.init_from`: initialize a network with the weights of a trained one.

Raises `InputError` unless the two models have the same parts.
"""

from __future__ import annotations

import re

import torch

from tinylm.errors import InputError
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import ModelSection

_IGNORED_KEYS = {"init_from", "preset", "dropout", "ngram_dropout", "zero_init_outputs", "feed_forward_multiple", "n_inner"}
"""Keys that may differ from the source's. They do not change what the trained weights compute, except for the last two, which only
set the hidden width, and `_comparable` includes that."""
_PER_TOKEN = re.compile(r"embedding\.weight|head\.weight|ngrams\.table\.weight|blocks\.\d+\.value_embedding\.weight")
"""Names of the weights that depend on the vocabulary."""
_KEY = "model.init_from"


def check_compatible(model: ModelSection, source: ModelSection) -> None:
    """Raise `InputError` that names the differing keys, unless a network of `model` can load the weights of a network of `source`.

    Learned positions can be truncated to a shorter context; other kinds of positions fit any context. A tied head can be untied.
    """
    ours, theirs = _comparable(model), _comparable(source)
    different = [key for key in ours if ours[key] != theirs[key]]
    if model.position != "learned" or model.context_length <= source.context_length:
        different = [key for key in different if key != "context_length"]
    if source.tie_embeddings:
        different = [key for key in different if key != "tie_embeddings"]
    if different:
        listed = ", ".join(f"model.{key} {ours[key]} (source: {theirs[key]})" for key in different)
        raise InputError(
            f"the model differs from the source run's: {listed}", where=_KEY, hint="remove these keys to use the source's values"
        )


def _comparable(model: ModelSection) -> dict[str, object]:
    """The settings that must be equal, with defaults resolved."""
    values = {key: value for key, value in model.model_dump().items() if key not in _IGNORED_KEYS}
    rope = {"rope_theta": model.rope_theta or 10000.0} if model.position == "rope" else {}
    return {**values, "n_kv_head": model.kv_heads, "head_dim": model.head_width, "hidden width": model.feed_forward_width, **rope}


def load_pretrained(network: Transformer, source: Transformer, *, same_tokenizer: bool) -> list[str]:
    """Copy the weights of `source` into `network`. Return the names of the weights that keep their initialization.

    By default, all weights are copied. With `init_from: {head: off}`, the head is not; if the tokenizer differs too, no weight that
    depends on the vocabulary is. Raises `InputError` for a different tokenizer without `head: off`, and for `head: off` with tied
    embeddings if the tokenizer is the same.
    """
    model = network.model
    load_head = model.init_from is None or model.init_from.head
    if load_head and not same_tokenizer:
        raise InputError(
            "the tokenizer differs from the source run's",
            where=_KEY,
            hint="remove `tokenizer:` from the recipe, or set `head: off` to start with a new embedding and head",
        )
    if not load_head and same_tokenizer and model.tie_embeddings:
        raise InputError(
            "`head: off` excludes the head, but with tied embeddings the head is the embedding",
            where=_KEY,
            hint="set model.tie_embeddings: off",
        )
    reinitialized = []
    weights = source.state_dict()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if _PER_TOKEN.fullmatch(name) if not same_tokenizer else name == "head.weight" and not load_head:
                reinitialized.append(name)
            elif name == "positions.weight":
                parameter.copy_(weights[name][: model.context_length])
            else:
                parameter.copy_(weights[name])
    return reinitialized
