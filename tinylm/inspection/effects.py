"""The page data that requires additional forward passes: neurons on held-out text, ablation, patching and checkpoints."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tinylm.errors import InputError
from tinylm.inspection.encoding import encode
from tinylm.inspection.heads import KINDS
from tinylm.inspection.heldout import HeldoutWindows
from tinylm.inspection.input import token_ids
from tinylm.inspection.interventions import Ablation, Metric, ablate, logit_difference, patch
from tinylm.inspection.learning import CheckpointView
from tinylm.inspection.neurons import neuron_name, top_activations
from tinylm.inspection.overview import Inspection
from tinylm.model.base import Model
from tinylm.reporting import Reporter
from tinylm.tokenizer.control_tokens import ControlTokens

NEURON_TOKENS = 2048
"""Number of held-out tokens that are searched for the snippets in which neurons are most active."""
_SNIPPETS = 3
_ABLATION_FLOPS = 1.5e11
"""FLOP limit for ablations. This takes a few seconds on two cores."""
_WITHOUT_EFFECTS = {"classification": "classifiers", "translation": "translation models"}
"""The tasks for which ablations and activation patching are not available, and the names of their models."""
_MIN_ABLATION_TOKENS = 128
_MAX_ABLATION_TOKENS = 4096


def ablation_tokens(network: Model) -> int:
    """Return the number of held-out tokens for which ablating all heads and layers stays within `_ABLATION_FLOPS`."""
    weights = sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Linear))
    names = network.hook_names()
    heads = getattr(network.model, "n_head", 0)
    passes = 1 + sum(heads if name.endswith(".attn.z") else 1 for name in names if name.endswith((".attn.z", ".mlp_out")))
    tokens = int(_ABLATION_FLOPS / (2 * max(1, weights) * passes))
    return max(_MIN_ABLATION_TOKENS, min(_MAX_ABLATION_TOKENS, tokens))


@torch.no_grad()
def neurons(inspection: Inspection, active: list[tuple[Tensor, Tensor]], text: HeldoutWindows | None) -> dict[str, Any] | None:
    """Return the most active neurons for each token, and the places in held-out text where these neurons are most active."""
    if not active:
        return None
    network = inspection.forward.network
    result: dict[str, Any] = {
        "ids": encode(torch.stack([ids for ids, _ in active]), "i4"),
        "values": encode(torch.stack([values for _, values in active]), "f4"),
        "snippets": None,
    }
    if text is None:
        return result
    windows = text.inputs.to(network.device)
    with network.caching([neuron_name(network, layer) for layer in range(len(active))]) as cache:
        network.hidden(windows)
    places: dict[str, list[list[float]]] = {}
    for layer, (ids, _) in enumerate(active):
        chosen = torch.unique(ids)
        top = top_activations(network, windows, layer, chosen, count=_SNIPPETS, cache=cache)
        rows = zip(chosen.tolist(), top.windows.tolist(), top.positions.tolist(), top.values.tolist(), strict=True)
        for neuron, window_row, position_row, value_row in rows:
            found = zip(window_row, position_row, value_row, strict=True)
            places[f"{layer}.{neuron}"] = [[window, position, round(value, 3)] for window, position, value in found]
    result["snippets"] = {"windows": text.inputs.tolist(), "places": places, "tokens": text.inputs.numel()}
    return result


def ablations(
    inspection: Inspection, text: HeldoutWindows | None, requested: int | None, reporter: Reporter
) -> dict[str, Any] | None:
    """Measure the change in bits per byte when each head or feed-forward layer is replaced with its mean."""
    network = inspection.forward.network
    if inspection.forward.task in _WITHOUT_EFFECTS:
        inspection.missing["ablation"] = f"ablations are not measured for {_WITHOUT_EFFECTS[inspection.forward.task]}"
        return None
    if text is None or requested == 0:
        return None
    tokens = ablation_tokens(network) if requested is None else requested
    subset = text.subset(tokens, inspection.run.tokenizer.token_byte_lengths)
    try:
        with reporter.progress("ablations", None, "") as advance:
            result = ablate(network, subset.inputs.to(network.device), subset.targets.to(network.device), on_progress=advance)
    except InputError as error:
        inspection.missing["ablation"] = error.message
        return None
    factor = Ablation.bits_per_byte_factor(result.tokens, subset.bytes)
    return {
        "heads": encode(result.heads * factor, "f4"),
        "head_errors": encode(result.head_errors * factor, "f4"),
        "feed_forward": encode(result.feed_forward * factor, "f4"),
        "feed_forward_errors": encode(result.feed_forward_errors * factor, "f4"),
        "bits_per_byte": result.loss * factor,
        "tokens": result.tokens,
        "bytes": subset.bytes,
    }


@torch.no_grad()
def patching(inspection: Inspection, corrupt: str | None, reporter: Reporter) -> dict[str, Any] | None:
    """Measure how patching in activations from the inspected text affects the prediction for the `corrupt` text.

    Raises `InputError` if the texts have different numbers of tokens.
    """
    if inspection.forward.task in _WITHOUT_EFFECTS:
        inspection.missing["patching"] = f"activation patching does not support {_WITHOUT_EFFECTS[inspection.forward.task]}"
        if corrupt is not None:
            raise InputError(inspection.missing["patching"], where="--corrupt", hint="omit it")
    if corrupt is None:
        return None
    network, clean = inspection.forward.network, inspection.forward.tokens
    ids = token_ids(inspection.run, corrupt, inspection.options)
    if len(ids) != clean.shape[1]:
        problem = f"has {len(ids)} tokens, but the text has {clean.shape[1]}"
        raise InputError(problem, where="--corrupt", hint="activation patching compares two texts token by token")
    other = clean.new_tensor([ids])
    if inspection.forward.task == "masked_lm":  # the prediction is for a masked token
        clean, mask = clean.clone(), ControlTokens.of(inspection.run.tokenizer).mask
        clean[0, inspection.predicted_at] = other[0, inspection.predicted_at] = mask
    try:
        metric, description = _patching_metric(inspection, other)
        with reporter.progress("patching", 2 * network.depth, "") as advance:
            at = inspection.predicted_at
            positions = patch(network, clean, other, metric, position=at, on_progress=advance)
            heads = patch(
                network, clean, other, metric, at="z", position=at, on_progress=lambda done: advance(network.depth + done)
            )
    except InputError as error:
        raise InputError(error.message, where="--corrupt", hint=error.hint) from None
    return {
        "texts": [inspection.token_text(id) for id in ids],
        "positions": encode(positions, "f4"),
        "heads": encode(heads, "f4"),
        "metric": description,
    }


def _patching_metric(inspection: Inspection, other: Tensor) -> tuple[Metric, str]:
    """Return the metric and its description.

    The metric is the difference between the logits of the top predictions for the two texts. If both predictions are the same
    token, the metric is the log-probability of that token.
    """
    forward = inspection.forward
    target = int(forward.logits[0, inspection.predicted_at].argmax())
    rival = int(forward.network(other)[0, inspection.predicted_at].argmax())
    names = [f"[{inspection.token_text(id)}]" for id in (target, rival)]
    if target == rival:
        return lambda logits: logits.log_softmax(-1)[:, target], f"the log-probability of {names[0]}"
    return logit_difference(target, rival), f"the logit of {names[0]} minus the logit of {names[1]}"


def learning(views: list[CheckpointView]) -> dict[str, Any] | None:
    """Return losses, head scores and attention at several checkpoints."""
    if not views:
        return None
    losses = [[math.nan if loss is None else loss for loss in view.losses] for view in views]
    result: dict[str, Any] = {
        "steps": [view.step for view in views],
        "losses": encode(torch.tensor(losses), "f4"),
        "means": [view.mean_loss for view in views],
    }
    heads = [view.heads for view in views if view.heads is not None]
    if heads:
        result["scores"] = {kind: encode(torch.stack([scores.of(kind) for scores in heads]), "f4") for kind in KINDS}
    patterns = [view.patterns for view in views if view.patterns is not None]
    if patterns:
        result["patterns"] = encode(torch.stack(patterns), "u1")
    return result
