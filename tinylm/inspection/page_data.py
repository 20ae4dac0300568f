"""The page data from one forward pass: tokens, embeddings, attention, residual stream, neurons, lens, attribution, sampling.

Each function returns a JSON value for one part of the page. `effects.py` computes the parts that require more forward passes.

Legend: `T` tokens, `C` width, `L` layers, `H` heads, `K` key/value heads, `D` head width, `F` neurons, `V` vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.errors import InputError
from tinylm.inspection.attribution import attribution, label_attribution
from tinylm.inspection.encoding import encode
from tinylm.inspection.heads import KINDS, HeadScores, entropy_bits
from tinylm.inspection.overview import Inspection
from tinylm.model.base import Model
from tinylm.model.classifier import SequenceClassifier
from tinylm.model.hooks import ActivationCache
from tinylm.recipe.schema import TransformerSection
from tinylm.tokenizer.explain import explain

_NEAREST = 8
_VECTOR_BYTES = 1_800_000
"""Maximum size of all queries, keys and values on a page. For larger models, the page contains only the heads with the highest
scores."""
NEURONS = 5
"""Number of neurons shown for each token and layer."""


def tokens(inspection: Inspection) -> dict[str, Any]:
    """Return the tokens with their losses, and the steps in which the tokenizer splits each word."""
    losses = [token.loss if token.loss is None or math.isfinite(token.loss) else None for token in inspection.tokens]
    rows = [{"id": token.id, "text": token.text, "loss": loss} for token, loss in zip(inspection.tokens, losses, strict=True)]
    tokenizer = inspection.run.tokenizer
    try:
        explanation = explain(tokenizer, inspection.text)
    except InputError as error:
        return {"rows": rows, "kind": tokenizer.kind, "words": [], "reason": error.message}
    words, count = [], 0
    for word in explanation.words:
        if count >= len(rows):
            break
        count += len(word.tokens)
        steps = [{"step": step.description, "parts": step.parts} for step in word.steps]
        words.append({"text": word.text, "ids": [token.id for token in word.tokens], "steps": steps})
    return {"rows": rows, "kind": tokenizer.kind, "words": words, "reason": None}


def embeddings(inspection: Inspection) -> dict[str, Any] | None:
    """Return each token's vectors (embedding, n-grams, position and input to the first block) and the most similar tokens."""
    network, cache = inspection.forward.network, inspection.forward.cache
    try:
        table = network.input_embedding().weight.detach()
    except InputError as error:
        inspection.missing["embeddings"] = error.message
        return None
    names = {
        "embed": "embedding",
        "ngram_embed": "n-gram embedding",
        "pos_embed": "position",
        "blocks.0.resid_pre": "input of layer 0",
    }
    parts = [(label, cache[name][0]) for name, label in names.items() if name in cache]
    if not parts:
        parts = [("embedding", table[inspection.forward.tokens[0]])]
    unique = sorted({token.id for token in inspection.tokens if token.id >= 0})  # the start of a translation has no row
    similarity = F.normalize(table[unique], dim=-1) @ F.normalize(table, dim=-1).T  # (ids, V)
    top = similarity.topk(min(_NEAREST + 1, len(table)), dim=-1)
    nearest = {
        id: [[other, round(value, 3)] for other, value in zip(ids, values, strict=True) if other != id][:_NEAREST]
        for id, ids, values in zip(unique, top.indices.tolist(), top.values.tolist(), strict=True)
    }
    model = network.model
    position = model.position if isinstance(model, TransformerSection) else "none"
    return {
        "parts": [
            {"name": label, "values": encode(vectors, "f2"), "norms": encode(vectors.norm(dim=-1), "f4")}
            for label, vectors in parts
        ],
        "nearest": nearest,
        "position": position,
        "theta": (model.rope_theta or 10000.0) if isinstance(model, TransformerSection) and position == "rope" else None,
    }


