"""The transformer encoder: every position attends to all positions. With `preset: bert`, it matches BertForMaskedLM.

Legend: `B` batch, `T` time, `C` width, `N` targets, `V` vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from tinylm.cost.memory import loss_chunk_rows
from tinylm.model.cache import CacheRows
from tinylm.model.functions import select_targets, summed_cross_entropy
from tinylm.model.layers import Memory, make_norm
from tinylm.model.transformer import Transformer
from tinylm.recipe.encoder import EncoderSection
from tinylm.recipe.schema import TransformerSection


class HeadTransform(nn.Module):
    """BERT's layer between the last block and the head: linear, activation, norm.

    It uses the activation of the feed-forward layers if that is `relu` or `gelu`, and otherwise the exact GELU.
    """

    def __init__(self, model: EncoderSection) -> None:
        super().__init__()
        self.dense = nn.Linear(model.n_embd, model.n_embd, bias=model.bias)
        self.norm = make_norm(model, model.n_embd)
        self.kind = model.feed_forward

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        x = self.dense(x)
        x = F.relu(x) if self.kind == "relu" else F.gelu(x, approximate="tanh" if self.kind == "gelu" else "none")
        transformed: Tensor = self.norm(x)
        return transformed


class Encoder(Transformer):
    """A bidirectional transformer that predicts masked tokens."""

    model: EncoderSection
    causal = False

    def _add_modules(self, model: TransformerSection) -> None:
        assert isinstance(model, EncoderSection)
        self.token_types = nn.Embedding(model.token_types, model.n_embd) if model.token_types else None
        self.head_transform = HeadTransform(model) if model.head_transform else None
        if not model.norm_first_block:
            self.blocks[0].attention_norm = nn.Identity()

    @property
    def _has_head_bias(self) -> bool:
        return self.model.head_bias

    def forward(  # type: ignore[override]  # only models that predict the next token have teachers
        self,
        tokens: Tensor,
        cache: CacheRows | None = None,
        *,
        targets: Tensor | None = None,
        segments: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Ids (B, T) -> logits (B, T, V), or, with `targets` (B, T), the summed loss in nats (a scalar).

        With targets, the head runs only at positions whose target is not negative. `token_types` (B, T) are 0 by default.
        """
        hidden = self.hidden(tokens, segments=segments, token_types=token_types)  # (B, T, C)
        if targets is None:
            return self.logits(hidden)
        hidden, ids = select_targets(hidden, targets)  # (N, C), (N,)
        if self.model.head_bias:
            return F.cross_entropy(self.logits(hidden).float(), ids, ignore_index=-1, reduction="sum")
        chunk = loss_chunk_rows(self.vocab_size, on_gpu=hidden.device.type != "cpu")
        return summed_cross_entropy(
            self._transformed(hidden), self.head.weight, ids, self.model.logit_softcap, chunk, compiled=self.compile_loss
        )

    def hidden(
        self,
        tokens: Tensor,
        cache: CacheRows | None = None,
        *,
        segments: Tensor | None = None,
        n_last: int | None = None,
        added: Tensor | None = None,
        memory: Memory | None = None,
        mask: Tensor | BlockMask | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Ids (B, T) -> final hidden states (B, T, C), the input of `logits`. `cache` and `memory` must be None."""
        if cache is not None or memory is not None:
            raise ValueError("an encoder has neither a cache nor cross-attention")
        if self.token_types is not None:
            vectors = self.token_types.weight[0] if token_types is None else self.token_types(token_types)
            added = vectors if added is None else added + vectors
        elif token_types is not None:
            raise ValueError("this encoder has no token types")
        return super().hidden(tokens, segments=segments, n_last=n_last, added=added, mask=mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V)."""
        return super().logits(self._transformed(hidden))

    def _transformed(self, hidden: Tensor) -> Tensor:
        return hidden if self.head_transform is None else self.head_transform(hidden)

    def head_weights(self) -> frozenset[str]:
        return frozenset(name for name in self.state_dict() if name.startswith(("head.", "head_transform.")))
