"""Split a transformer's final hidden state into the contributions of its embeddings, heads, feed-forward layers and biases.

The residual stream is a sum, and a norm with a fixed scale is linear. Each norm is therefore "frozen": it is applied to every part
with the scale from the actual forward pass, and the parts still add up to the hidden state. This is the basis of direct logit
attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").

Legend: `N` components, `B` batch, `T` time, `C` width, `H` heads, `D` head width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinylm.errors import InputError
from tinylm.model.base import Model
from tinylm.model.hooks import ActivationCache
from tinylm.model.layers import Attention, Block, RMSNorm
from tinylm.model.transformer import Transformer

_NAMES = re.compile(r"(ngram_|pos_)?embed|final_norm|blocks\.\d+\.(attn\.z|cross_attention\.z|mlp_out)")
"""Matches the hook points that attribution reads. A network does not need to have all of them."""


@dataclass(frozen=True)
class Components:
    """Named vectors that add up to an activation. `vectors`: (N, B, T, C)."""

    names: list[str]
    vectors: Tensor

    @property
    def total(self) -> Tensor:
        """The sum of all components, (B, T, C)."""
        return self.vectors.sum(0)

    def scaled(self, factor: Tensor) -> Components:
        return Components(self.names, self.vectors * factor)

    def __add__(self, other: Components) -> Components:
        """Add components with the same name, and append the remaining components of `other`."""
        position = {name: index for index, name in enumerate(self.names)}
        vectors = self.vectors.clone()
        new = [index for index, name in enumerate(other.names) if name not in position]
        for index, name in enumerate(other.names):
            if name in position:
                vectors[position[name]] += other.vectors[index]
        names = [*self.names, *(other.names[index] for index in new)]
        return Components(names, torch.cat((vectors, other.vectors[new])))


def decompose(network: Model, cache: ActivationCache) -> Components:
    """Split the input of the output projection into components. `cache` contains a forward pass's activations at `hook_names`.

    The components are the embeddings (`embed`, `ngram_embed`, `pos_embed`), every head (`L0H3`), the bias of every attention output
    projection (`L0 attention bias`), every head of a cross-attention layer (`L0X3`) and its bias, every feed-forward layer with its
    bias (`L0 feed-forward`), and the bias of every LayerNorm that is applied to the residual stream. Value embeddings and value
    residuals are part of the heads that read them. QK norms and attention soft-caps affect only the attention pattern. Raises
    `InputError` if the network is not a decoder or an encoder, or if it has a `head_transform`.
    """
    if not isinstance(network, Transformer):
        raise InputError(f"a model with the {network.architecture} architecture cannot be split into components")
    if getattr(network, "head_transform", None) is not None:
        raise InputError("head_transform is not linear, so the logits of this model are not sums of components")
    embedded = _embedded(network, cache)
    parts = embedded
    for layer in range(network.depth):
        block = network.blocks[layer]
        assert isinstance(block, Block)
        parts = _through_block(block, layer, parts, embedded, cache)
    return parts if network.final_norm is None else frozen_norm(network.final_norm, parts, "final norm bias")


def hook_names(network: Model) -> list[str]:
    """Return the hook points of `network` that `decompose` and `final_hidden` read."""
    names = network.hook_names()
    last = f"blocks.{network.depth - 1}.resid_post"
    return [name for name in names if _NAMES.fullmatch(name) or (name == last and "final_norm" not in names)]


def final_hidden(network: Model, cache: ActivationCache) -> Tensor:
    """Return the final hidden states (B, T, C), which equal the sum of the components. `cache`: see `decompose`."""
    return cache["final_norm"] if "final_norm" in cache else cache[f"blocks.{network.depth - 1}.resid_post"]


def _embedded(network: Transformer, cache: ActivationCache) -> Components:
    names = [name for name in ("embed", "ngram_embed", "pos_embed") if name in cache]
    parts = Components(names, torch.stack([cache[name] for name in names]))
    return parts if network.embedding_norm is None else frozen_norm(network.embedding_norm, parts, "embedding norm bias")


def _through_block(block: Block, layer: int, x: Components, embedded: Components, cache: ActivationCache) -> Components:
    """Propagate the components through a block. Mirrors `Block.forward`."""
    if block.residual_mix is not None:
        x_share, embedded_share = block.residual_mix.unbind()
        x = x.scaled(x_share) + embedded.scaled(embedded_share)
    attended, crossed = _heads(block, layer, cache), _cross_heads(block, layer, cache)
    feed_forward = Components([f"L{layer} feed-forward"], cache[f"blocks.{layer}.mlp_out"].unsqueeze(0))
    if not block.post:
        return x + attended + feed_forward if crossed is None else x + attended + crossed + feed_forward
    if block.feed_forward_norm is None:  # parallel
        return frozen_norm(block.attention_norm, x + attended + feed_forward, f"L{layer} norm bias")
    middle = frozen_norm(block.attention_norm, x + attended, f"L{layer} attention norm bias")
    if crossed is not None:
        assert block.cross_attention_norm is not None
        middle = frozen_norm(block.cross_attention_norm, middle + crossed, f"L{layer} cross-attention norm bias")
    return frozen_norm(block.feed_forward_norm, middle + feed_forward, f"L{layer} feed-forward norm bias")


def _heads(block: Block, layer: int, cache: ActivationCache) -> Components:
    """Return the contributions of each head and of the output projection's bias to the residual stream."""
    parts = _projected(block.attention, cache[f"blocks.{layer}.attn.z"], f"L{layer}H", f"L{layer} attention bias")
    norm = block.attention_norm if block.norm_position == "output" else block.attention_output_norm
    return parts if norm is None else frozen_norm(norm, parts, f"L{layer} attention output norm bias")


