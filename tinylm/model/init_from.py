"""Starting from the weights of another network: what fits is taken over, what may start anew is named, the rest is refused."""

from __future__ import annotations

import re

import torch

from tinylm.errors import InputError
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import ModelSection

_FREE = {"init_from", "preset", "dropout", "ngram_dropout", "zero_init_outputs", "feed_forward_multiple", "n_inner"}
"""Keys that may differ from the source's: they shape no weight, or do so through a width that is compared instead."""
_BY_TOKEN = re.compile(r"embedding\.weight|head\.weight|ngrams\.table\.weight|blocks\.\d+\.value_embedding\.weight")
_KEY = "model.init_from"


def check_parts(model: ModelSection, source: ModelSection) -> None:
    """Raises `InputError`, naming the parts, unless a network of `model` can take over the weights of one of `source`.

    Rotary and other computed positions fit any context; learned ones can be cut shorter. A tied head can be untied.
    """
    ours, theirs = _shape(model), _shape(source)
    different = [key for key in ours if ours[key] != theirs[key]]
    if model.position != "learned" or model.context_length <= source.context_length:
        different = [key for key in different if key != "context_length"]
    if source.tie_embeddings:
        different = [key for key in different if key != "tie_embeddings"]
    if different:
        listed = ", ".join(f"model.{key} {ours[key]} (there: {theirs[key]})" for key in different)
        raise InputError(f"the model is not that run's: {listed}", where=_KEY, hint="leave these keys out to have them as there")


def _shape(model: ModelSection) -> dict[str, object]:
    values = {key: value for key, value in model.model_dump().items() if key not in _FREE}
    rope = {"rope_theta": model.rope_theta or 10000.0} if model.position == "rope" else {}
    return {**values, "n_kv_head": model.kv_heads, "head_dim": model.head_width, "hidden width": model.feed_forward_width, **rope}


def load_pretrained(network: Transformer, source: Transformer, *, same_tokenizer: bool) -> list[str]:
    """Copy the weights of `source` and return the names of those that start anew: none, but with `init_from: {head: off}`.

    Without the head, the head starts anew, and with another tokenizer all that is looked up by token.
    Raises `InputError` where that leaves something without weights.
    """
    model = network.model
    keeps_head = model.init_from is None or model.init_from.head
    if keeps_head and not same_tokenizer:
        raise InputError(
            "the tokenizer is not that run's", where=_KEY, hint="leave `tokenizer:` out, or take all but the head with head: off"
        )
    if not keeps_head and same_tokenizer and model.tie_embeddings:
        raise InputError(
            "head: off leaves out the head, which is the embedding here",
            where=_KEY,
            hint="untie them with model.tie_embeddings: off",
        )
    anew = []
    weights = source.state_dict()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if _BY_TOKEN.fullmatch(name) if not same_tokenizer else name == "head.weight" and not keeps_head:
                anew.append(name)
            elif name == "positions.weight":
                parameter.copy_(weights[name][: model.context_length])
            else:
                parameter.copy_(weights[name])
    return anew
