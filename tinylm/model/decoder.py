"""One token for every row of a batch: the transformer's arithmetic written for a single position, outside autograd.

Nothing here depends on tokens that were read before but the cache. Rows may stand at different positions, so that prompts of
different lengths, and requests that come and go, decode together. On a CPU the step may be machine code instead, which
`tinylm.model.compiled` prepares. `Transformer.hidden` stays the definition; tests hold all to the same numbers for every part
that a recipe can name.

Legend: B rows, C width, H heads, K key/value heads, G = H / K, D head width, S positions looked at, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.model.cache import KeyValueCache, LayerViews
from tinylm.model.compiled import CompiledStep, load, pays
from tinylm.model.layers import Attention, Block, RMSNorm
from tinylm.model.packed import TransposedLinear, WeightKind, pack
from tinylm.model.transformer import Transformer
from tinylm.reporting import Reporter

Apply = Callable[[Tensor], Tensor]
_SHORT = 32
"""Tokens of a prompt that machine code reads, as if they were rows: more are read faster by products of large matrices."""


class Decoder:
    """Reads prompts into rows of a cache and continues them, token by token.

    `compiled`: on a CPU the step is one call of machine code (`tinylm.model.compiled`), and a row's numbers are the same to the
    bit whatever rows stand beside it. Elsewhere `torch.compile` gets it, with shapes that never change and, on CUDA, as a
    graph; that costs tens of seconds before the first token. Raises `InputError` for what cannot be compiled.
    """

    def __init__(self, network: Transformer, *, weights: WeightKind = "fp32", compiled: bool = False) -> None:
        self._machine_code: CompiledStep | None = None
        self._compiled = compiled
        if compiled and network.embedding.weight.device.type == "cpu":
            self.network = pack(network, None if weights == "fp32" else weights)  # which reads prompts only
            self._machine_code = CompiledStep(self.network)
        else:
            self.network = pack(network, weights)
            self._look_up()
        self.model = self.network.model

    def _look_up(self) -> None:
        """What a step in tensors needs, found once."""
        network, model = self.network, self.network.model
        self._layers = [_Layer(cast(Block, block), network) for block in network.blocks]
        self._embedding_norm = _norm(network.embedding_norm)
        self._final_norm = _norm(network.final_norm)
        self._head = _linear(network.head)
        self._shares_first_values = model.value_residual
        self._run = self.advance
        if self._compiled:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self._run = torch.compile(self.advance, dynamic=False, fullgraph=True, mode=mode)
        if model.position == "rope":
            cosines, sines = network.get_buffer("rope_cosines"), network.get_buffer("rope_sines")
            turns = torch.stack((torch.cat((cosines, cosines), -1), torch.cat((-sines, sines), -1)), 1)
            self._turns = turns[:, :, None]  # (context, 2, 1, D)
        if network.ngrams is not None:
            self._reach = torch.arange(max(network.ngrams.orders), device=self.device).flip(0)

    @property
    def device(self) -> torch.device:
        return self.network.embedding.weight.device

    @property
    def is_machine_code(self) -> bool:
        return self._machine_code is not None

    def cache(self, rows: int, capacity: int | None = None) -> KeyValueCache:
        """Room for `rows` texts of up to `capacity` tokens; default: the model's context."""
        dtype = self.network.embedding.weight.dtype
        return KeyValueCache(self.model, rows, capacity or self.model.context_length, device=self.device, dtype=dtype)

    @torch.inference_mode()
    def read(self, cache: KeyValueCache, row: int, ids: Sequence[int] | Tensor) -> Tensor:
        """Fill a row with these ids from the beginning; the logits (V,) after the last."""
        tokens = torch.as_tensor(ids, device=self.device, dtype=torch.long)[None]
        if self._machine_code is not None and tokens.shape[1] <= _SHORT:
            logits = self._machine_code.read(cache, row, tokens[0])
            cache.lengths[row] = tokens.shape[1]
            return logits
        return self.network.logits(self.network.hidden(tokens, cache.rows(row, row + 1), last=1)[0])[0]

    def step(self, cache: KeyValueCache, tokens: Tensor) -> Tensor:
        """Add one id (B,) to every row, of which none may be full, and give the logits (B, V) after it.

        To be called in inference mode, which is not entered here: for a small model that would be a hundredth of the time.
        """
        lengths = cache.lengths
        if self._machine_code is not None:
            logits = self._machine_code(cache, tokens)
        elif self._compiled:  # always the same shapes: rows that are not in use write where the next prompt will
            unused = len(cache.tokens) - len(lengths)
            positions = torch.tensor(lengths + [0] * unused, device=self.device)
            padded = F.pad(tokens, (0, unused))
            logits = self._run(cache.whole, cache.tokens, padded, positions, cache.capacity, False)[: len(lengths)]
        else:
            longest = max(lengths) + 1
            positions = torch.tensor(lengths, device=self.device)
            logits = self._run(cache.layers, cache.tokens, tokens, positions, longest, min(lengths) + 1 == longest)
        cache.lengths[:] = [length + 1 for length in lengths]
        return logits

    def advance(self, stored: list[LayerViews], read: Tensor, tokens: Tensor, positions: Tensor, span: int, even: bool) -> Tensor:
        """A step's arithmetic: tensors in, logits (B, V) out, nothing looked up or left behind but in the cache.

        Row b adds tokens[b] at positions[b], to be seen among the first `span` positions. `even`: every row stands at position
        span - 1, so that nothing must be hidden from it.
        """
        B, capacity = tokens.shape[0], read.shape[1]
        places = positions + torch.arange(0, B * capacity, capacity, device=positions.device) if B > 1 else positions
        mask = None
        if not even:
            hidden = torch.arange(span, device=positions.device) > positions[:, None]
            mask = torch.zeros(hidden.shape, device=positions.device, dtype=stored[0].keys.dtype)
            mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]
        x = self._embedded(tokens, positions, read, places)
        turn = self._turns.index_select(0, positions).unbind(1) if self.model.position == "rope" else None
        embedded, first = x, None
        for layer, views in zip(self._layers, stored, strict=True):
            x, mixed_values = layer(x, tokens, embedded, turn, views, places, span, mask, first)
            if first is None and self._shares_first_values:
                first = mixed_values
        logits = self._head(self._final_norm(x))
        cap = self.model.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _embedded(self, tokens: Tensor, positions: Tensor, read: Tensor, places: Tensor) -> Tensor:
        network = self.network
        x = F.embedding(tokens, network.embedding.weight)
        if network.ngrams is not None:
            read.view(-1).index_copy_(0, places, tokens)
            back = positions[:, None] - self._reach
            window = read[: len(tokens)].gather(1, back.clamp_min(0)).masked_fill_(back < 0, network.ngrams.missing)
            x = x + network.ngrams(window)[:, -1]
        if network.positions is not None:
            x = x + F.embedding(positions, network.positions.weight)
        elif self.model.position == "sinusoidal":
            x = x + F.embedding(positions, network.get_buffer("sinusoids"))
        return self._embedding_norm(x)


