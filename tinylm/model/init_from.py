"""`model.init_from`: initialize a network with the weights of a trained network.

The functions raise `InputError` if the two models are incompatible.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.model.base import BODY, Model
from tinylm.model.classifier import SequenceClassifier, without_classifier
from tinylm.recipe.schema import ModelVariant, TransformerSection
from tinylm.recipe.support import TRAINING

_IGNORED_KEYS = {*TRAINING, "feed_forward_multiple", "n_inner"}
"""Keys that may differ between the two models. The training keys do not change what the trained weights compute. The last two keys
only set the hidden width, which `_comparable` includes."""
_KEY = "model.init_from"


def check_compatible(model: ModelVariant, source: ModelVariant) -> None:
    """Raise an `InputError` that lists the differing keys if the weights of a `source` network do not fit a `model` network.

    Learned position embeddings can be truncated to a shorter context; other position embeddings fit any context. A tied head can be
    untied.
    """
    ours, theirs = _comparable(model), _comparable(source)
    different = [key for key in ours if ours[key] != theirs[key]] if model.architecture == source.architecture else ["architecture"]
    if isinstance(model, TransformerSection) and isinstance(source, TransformerSection):
        if model.position != "learned" or model.context_length <= source.context_length:
            different = [key for key in different if key != "context_length"]
        if source.tie_embeddings:
            different = [key for key in different if key != "tie_embeddings"]
    if different:
        listed = ", ".join(f"model.{key} {ours[key]} (source: {theirs[key]})" for key in different)
        raise InputError(
            f"the model differs from the source run's: {listed}", where=_KEY, hint="remove these keys to use the source's values"
        )


def _comparable(model: ModelVariant) -> dict[str, object]:
    """Return the settings that must be equal, with defaults resolved."""
    values = {key: value for key, value in model.model_dump().items() if key not in _IGNORED_KEYS}
    if not isinstance(model, TransformerSection):
        return values
    rope = {"rope_theta": model.rope_theta or 10000.0} if model.position == "rope" else {}
    return {**values, "n_kv_head": model.kv_heads, "head_dim": model.head_width, "hidden width": model.feed_forward_width, **rope}


def resize_rows(tensor: Tensor, sources: Sequence[Sequence[int]]) -> Tensor:
    """Resize a tensor with one row per token (V, C) to one row per entry of `sources`, which lists old token ids.

    Each new row is the mean of the listed rows, or of all rows if its list is empty.
    """
    resized = tensor[torch.tensor([old[0] if old else 0 for old in sources])].clone()
    for row, old in enumerate(sources):
        if len(old) != 1:
            resized[row] = tensor[list(old)].mean(0) if old else tensor.mean(0)
    return resized


def load_pretrained(
    network: Model, source: Model, *, same_tokenizer: bool, sources: Sequence[Sequence[int]] | None = None
) -> list[str]:
    """Copy the weights of `source` into `network`. Return the names of the weights that keep their initialization.

    By default, all weights are copied. If the new tokenizer only adds tokens, `sources` lists the old ids for each new id, and
    tables with one row per token are resized with `resize_rows`. With `init_from: {head: off}`, the head is not copied. If the
    tokenizer also differs, weights that depend on the vocabulary are not copied. Raises `InputError` for a different tokenizer
    without `head: off`, and for `head: off` with tied embeddings if the tokenizer is the same.
    """
    if isinstance(network, SequenceClassifier) or isinstance(source, SequenceClassifier):
        return _load_classifier(network, source, same_tokenizer=same_tokenizer)
    pretrained = network.model.pretrained
    load_head = pretrained is None or pretrained.head
    if sources is not None and load_head:
        return _load_extended(network, source, sources)
    if load_head and not same_tokenizer:
        raise InputError(
            "the tokenizer differs from the source run's",
            where=_KEY,
            hint="remove `tokenizer:` from the recipe, or set `head: off` to start with a new embedding and head",
        )
    if not load_head and same_tokenizer and network.head_weights() & network.tied_weights().keys():
        raise InputError(
            "`head: off` does not load the head, but tied embeddings share the head's weights",
            where=_KEY,
            hint="set model.tie_embeddings: off",
        )
    excluded: frozenset[str] = frozenset()
    if not same_tokenizer:
        excluded = network.vocabulary_weights()
    elif not load_head:
        excluded = network.head_weights()
    reinitialized = []
    weights = source.state_dict()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in excluded:
                reinitialized.append(name)
            else:
                parameter.copy_(network.fit_pretrained(name, weights[name]))
    return reinitialized


def _load_extended(network: Model, source: Model, sources: Sequence[Sequence[int]]) -> list[str]:
    """Copy all weights of `source` into a network whose tokenizer adds tokens."""
    weights = source.state_dict()
    tied = network.tied_weights()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in tied:
                continue
            weight = network.fit_pretrained(name, weights[name])
            has_row_per_token = name in network.vocabulary_weights() and weight.shape[0] == source.vocab_size
            parameter.copy_(resize_rows(weight, sources) if has_row_per_token else weight)
    return []


def _load_classifier(network: Model, source: Model, *, same_tokenizer: bool) -> list[str]:
    """Implement `load_pretrained` for classifiers. The output layer is copied if both have the same labels and pooling."""
    if not isinstance(network, SequenceClassifier):
        raise InputError("the source run is a classifier, which has no language-model head", where=_KEY)
    load_head = network.model.pretrained is None or network.model.pretrained.head
    body_of_source = without_classifier(source)
    body_of_source.remove_head()
    reinitialized = [BODY + name for name in load_pretrained(network.body, body_of_source, same_tokenizer=same_tokenizer)]
    names = sorted(network.head_weights())
    if not (load_head and isinstance(source, SequenceClassifier) and _same_outputs(network, source)):
        return [*reinitialized, *names]
    weights = source.state_dict()
    with torch.no_grad():
        for name in names:
            network.get_parameter(name).copy_(weights[name])
    return reinitialized


def _same_outputs(network: SequenceClassifier, source: SequenceClassifier) -> bool:
    ours, theirs = network.objective, source.objective
    return (ours.labels, ours.pooler, network.pool) == (theirs.labels, theirs.pooler, source.pool)
