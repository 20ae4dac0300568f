"""The transformer: a decoder-only model that a recipe's `model:` section can configure as GPT-2, Llama or the `modern` preset.

It maps token ids to logits or, given targets, to the summed loss.

Legend: `B` batch, `T` time, `C` width, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinylm.cost.memory import loss_chunk_rows
from tinylm.model.cache import CacheRows
from tinylm.model.functions import Dropout, summed_cross_entropy
from tinylm.model.initialization import initialize
from tinylm.model.layers import Attention, Block, FeedForward, ForwardContext, Rotation, make_norm
from tinylm.model.ngrams import NgramEmbedding
from tinylm.model.positions import rope_table, sinusoidal_table
from tinylm.recipe.schema import ModelSection


class Transformer(nn.Module):
    """A causal language model.

    `model` configures its architecture. `seed` determines its initial weights; None skips initialization, for weights that are
    loaded later. Set the attribute `recompute` for activation checkpointing: save only the input of each block, and recompute the
    block in the backward pass.
    """

    def __init__(self, model: ModelSection, vocab_size: int, *, seed: int | None = 0) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self.recompute = False
        self.embedding = nn.Embedding(vocab_size, model.n_embd)
        self.ngrams = NgramEmbedding(model, vocab_size) if model.ngram_embeddings else None
        self.positions = nn.Embedding(model.context_length, model.n_embd) if model.position == "learned" else None
        self.embedding_norm = make_norm(model, model.n_embd) if model.embedding_norm else None
        self.dropout = Dropout(model.dropout)
        self.blocks = nn.ModuleList(Block(model, layer, vocab_size) for layer in range(model.n_layer))
        self.final_norm = make_norm(model, model.n_embd) if model.norm_position == "pre" else None
        self.head = nn.Linear(model.n_embd, vocab_size, bias=False)
        if model.position == "rope":
            cosines, sines = rope_table(model.context_length, model.head_width, model.rope_theta or 10000.0)
            self.register_buffer("rope_cosines", cosines, persistent=False)
            self.register_buffer("rope_sines", sines, persistent=False)
        elif model.position == "sinusoidal":
            self.register_buffer("sinusoids", sinusoidal_table(model.context_length, model.n_embd), persistent=False)
        if seed is not None:
            initialize(self, model, torch.Generator().manual_seed(seed))
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.embedding.weight.requires_grad_(not model.freeze_embeddings)

    def forward(self, tokens: Tensor, cache: CacheRows | None = None, *, targets: Tensor | None = None) -> Tensor:
        """Ids (B, T) -> logits (B, T, V), or with `targets` (B, T) the summed loss in nats, a scalar.

        Negative targets are ignored. The loss is computed without holding all logits in memory. With a `cache`, the ids continue
        its contents and are appended to it. Raises `ValueError` for more than `context_length` positions, including cached ones.
        """
        hidden = self.hidden(tokens, cache)  # (B, T, C)
        if targets is None:
            return self.logits(hidden)
        chunk = loss_chunk_rows(self.vocab_size, on_gpu=hidden.device.type != "cpu")
        loss: Tensor = _summed_loss(hidden.flatten(0, 1), self.head.weight, targets.flatten(), self.model.logit_softcap, chunk)
        return loss

    def hidden(self, tokens: Tensor, cache: CacheRows | None = None, *, n_last: int | None = None) -> Tensor:
        """Ids (B, T) -> final hidden states (B, T, C), the input of the head. `n_last`: return only the last `n_last` positions."""
        start = cache.length if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.model.context_length:
            raise ValueError(f"{end} positions do not fit in the context length of {self.model.context_length}")
        x = self._embed(tokens, start, end, cache)  # (B, T, C)
        context = ForwardContext(tokens, x, self._rotation(start, end), cache)
        first_values: Tensor | None = None
        for number, block in enumerate(self.blocks, 1):
            if n_last is not None and number == len(self.blocks):
                x, values = block(x, context, first_values, n_last=n_last)  # (B, n_last, C)
            elif self.recompute and torch.is_grad_enabled():
                x, values = checkpoint(
                    block, x, context, first_values, use_reentrant=False, preserve_rng_state=self.model.uses_dropout
                )
            else:
                x, values = block(x, context, first_values)
            if first_values is None and self.model.value_residual:
                first_values = values
        if cache is not None:
            cache.advance(tokens.shape[1])
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V), soft-capped if `logit_softcap` is set (Gemma 2, section 2)."""
        logits: Tensor = self.head(hidden)
        cap = self.model.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _embed(self, tokens: Tensor, start: int, end: int, cache: CacheRows | None) -> Tensor:
        """Input of the first block for ids (B, T) at positions [start, end): (B, T, C)."""
        x: Tensor = self.embedding(tokens)
        if self.ngrams is not None:
            x = x + self.ngrams(tokens if cache is None else cache.update_tokens(tokens))[:, -tokens.shape[1] :]
        if self.positions is not None:
            x = x + self.positions.weight[start:end]
        elif self.model.position == "sinusoidal":
            x = x + self.get_buffer("sinusoids")[start:end]
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.bfloat16:
            x = x.bfloat16()  # halves the memory traffic of the residual stream; the range of float16 is too small for it
        dropped: Tensor = self.dropout(x)
        return dropped

    def _rotation(self, start: int, end: int) -> Rotation | None:
        if self.model.position != "rope":
            return None
        return self.get_buffer("rope_cosines")[start:end, None], self.get_buffer("rope_sines")[start:end, None]

    def stacked_matrices(self) -> dict[str, tuple[int, ...]]:
        """The parameters that stack several matrices: name -> number of rows of each matrix."""
        rows: dict[str, tuple[int, ...]] = {}
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                keys = module.kv_heads * module.head_width
                rows[f"{name}.qkv.weight"] = (module.query_rows, keys, keys)
            elif isinstance(module, FeedForward) and module.kind == "swiglu":
                rows[f"{name}.input.weight"] = (self.model.feed_forward_width,) * 2
        return rows

    def parameter_count(self) -> int:
        """Number of parameters, frozen ones included. A tied head is counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None, chunk: int) -> Tensor:
    """`summed_cross_entropy`, excluded from compiled graphs: in matrix products and one pass per chunk, there is little to fuse."""
    return summed_cross_entropy(hidden, weight, targets, cap, chunk)