def prepared(network: Transformer, *, weights: WeightKind, compiled: bool | None, steps: int | None, reporter: Reporter) -> Decoder:
    """A decoder for about so many steps, None being no end of them. `compiled` None: on a CPU, and where it pays."""
    compiled = pays(network, steps) if compiled is None else compiled
    if compiled and network.embedding.weight.device.type == "cpu":
        load(reporter.note)
    return Decoder(network, weights=weights, compiled=compiled)


class _Layer:
    """A block for one position. Everything that does not change from token to token is looked up here, once."""

    def __init__(self, block: Block, network: Transformer) -> None:
        attention: Attention = block.attention
        self._post, self._parallel = block.post, block.parallel
        self._attention_norm = _norm(block.attention_norm)
        self._feed_norm = None if block.feed_forward_norm is None else _norm(block.feed_forward_norm)
        self._qkv = _linear(attention.qkv)
        self._output = _added(attention.output)
        self._widen = _linear(block.feed_forward.input)
        self._narrow = _added(block.feed_forward.output)
        self._kind = block.feed_forward.kind
        self._shares = None if block.residual_mix is None else block.residual_mix.detach().unbind()
        self._value_embedding = block.value_embedding
        self._value_share = attention.value_share
        self._heads, self._kv_heads, self._width = attention.heads, attention.kv_heads, attention.head_width
        self._turned = attention.heads + attention.kv_heads
        self._eps = attention.qk_norm_eps
        self._gains = None
        if attention.query_gain is not None and attention.key_gain is not None:
            gains = (attention.query_gain.expand(self._heads, -1), attention.key_gain.expand(self._kv_heads, -1))
            self._gains = torch.cat(gains).detach()

    def __call__(
        self,
        x: Tensor,
        tokens: Tensor,
        embedded: Tensor,
        turn: tuple[Tensor, ...] | None,
        stored: LayerViews,
        places: Tensor,
        span: int,
        mask: Tensor | None,
        first: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(B, C) -> (B, C), and the values (B, K, D). Keys and values are stored at `places`."""
        if self._shares is not None:
            x = self._shares[0] * x + self._shares[1] * embedded
        B = x.shape[0]
        together = self._qkv(x if self._post else self._attention_norm(x)).view(B, -1, self._width)
        q, k, v = self._norm_and_rotate(together, turn)
        if self._value_embedding is not None:
            v = v + self._value_embedding(tokens).view(B, self._kv_heads, self._width)
        if self._value_share is not None and first is not None:
            v = torch.lerp(first, v, self._value_share)
        stored.written_keys.index_copy_(0, places, k)
        stored.written_values.index_copy_(0, places, v)
        mixed = F.scaled_dot_product_attention(
            q.reshape(B, self._kv_heads, -1, self._width),  # queries of one group stand as if they were positions
            stored.keys.narrow(2, 0, span),
            stored.values.narrow(2, 0, span),
            attn_mask=mask,
        ).view(B, -1)
        if self._feed_norm is None:
            return self._attention_norm(self._feed(x, self._output(mixed, x))), v
        if self._post:
            x = self._attention_norm(self._output(mixed, x))
            return self._feed_norm(self._feed(x, x)), v
        attended = self._output(mixed, x)
        return self._feed(self._feed_norm(x if self._parallel else attended), attended), v

    def _norm_and_rotate(self, together: Tensor, turn: tuple[Tensor, ...] | None) -> Sequence[Tensor]:
        """Queries (B, H, D), keys and values (B, K, D), the first two normalised and turned to their position."""
        if self._eps is None and turn is None:
            return together.split_with_sizes([self._heads, self._kv_heads, self._kv_heads], 1)
        looking = together.narrow(1, 0, self._turned)
        if self._eps is not None:
            looking = _root_mean_square(looking, self._eps)
            if self._gains is not None:
                looking.mul_(self._gains)
        if turn is not None:
            cosines, sines = turn  # (B, 1, D); the second half of the angles is the first's, with the sign of its partner
            looking = torch.addcmul(looking * cosines, looking.roll(self._width // 2, -1), sines)
        return (
            looking.narrow(1, 0, self._heads),
            looking.narrow(1, self._heads, self._kv_heads),
            together.narrow(1, self._turned, self._kv_heads),
        )

    def _feed(self, x: Tensor, residual: Tensor) -> Tensor:
        hidden = self._widen(x)
        if self._kind in ("gelu", "gelu_exact"):
            return self._narrow(F.gelu(hidden, approximate="tanh" if self._kind == "gelu" else "none"), residual)
        if self._kind == "relu":
            return self._narrow(hidden.relu_(), residual)
        if self._kind == "relu2":
            return self._narrow(hidden.relu_().square_(), residual)
        gate, values = hidden.chunk(2, -1)
        return self._narrow(F.silu(gate).mul_(values), residual)


def _linear(layer: nn.Module) -> Apply:
    """A packed linear layer as a plain function: looking a parameter up in a module costs as much as a small product."""
    if not isinstance(layer, TransposedLinear):
        forward: Apply = layer.forward
        return forward
    weight, bias = layer.weight.detach(), layer.bias
    if bias is None:
        return lambda x: torch.mm(x, weight)
    added = bias.detach()
    return lambda x: torch.addmm(added, x, weight)


def _added(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """A packed linear layer whose result is added to a residual stream: (x, residual) -> residual + layer(x)."""
    if isinstance(layer, TransposedLinear) and layer.bias is None:
        weight = layer.weight.detach()
        return lambda x, residual: torch.addmm(residual, x, weight)
    apply = _linear(layer)
    return lambda x, residual: apply(x).add_(residual)


def _root_mean_square(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square: four small kernels, where the composite norm takes three times as long for a row."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    normal: Tensor = x * length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return normal


def _norm(norm: nn.Module | None) -> Apply:
    if norm is None:
        return lambda x: x
    if isinstance(norm, RMSNorm):
        eps, gain = norm.eps, norm.weight
        if gain is None:
            return lambda x: _root_mean_square(x, eps)
        gains = gain.detach()
        return lambda x: _root_mean_square(x, eps).mul_(gains)
    assert isinstance(norm, nn.LayerNorm)
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