def _cross_heads(block: Block, layer: int, cache: ActivationCache) -> Components | None:
    """Return the same contributions for the cross-attention layer, or None if the block has none."""
    if block.cross_attention is None:
        return None
    z = cache[f"blocks.{layer}.cross_attention.z"]
    parts = _projected(block.cross_attention, z, f"L{layer}X", f"L{layer} cross-attention bias")
    norm = block.cross_attention_norm if block.norm_position == "output" else block.cross_attention_output_norm
    return parts if norm is None else frozen_norm(norm, parts, f"L{layer} cross-attention output norm bias")


def _projected(attention: Attention, z: Tensor, head_name: str, bias_name: str) -> Components:
    """Multiply the output of each head, z (B, T, H, D), by its part of the output projection."""
    projection = attention.output
    weight = projection.weight.view(-1, *z.shape[-2:])  # (C, H, D)
    names = [f"{head_name}{head}" for head in range(z.shape[2])]
    vectors = torch.einsum("bthd,chd->hbtc", z, weight)
    if projection.bias is not None:
        names.append(bias_name)
        vectors = torch.cat((vectors, projection.bias.expand_as(vectors[:1])))
    return Components(names, vectors)


def frozen_norm(norm: nn.Module, parts: Components, bias_name: str) -> Components:
    """Apply a norm to each component with the scale computed from their sum. A bias becomes a separate component."""
    total, vectors = parts.total, parts.vectors
    if isinstance(norm, RMSNorm):
        scaled = vectors * torch.rsqrt(total.square().mean(-1, keepdim=True) + norm.eps)
        return Components(parts.names, scaled if norm.weight is None else scaled * norm.weight)
    assert isinstance(norm, nn.LayerNorm)
    scale = torch.rsqrt(total.var(-1, keepdim=True, unbiased=False) + norm.eps)
    scaled = (vectors - vectors.mean(-1, keepdim=True)) * scale
    learned = dict(norm.named_parameters())  # none, the gain, or the gain and the bias
    if "weight" in learned:
        scaled = scaled * learned["weight"]
    if "bias" not in learned:
        return Components(parts.names, scaled)
    return Components(parts.names, scaled) + Components([bias_name], learned["bias"].expand_as(scaled[:1]))