def attention(inspection: Inspection) -> dict[str, Any] | None:
    """Return the attention of all heads, and the queries, keys and values of as many heads as `_VECTOR_BYTES` allows."""
    forward, scores = inspection.forward, inspection.heads
    if scores is None or "blocks.0.attn.pattern" not in forward.cache:
        inspection.missing.setdefault("attention", inspection.missing.get("heads", "this architecture has no attention patterns"))
        return None
    return _attention(
        forward.network, forward.cache, "attn", scores, _VECTOR_BYTES if inspection.source is None else _VECTOR_BYTES // 3
    )


def source(inspection: Inspection) -> dict[str, Any] | None:
    """Return a translator's source tokens, the attention of its encoder, and the attention of its decoder to the source tokens."""
    found, forward = inspection.source, inspection.forward
    if found is None:
        return None
    size = _VECTOR_BYTES // 3
    return {
        "rows": [{"id": token.id, "text": token.text} for token in found.tokens],
        "text": found.text,
        "generated": found.generated,
        "attention": _attention(forward.encoder, forward.source_cache, "attn", found.heads, size),
        "cross": _attention(forward.network, forward.cache, "cross_attention", None, size),
        "alignment": encode(found.alignment, "f4"),
    }


def _attention(network: Model, cache: ActivationCache, kind: str, scores: HeadScores | None, vector_bytes: int) -> dict[str, Any]:
    """Return the attention of all layers named `kind`. Without scores, the heads are shown without types, as in cross-attention."""
    model, layers = network.model, range(network.depth)
    patterns = torch.stack([cache[f"blocks.{layer}.{kind}.pattern"][0] for layer in layers])  # (L, H, T, keys)
    q, k, v = (torch.stack([cache[f"blocks.{layer}.{kind}.{name}"][0] for layer in layers]) for name in "qkv")  # (L, T, H or K, D)
    causal = kind == "attn" and network.is_causal
    lower = torch.ones(patterns.shape[-2:], dtype=torch.bool, device=patterns.device).tril()
    group = q.shape[2] // k.shape[2]
    per_head = (q.shape[1] + 2 * k.shape[1]) * q.shape[3] * 2
    entropy = entropy_bits(patterns).mean(-1)
    count = patterns.shape[1]
    order = [divmod(index, count) for index in entropy.flatten().argsort().tolist()] if scores is None else scores.strongest()
    heads = torch.tensor(sorted(order[: max(1, vector_bytes // per_head)]))
    key_heads = heads[:, 1] // group
    result: dict[str, Any] = {
        "layers": len(layers),
        "heads": count,
        "width": q.shape[3],
        "group": group,
        "causal": causal,
        "softcap": getattr(model, "attention_softcap", None),
        "windows": [
            model.window_of(layer) if kind == "attn" and isinstance(model, TransformerSection) else None for layer in layers
        ],
        "strongest": order[0],
        "patterns": encode(patterns[..., lower] if causal else patterns.flatten(-2), "u2"),
        "entropy": encode(entropy, "f4"),
        "scores": None,
        "kinds": None,
        "vectors": {
            "heads": heads.tolist(),
            "q": encode(q[heads[:, 0], :, heads[:, 1]], "f2"),
            "k": encode(k[heads[:, 0], :, key_heads], "f2"),
            "v": encode(v[heads[:, 0], :, key_heads], "f2"),
        },
    }
    if scores is not None:
        result["scores"] = {each: encode(scores.of(each), "f4") for each in KINDS}
        result["kinds"] = [[scores.kind(layer, head) for head in range(count)] for layer in layers]
    return result


def residual(inspection: Inspection) -> dict[str, Any] | None:
    """Return the norms of the residual stream, of the layer outputs added to it and of the final norm's output for each token.

    `spread` is the value by which a normalization layer divides the residual stream.
    """
    network, cache = inspection.forward.network, inspection.forward.cache
    if inspection.lens is None:
        inspection.missing.setdefault("residual", inspection.missing.get("lens", "this architecture has no residual stream"))
        return None
    layers = range(network.depth)

    def stack(name: str) -> Tensor:
        return torch.stack([cache[f"blocks.{layer}.{name}"][0] for layer in layers])  # (L, T, C)

    before, after = stack("resid_pre"), stack("resid_post")
    stream = torch.cat((before[:1], after))
    is_layernorm = getattr(network.model, "norm", None) == "layernorm"
    spread = (stream.var(-1, unbiased=False) if is_layernorm else stream.square().mean(-1)).sqrt()
    result = {
        "norm": "standard deviation" if is_layernorm else "root mean square",
        "stream": encode(stream.norm(dim=-1), "f4"),
        "spread": encode(spread, "f4"),
    }
    if "blocks.0.attn_out" in cache and "blocks.0.mlp_out" in cache:
        attended, fed = stack("attn_out"), stack("mlp_out")
        result["attention"] = encode(attended.norm(dim=-1), "f4")
        result["feed_forward"] = encode(fed.norm(dim=-1), "f4")
        result["cosine"] = encode(F.cosine_similarity(attended, fed, dim=-1), "f4")
    if "blocks.0.cross_attn_out" in cache:
        result["cross_attention"] = encode(stack("cross_attn_out").norm(dim=-1), "f4")
    if "final_norm" in cache:
        result["final"] = encode(cache["final_norm"][0].norm(dim=-1), "f4")
    return result


def active_neurons(inspection: Inspection) -> list[tuple[Tensor, Tensor]]:
    """Return, for each layer, the indices and activations of the most active neurons at each token, both (T, `NEURONS`)."""
    network, cache = inspection.forward.network, inspection.forward.cache
    names = [f"blocks.{layer}.mlp.post" for layer in range(network.depth)]
    if not names or not set(names) <= set(cache):
        inspection.missing["feed_forward"] = f"a model with the {network.architecture} architecture has no feed-forward layers"
        return []
    tops = [cache[name][0].topk(min(NEURONS, cache[name].shape[-1]), dim=-1) for name in names]
    return [(top.indices, top.values) for top in tops]


def lens(inspection: Inspection) -> dict[str, Any] | None:
    """Return the most likely tokens after each layer at each position, and the rank of the true token."""
    if inspection.lens is None:
        return None
    guesses = inspection.lens
    return {"ids": encode(guesses.ids, "i4"), "shares": encode(guesses.probabilities, "f4"), "ranks": encode(guesses.ranks, "i4")}


@torch.no_grad()
def attributions(inspection: Inspection) -> dict[str, Any] | None:
    """Return the contributions to the logits of the target and of its strongest competitor at every position."""
    result, forward = inspection.attributions, inspection.forward
    if result is None:
        return None
    targets = torch.tensor(inspection.targets, device=forward.logits.device)
    competitors = forward.logits[0].scatter(1, targets[:, None], -math.inf).argmax(-1)
    if isinstance(forward.model, SequenceClassifier):
        against = label_attribution(forward.model, int(competitors[0]), None, forward.cache)
    else:
        against = attribution(forward.network, forward.tokens, competitors[None], cache=forward.predictions)
    return {
        "components": result.components,
        "targets": targets.tolist(),
        "competitors": competitors.tolist(),
        "target": encode(result.contributions[:, 0], "f4"),
        "competitor": encode(against.contributions[:, 0], "f4"),
        "logits": encode(torch.stack((result.logits[0], against.logits[0])), "f4"),
        "softcap": getattr(forward.network.model, "logit_softcap", None),
        "position": inspection.attributed.position if inspection.attributed else len(inspection.tokens) - 1,
    }


def sampling(inspection: Inspection) -> dict[str, Any]:
    """Return the sorted logits of the prediction that is sampled, and the ids of the most likely tokens or labels."""
    ordered = inspection.forward.logits[0, inspection.predicted_at].float().sort(descending=True)
    return {"logits": encode(ordered.values, "f4"), "ids": ordered.indices[:200].tolist(), "position": inspection.predicted_at}
