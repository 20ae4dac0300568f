"""The transformer: one decoder stack that a recipe's `model:` section configures into GPT-2, Llama or our own.

Token ids in, logits out, or with targets the sum of their losses. It knows nothing of devices, ranks or files.

Legend: B batch, T time, C width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinylm.cost.memory import LOSS_BYTES, LOSS_ROWS
from tinylm.model.cache import CacheRows
from tinylm.model.functions import Dropout, summed_cross_entropy
from tinylm.model.initialization import initialize
from tinylm.model.layers import Attention, Block, FeedForward, ForwardContext, Rotation, make_norm
from tinylm.model.ngrams import NgramEmbedding
from tinylm.model.positions import rope_table, sinusoidal_table
from tinylm.recipe.schema import ModelSection


class Transformer(nn.Module):
    """A causal language model. `model` gives its shape and parts, `seed` its starting weights; None leaves them to be loaded.

    `recompute`: keep only each block's input for the backward pass and compute the block again there.
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
        """Logits (B, T, V) for ids (B, T). With a cache, the ids continue what it holds and are added to it.

        At most `context_length` positions, the cached ones included. With `targets` (B, T): instead of logits the sum of
        their losses in nats, a number; negative targets do not count. The logits are then never all in memory.
        """
        hidden = self.hidden(tokens, cache)
        if targets is None:
            return self.logits(hidden)
        room = LOSS_BYTES["cpu" if hidden.device.type == "cpu" else "gpu"]
        chunk = max(LOSS_ROWS, room // (4 * self.vocab_size))
        total: Tensor = _summed(hidden.flatten(0, 1), self.head.weight, targets.flatten(), self.model.logit_softcap, chunk)
        return total

    def hidden(self, tokens: Tensor, cache: CacheRows | None = None, *, last: int | None = None) -> Tensor:
        """What the head reads: (B, T) ids -> (B, T, C), after the last norm. `last`: only for so many last tokens."""
        start = cache.length if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.model.context_length:
            raise ValueError(f"{end} positions do not fit the context of {self.model.context_length}")
        x: Tensor = self.embedding(tokens)  # (B, T, C)
        if self.ngrams is not None:
            x = x + self.ngrams(tokens if cache is None else cache.remember(tokens))[:, -tokens.shape[1] :]
        if self.positions is not None:
            x = x + self.positions.weight[start:end]
        elif self.model.position == "sinusoidal":
            x = x + self.get_buffer("sinusoids")[start:end]
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.bfloat16:
            x = x.bfloat16()  # the residual stream too: half of the memory traffic (float16 has not the range)
        x = self.dropout(x)
        shared = ForwardContext(tokens, x, self._rotation(start, end), cache)
        first_values: Tensor | None = None
        for number, block in enumerate(self.blocks, 1):
            if last is not None and number == len(self.blocks):
                x, values = block(x, shared, first_values, last=last)
            elif self.recompute and torch.is_grad_enabled():
                x, values = checkpoint(
                    block, x, shared, first_values, use_reentrant=False, preserve_rng_state=self.model.uses_dropout
                )
            else:
                x, values = block(x, shared, first_values)
            if first_values is None and self.model.value_residual:
                first_values = values
        if cache is not None:
            cache.advance(tokens.shape[1])
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V), capped when the recipe says so (Gemma 2, section 2)."""
        logits: Tensor = self.head(hidden)
        cap = self.model.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _rotation(self, start: int, end: int) -> Rotation | None:
        if self.model.position != "rope":
            return None
        return self.get_buffer("rope_cosines")[start:end, None], self.get_buffer("rope_sines")[start:end, None]

    def stacked_matrices(self) -> dict[str, tuple[int, ...]]:
        """Parameters that hold several matrices one above the other, by name, with the rows of each."""
        rows: dict[str, tuple[int, ...]] = {}
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                keys = module.kv_heads * module.head_width
                rows[f"{name}.qkv.weight"] = (module.query_rows, keys, keys)
            elif isinstance(module, FeedForward) and module.kind == "swiglu":
                rows[f"{name}.input.weight"] = (self.model.feed_forward_width,) * 2
        return rows

    def parameter_count(self) -> int:
        """Trainable numbers, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _summed(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None, chunk: int) -> Tensor:
    """The loss over the vocabulary stays out of compiled graphs: it is matrix products and one pass over each chunk."""
    return summed_cross_entropy(hidden, weight, targets, cap, chunk)
