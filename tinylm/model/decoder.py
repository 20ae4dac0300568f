"""Decoding: fill rows of a KV cache with prompts (prefill), then add one token at a time to every row (step).

A step is equivalent to `Transformer.hidden` and `Transformer.logits` for one new position per row, but without autograd or
module calls. All state is in the cache. Rows can have different lengths, so requests can join and leave a batch at any time. On a
CPU, numba-compiled code can run the step instead (see `tinylm.model.compiled`).

Legend: `B` rows, `T` prompt tokens, `C` width, `H` query heads, `K` key/value heads, `G` = `H` / `K`, `D` head width, `S` cached
positions, `V` vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.device import has_bf16_units
from tinylm.errors import InputError, first_line
from tinylm.host_copy import on_device
from tinylm.model import compiled_recurrent
from tinylm.model.base import Model
from tinylm.model.cache import KVCache, LayerCache
from tinylm.model.compiled import CompiledStep, is_compiled, is_supported, is_worthwhile, load_code
from tinylm.model.full_pass import FullPassDecoder
from tinylm.model.functions import at_least_float32, attention_without_cudnn
from tinylm.model.graphs import CUDAGraphs, GraphBackend, GraphedSteps
from tinylm.model.hooks import has_functions
from tinylm.model.layers import Attention, Block, RMSNorm, shift_keys
from tinylm.model.packed import TransposedLinear, WeightKind, pack, round_to_bfloat16
from tinylm.model.recurrent import Recurrent
from tinylm.model.state import DecodingModel, DeviceSampler
from tinylm.model.transformer import Transformer
from tinylm.recipe.support import ANY, COMMON, Supports, unsupported_parts
from tinylm.reporting import Reporter

SUPPORTS: Supports = {
    **COMMON,
    "attention_window": ANY,
    "attention_pattern": lambda model: {*model.attention_pattern} <= {"local", "global"},
    "norm_position": ("pre", "post", "output", "both"),
    "feed_forward": ("gelu", "gelu_exact", "relu", "relu2", "swiglu", "geglu"),
    "qk_norm_joint": ANY,
    "shifted_key_heads": ANY,
    "rope_scaling": ANY,
    "rope_fraction": ANY,
    "rope_theta_local": ANY,
    "rope_pattern": lambda model: {*model.rope_pattern} <= {"rope", "none"},
    "embedding_scale": ANY,
    "head_bias": ANY,
}
"""The values of `model:` keys that decoding with a KV cache supports. A `FullPassDecoder` decodes all other networks."""
TensorFunction = Callable[[Tensor], Tensor]
_MAX_NUMBA_PROMPT = 32
"""Maximum prompt length, in tokens, for prefill in numba-compiled code. PyTorch is faster for longer prompts."""
_MIN_GRAPH_STEPS = 32
"""Minimum number of steps for which CUDA graphs are used by default. Capturing a graph takes about as long as four steps."""


def make_decoder(
    network: nn.Module, *, weights: WeightKind | None, compiled: bool | None, steps: int | None, reporter: Reporter
) -> DecodingModel[Any]:
    """Make a decoder for about `steps` steps (None: unlimited).

    `weights=None` means bf16 for a transformer on a GPU with bf16 units. For a transformer on a CPU that the compiled step supports
    and that has no functions at its hook points, it rounds the weights to bf16 and computes in float32, even if the step is not
    compiled. Otherwise, it means fp32.
    `compiled=None` compiles the step on a CPU, or captures it in CUDA graphs on a GPU, if that saves time.

    Reports a note if decoding with a KV cache does not support a part of the network. Raises `InputError` if the network cannot
    generate text, or if it does not support `weights` or `compiled`. On a transformer, both options also require that no functions
    are attached to hook points.
    """
    if weights is None:
        weights = _default_weights(network)
        if weights != "fp32":
            reporter.note(f"decoding with {weights} weights, the default on this GPU (--weights fp32 uses fp32 instead)")
        elif isinstance(network, Transformer) and is_supported(network) and not has_functions(network):
            network = round_to_bfloat16(network)
    if isinstance(network, Recurrent) and weights == "fp32":
        if compiled is None:
            compiled = compiled_recurrent.is_worthwhile(network, steps) and not has_functions(network)
        return compiled_recurrent.CompiledRecurrent(network) if compiled else network
    if isinstance(network, Model):
        check_generates_text(network)
    if not isinstance(network, Transformer):
        if weights != "fp32":
            raise InputError(f"{weights} is not supported by this architecture", where="--weights", hint="use fp32")
        if compiled:
            raise InputError("this architecture is not supported by compiled decoding", where="--compile", hint="remove the option")
        return as_decoder(network)
    if parts := unsupported_parts(network.model, SUPPORTS):
        reporter.note(f"decoding with a KV cache does not support {', '.join(parts)}; each token takes a full forward pass")
    if weights == "int8" and network.device.type == "cuda":
        hint = "use bf16 (tinylm has no int8 kernel for GPUs, so it would also keep a bf16 copy)"
        raise InputError(
            "int8 weights take more memory than bf16 weights on a GPU, and are no faster", where="--weights", hint=hint
        )
    if compiled is None:
        worthwhile = is_worthwhile(network, steps)
        if network.device.type == "cuda":
            worthwhile = (steps is None or steps >= _MIN_GRAPH_STEPS) and not parts
        compiled = worthwhile and not has_functions(network)
    if compiled and network.embedding.weight.device.type == "cpu":
        load_code(reporter.note)
    return _transformer_decoder(network, weights, compiled)


def should_compile_for_later(decoder: DecodingModel[Any], steps: int | None) -> bool:
    """Whether `make_decoder` did not compile a step for `steps` steps, but would use it if it had been compiled before."""
    if not isinstance(decoder, Decoder) or decoder.uses_numba or is_compiled():
        return False
    return is_worthwhile(decoder.network, steps, once_compiled=True)


def _default_weights(network: nn.Module) -> WeightKind:
    if not isinstance(network, Transformer) or network.device.type != "cuda" or has_functions(network):
        return "fp32"
    return "bf16" if has_bf16_units(network.device) else "fp32"


def check_generates_text(network: Model) -> None:
    """Raise `InputError` if a network cannot generate text from left to right."""
    if network.objective is not None:
        name = network.objective.name
        raise InputError(f"a model trained with the {name} objective cannot generate text", hint="use `tinylm classify`")
    if not network.is_causal:
        raise InputError(f"a model with the {network.architecture} architecture cannot generate text", hint="use `tinylm fill`")


def as_decoder(model: nn.Module | DecodingModel[Any]) -> DecodingModel[Any]:
    """Return the model itself if it is a `DecodingModel`, otherwise a `Decoder` or a `FullPassDecoder` for it.

    A transformer is decoded by a `Decoder`, unless `SUPPORTS` does not list one of its parts or its hook points have functions.
    Raises `InputError` if the model cannot generate text.
    """
    if isinstance(model, Model):
        check_generates_text(model)
    if isinstance(model, DecodingModel):
        return model
    if isinstance(model, Transformer):
        return _transformer_decoder(model, "fp32", compiled=False)
    if isinstance(model, Model):
        return FullPassDecoder(model)
    raise InputError(f"a model of class {type(model).__name__} cannot generate text")


def _transformer_decoder(network: Transformer, weights: WeightKind, compiled: bool) -> Decoder | FullPassDecoder:
    """Return a `FullPassDecoder` if functions are attached or the PyTorch step does not support the network, else a `Decoder`.

    Raises `InputError` if `Decoder` does, or if functions are attached and `weights` or `compiled` would bypass them.
    """
    hooked = has_functions(network)
    if hooked and (compiled or weights != "fp32"):
        raise InputError("functions at hook points require uncompiled decoding with fp32 weights")
    uses_torch = not compiled or network.device.type != "cpu"
    if uses_torch and (hooked or unsupported_parts(network.model, SUPPORTS)):
        return FullPassDecoder(network if hooked else pack(network, weights))  # a packed copy has no functions attached
    return Decoder(network, weights=weights, compiled=compiled)


class Decoder:
    """The `DecodingModel` for transformers: prefills prompts into rows of a KV cache and continues them token by token.

    `compiled`: compile the step with `backend`. With "numba" (the default on a CPU), a row's logits are bit-identical in every run
    and do not depend on the other rows. "graphs" (the default on CUDA) captures the step and the choice of tokens in CUDA graphs,
    or with `graphs` if it is not None. If that fails, it warns and continues without graphs. "torch" (the default on other devices)
    uses `torch.compile` with static shapes; the first step then takes tens of seconds. Raises `InputError` if the numba backend
    does not support the network.

    Raises `ValueError` if functions are attached to the network's hook points, because a step would not call them, or if the
    network has a part that `SUPPORTS` does not list. `make_decoder` and `as_decoder` return a `FullPassDecoder` in these cases.
    """

    def __init__(
        self,
        network: Transformer,
        *,
        weights: WeightKind = "fp32",
        compiled: bool = False,
        backend: Literal["numba", "torch", "graphs"] | None = None,
        graphs: GraphBackend | None = None,
    ) -> None:
        if backend is None:
            defaults: dict[str, Literal["numba", "graphs"]] = {"cpu": "numba", "cuda": "graphs"}
            backend = defaults.get(network.device.type, "torch")
        self._numba_step: CompiledStep | None = None
        if has_functions(network):
            raise ValueError("decoding with a KV cache does not call functions at hook points; use make_decoder")
        self._static_shapes = compiled and backend == "torch"
        self._graphs: GraphBackend | None = None
        if compiled and backend == "graphs":
            self._graphs = graphs or CUDAGraphs(network.device)
        self.samples_on_device = self._captures_sampling = self._graphs is not None
        self._graphed_steps: WeakKeyDictionary[KVCache, GraphedSteps] = WeakKeyDictionary()
        self.model, self.vocab_size = network.model, network.vocab_size
        if compiled and backend == "numba":
            self.network = pack(network, None if weights == "fp32" else weights)  # only prefills long prompts
            self._numba_step = CompiledStep(self.network)
        else:
            if parts := unsupported_parts(network.model, SUPPORTS):
                raise ValueError(f"decoding with a KV cache does not support {', '.join(parts)}; use make_decoder")
            self.network = pack(network, weights)
            self._prepare_layers()
        self.uses_numba = self._numba_step is not None

    def _prepare_layers(self) -> None:
        """Look up the modules and tables that the PyTorch step needs."""
        network = self.network
        self._layers = [_DecoderLayer(cast(Block, block)) for block in network.blocks]
        self._embedding_norm = _norm_function(network.embedding_norm)
        self._final_norm = _norm_function(network.final_norm)
        self._head = _linear_function(network.head)
        self._decode_one_token = self.decode_one_token
        if self._static_shapes:
            self._decode_one_token = torch.compile(self.decode_one_token, dynamic=False, fullgraph=True)
        self._prepare_rotations()
        if network.ngrams is not None:
            self._ngram_offsets = torch.arange(max(network.ngrams.orders), device=self.device).flip(0)

    def _prepare_rotations(self) -> None:
        if self.model.position == "rope":
            self._rotations = self._rotation_table("rope")
            self._local_rotations = None if self.model.rope_theta_local is None else self._rotation_table("local_rope")

    def _rotation_table(self, name: str) -> Tensor:
        """Return a table's cosines and sines, repeated for both halves of a head: (positions, 2, 1, D)."""
        cosines, sines = self.network.get_buffer(f"{name}_cosines"), self.network.get_buffer(f"{name}_sines")
        tables = torch.stack((torch.cat((cosines, cosines), -1), torch.cat((-sines, sines), -1)), 1)
        return tables[:, :, None]

    @property
    def device(self) -> torch.device:
        return self.network.embedding.weight.device

    @property
    def capacity(self) -> int:
        return self.model.context_length

    def __call__(self, tokens: Tensor) -> Tensor:
        """Ids (B, T) -> logits (B, T, V), without a cache or compiled code."""
        with attention_without_cudnn(self.device):
            return at_least_float32(self.network(tokens))

    def new_state(self, rows: int, max_tokens: int | None = None) -> KVCache:
        """Create a cache for `rows` sequences of up to `max_tokens` tokens. Default and maximum: the model's context length."""
        capacity = min(max_tokens or self.capacity, self.capacity)
        if self.network.reserve_positions(capacity):
            if self._numba_step is not None:
                self._numba_step.update_position_tables()
            else:
                self._prepare_rotations()
                self._graphed_steps.clear()  # the graphs read the previous tables
        return KVCache(self.model, rows, capacity, device=self.device, dtype=self.network.embedding.weight.dtype)

    @torch.inference_mode()
    def prefill(self, state: KVCache, row: int, ids: Sequence[int] | Tensor) -> Tensor:
        """Overwrite a cache row with a prompt. Return the next-token logits (V,)."""
        tokens = torch.as_tensor(ids, device=self.device, dtype=torch.long)[None]  # (1, T)
        if self._numba_step is not None and tokens.shape[1] <= _MAX_NUMBA_PROMPT:
            logits = self._numba_step.prefill(state, row, tokens[0])
            state.lengths[row] = tokens.shape[1]
            return logits
        with attention_without_cudnn(self.device):
            hidden = self.network.hidden(tokens, state.row_slice(row, row + 1), n_last=1)  # (1, 1, C)
        return at_least_float32(self.network.logits(hidden[0])[0])

    def step(self, state: KVCache, tokens: Tensor) -> Tensor:
        """Append `tokens` (B,), one id per active row. Return the next-token logits (B, V). No row may be at capacity.

        Call this method in inference mode. Entering inference mode in each step would take 1% of a small model's step time.
        """
        if self._numba_step is not None:
            logits = self._numba_step(state, tokens)
        else:
            with attention_without_cudnn(self.device):
                logits = self._torch_step(state, tokens)
        state.lengths[:] = [length + 1 for length in state.lengths]
        return logits

    def sample_and_step(self, state: KVCache, logits: Tensor, sampler: DeviceSampler, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Implement `SamplesOnDevice`."""
        chosen = self._sample(state, logits, sampler, uniforms)
        return chosen, self.step(state, chosen.clamp_min(0))

    def _sample(self, state: KVCache, logits: Tensor, sampler: DeviceSampler, uniforms: Tensor) -> Tensor:
        if self._graphs is not None and self._captures_sampling:
            try:
                return self._steps(state, self._graphs).sample(logits, sampler, uniforms)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._captures_sampling = False
                problem = "choosing tokens without CUDA graphs, because sampling cannot be captured"
                warnings.warn(f"{problem} ({first_line(error)})", stacklevel=2)
        return sampler(logits, on_device(uniforms, logits.device))

    def _steps(self, state: KVCache, graphs: GraphBackend) -> GraphedSteps:
        if state not in self._graphed_steps:
            self._graphed_steps[state] = GraphedSteps(self.decode_one_token, state, self.vocab_size, graphs)
        return self._graphed_steps[state]

    def _torch_step(self, state: KVCache, tokens: Tensor) -> Tensor:
        lengths = state.lengths
        if self._graphs is not None:
            try:
                return self._steps(state, self._graphs)(tokens, lengths)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # some operations cannot be captured; if the step itself is wrong, it fails again below
                self._graphs = None
                self._graphed_steps.clear()
                problem = "decoding without CUDA graphs, because a step cannot be captured"
                warnings.warn(f"{problem} ({first_line(error)})", stacklevel=2)
        if self._static_shapes:  # also decodes inactive rows, which write to position 0; the next prompt overwrites it
            inactive = len(state.tokens) - len(lengths)
            positions = torch.tensor(lengths + [0] * inactive, device=self.device)
            padded = F.pad(tokens, (0, inactive))
            logits = self._decode_one_token(state.full_layers, state.tokens, padded, positions, state.capacity, False)
            logits = logits[: len(lengths)]
        else:
            longest = max(lengths) + 1
            positions = torch.tensor(lengths, device=self.device)
            logits = self._decode_one_token(state.layers, state.tokens, tokens, positions, longest, min(lengths) + 1 == longest)
        return logits

    def decode_one_token(
        self,
        layers: list[LayerCache],
        cached_tokens: Tensor,
        tokens: Tensor,
        positions: Tensor,
        kv_length: int,
        same_length: bool,
    ) -> Tensor:
        """Run one step on tensors, so that it can be compiled and captured in a CUDA graph. Return logits (B, V), at least float32.

        Writes `tokens[b]` at position `positions[b]` in cache row b. Queries attend to the first `kv_length` positions.
        `same_length`: all rows are at position `kv_length - 1`, so no mask is needed.
        """
        B, capacity = tokens.shape[0], cached_tokens.shape[1]
        # Index of each row's new position in the flattened cache, (B,).
        slots = positions + torch.arange(0, B * capacity, capacity, device=positions.device) if B > 1 else positions
        mask = window_mask = None
        if not same_length:
            masked = torch.arange(kv_length, device=positions.device) > positions[:, None]  # (B, S)
            mask = _additive_mask(masked, layers[0].keys.dtype)
        if self.model.attention_window is not None:
            distances = positions[:, None] - torch.arange(kv_length, device=positions.device)  # (B, S)
            masked = (distances < 0) | (distances >= self.model.attention_window)
            window_mask = _additive_mask(masked, layers[0].keys.dtype)
        x = self._embed(tokens, positions, cached_tokens, slots)  # (B, C)
        rotation = self._rotations.index_select(0, positions).unbind(1) if self.model.position == "rope" else None
        local_rotation = rotation
        if self.model.rope_theta_local is not None and self._local_rotations is not None:
            local_rotation = self._local_rotations.index_select(0, positions).unbind(1)
        context = _StepContext(tokens, x, rotation, local_rotation, slots, kv_length, mask, window_mask)
        first_values = None
        for layer, layer_cache in zip(self._layers, layers, strict=True):
            x, values = layer(x, context, layer_cache, first_values)
            if first_values is None and self.model.value_residual:
                first_values = values
        logits = at_least_float32(self._head(self._final_norm(x)))
        cap = self.model.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _embed(self, tokens: Tensor, positions: Tensor, cached_tokens: Tensor, slots: Tensor) -> Tensor:
        """Ids (B,) -> (B, C), the input of the first block. With n-gram embeddings, also writes the ids to the cache."""
        network = self.network
        x = F.embedding(tokens, network.embedding.weight)
        if self.model.embedding_scale != 1:
            x = x * self.model.embedding_scale
        if network.ngrams is not None:
            cached_tokens.view(-1).index_copy_(0, slots, tokens)
            back = positions[:, None] - self._ngram_offsets  # (B, longest n-gram)
            window = cached_tokens[: len(tokens)].gather(1, back.clamp_min(0)).masked_fill_(back < 0, network.ngrams.pad_id)
            x = x + network.ngrams(window)[:, -1]
        if network.positions is not None:
            x = x + F.embedding(positions, network.positions.weight)
        elif self.model.position == "sinusoidal":
            x = x + F.embedding(positions, network.get_buffer("sinusoids"))
        return self._embedding_norm(x)


class _StepContext(NamedTuple):
    """Inputs that all layers share in a step."""

    tokens: Tensor  # (B,)
    embedded: Tensor  # (B, C), the input of the first layer
    rotation: tuple[Tensor, ...] | None  # cosines and sines, (B, 1, D)
    local_rotation: tuple[Tensor, ...] | None  # replaces `rotation` in local blocks
    slots: Tensor  # (B,), where to write keys and values in the flattened cache
    kv_length: int
    mask: Tensor | None  # (B, 1, 1, S), added to the scores
    window_mask: Tensor | None  # replaces `mask` in blocks with an attention window


class _DecoderLayer:
    """Runs a block for one new position per row. Parameters and settings are looked up once, in the constructor."""

    def __init__(self, block: Block) -> None:
        attention: Attention = block.attention
        self._post, self._parallel = block.post, block.parallel
        self._norms_outputs = block.norm_position in ("output", "both")
        self._attention_norm = _norm_function(block.attention_norm)
        self._feed_forward_norm = None if block.feed_forward_norm is None else _norm_function(block.feed_forward_norm)
        output_norms = (block.attention_output_norm, block.feed_forward_output_norm)
        if block.norm_position == "output":
            output_norms = (block.attention_norm, block.feed_forward_norm)
            self._attention_norm = self._feed_forward_norm = _norm_function(None)
        self._attention_output_norm, self._feed_forward_output_norm = (_norm_function(norm) for norm in output_norms)
        self._qkv = _linear_function(attention.qkv)
        self._attention_output = _linear_add_function(attention.output)
        self._feed_forward_input = _linear_function(block.feed_forward.input)
        self._feed_forward_output = _linear_add_function(block.feed_forward.output)
        self._activation = block.feed_forward.kind
        self._residual_mix = None if block.residual_mix is None else block.residual_mix.detach().unbind()
        self._value_embedding = block.value_embedding
        self._value_share = attention.value_share
        self._heads, self._kv_heads, self._head_width = attention.heads, attention.kv_heads, attention.head_width
        self._windowed, self._shifted_heads = attention.window is not None, attention.shifted_heads
        self._uses_rope, self._is_local = block.uses_rope, block.is_local
        self._norms_all_heads = attention.norms_all_heads
        self._qk_heads = attention.heads + attention.kv_heads
        self._qk_norm_eps = attention.qk_norm_eps
        self._qk_gains = None
        if attention.query_gain is not None and attention.key_gain is not None:
            heads = ((attention.query_gain, self._heads), (attention.key_gain, self._kv_heads))
            gains = (gain.view(-1, self._head_width).expand(count, -1) for gain, count in heads)
            self._qk_gains = torch.cat(tuple(gains)).detach()  # (H + K, D)

    def __call__(self, x: Tensor, context: _StepContext, cache: LayerCache, first_values: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, C) -> block output (B, C) and values (B, K, D). Writes keys and values to the cache."""
        if self._residual_mix is not None:
            x = self._residual_mix[0] * x + self._residual_mix[1] * context.embedded
        B = x.shape[0]
        qkv = self._qkv(x if self._post else self._attention_norm(x)).view(B, -1, self._head_width)  # (B, H + 2 K, D)
        rotation = context.local_rotation if self._is_local else context.rotation
        q, k, v = self._norm_and_rotate(qkv, rotation if self._uses_rope else None)  # (B, H, D), (B, K, D), (B, K, D)
        if self._value_embedding is not None:
            v = v + self._value_embedding(context.tokens).view(B, self._kv_heads, self._head_width)
        if self._value_share is not None and first_values is not None:
            v = torch.lerp(first_values, v, self._value_share)
        cache.flat_keys.index_copy_(0, context.slots, k)
        cache.flat_values.index_copy_(0, context.slots, v)
        keys = cache.keys.narrow(2, 0, context.kv_length)  # (B, K, S, D)
        attended = F.scaled_dot_product_attention(
            q.reshape(B, self._kv_heads, -1, self._head_width),  # (B, K, G, D): a group's queries lie along the time axis
            shift_keys(keys, self._shifted_heads) if self._shifted_heads else keys,
            cache.values.narrow(2, 0, context.kv_length),
            attn_mask=context.window_mask if self._windowed else context.mask,
        ).view(B, -1)  # (B, H D)
        if self._feed_forward_norm is None:  # post and parallel
            return self._attention_norm(self._feed_forward(x, self._attention_output(attended, x))), v
        if self._post:
            x = self._attention_norm(self._attention_output(attended, x))
            return self._feed_forward_norm(self._feed_forward(x, x)), v
        if self._norms_outputs:
            x = x + self._attention_output_norm(self._attention_output(attended, torch.zeros_like(x)))
            hidden = self._feed_forward(self._feed_forward_norm(x), torch.zeros_like(x))
            return x + self._feed_forward_output_norm(hidden), v
        residual = self._attention_output(attended, x)
        return self._feed_forward(self._feed_forward_norm(x if self._parallel else residual), residual), v

    def _norm_and_rotate(self, qkv: Tensor, rotation: tuple[Tensor, ...] | None) -> Sequence[Tensor]:
        """Split `qkv` into queries (B, H, D), keys and values (B, K, D). Normalize and rotate queries and keys."""
        if self._qk_norm_eps is None and rotation is None:
            return qkv.split_with_sizes([self._heads, self._kv_heads, self._kv_heads], 1)
        qk = qkv.narrow(1, 0, self._qk_heads)
        if self._qk_norm_eps is not None:
            qk = self._norm_heads(qk, self._qk_norm_eps)
            if self._qk_gains is not None:
                qk.mul_(self._qk_gains)
        if rotation is not None:
            cosines, sines = rotation  # (B, 1, D), from `_rotation_table`: both halves are equal, but the first sines are negated
            qk = torch.addcmul(qk * cosines, qk.roll(self._head_width // 2, -1), sines)
        return (
            qk.narrow(1, 0, self._heads),
            qk.narrow(1, self._heads, self._kv_heads),
            qkv.narrow(1, self._qk_heads, self._kv_heads),
        )

    def _norm_heads(self, qk: Tensor, eps: float) -> Tensor:
        """Normalize each head of `qk` (B, H + K, D), or all query heads and all key heads together."""
        if not self._norms_all_heads:
            return _rms_norm(qk, eps)
        parts = qk.split_with_sizes([self._heads, self._kv_heads], 1)
        return torch.cat([_rms_norm(part.flatten(1), eps).view(part.shape) for part in parts], dim=1)

    def _feed_forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + feed_forward(x), both (B, C)."""
        hidden = self._feed_forward_input(x)
        if self._activation in ("gelu", "gelu_exact"):
            hidden = F.gelu(hidden, approximate="tanh" if self._activation == "gelu" else "none")
        elif self._activation == "relu":
            hidden = hidden.relu_()
        elif self._activation == "relu2":
            hidden = hidden.relu_().square_()
        else:
            gate, values = hidden.chunk(2, -1)
            hidden = (F.silu(gate) if self._activation == "swiglu" else F.gelu(gate, approximate="tanh")).mul_(values)
        return self._feed_forward_output(hidden, residual)


def _additive_mask(masked: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask (B, S) -> (B, 1, 1, S): minus infinity where `masked` is True, so that a query cannot attend there, and 0 elsewhere."""
    mask = torch.zeros(masked.shape, device=masked.device, dtype=dtype)
    return mask.masked_fill_(masked, float("-inf"))[:, None, None]


def _linear_function(layer: nn.Module) -> TensorFunction:
    """Return a linear layer as a plain function. Looking up a module's parameters takes as long as a small matrix product."""
    if not isinstance(layer, TransposedLinear):
        forward: TensorFunction = layer.forward
        return forward
    weight, bias = layer.weight.detach(), layer.bias
    if bias is None:
        return lambda x: torch.mm(x, weight)
    detached_bias = bias.detach()
    return lambda x: torch.addmm(detached_bias, x, weight)


def _linear_add_function(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a linear layer with a residual addition as a plain function: (x, residual) -> residual + layer(x)."""
    if isinstance(layer, TransposedLinear) and layer.bias is None:
        weight = layer.weight.detach()
        return lambda x, residual: torch.addmm(residual, x, weight)
    linear = _linear_function(layer)
    return lambda x, residual: linear(x).add_(residual)


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps). `F.rms_norm` is three times slower for one row."""
    if x.itemsize < 4:
        return F.rms_norm(x, x.shape[-1:], eps=eps)  # computes in float32
    l2_norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    normed: Tensor = x * l2_norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return normed


def _norm_function(norm: nn.Module | None) -> TensorFunction:
    """Return a norm as a plain function, or the identity for None."""
    if norm is None:
        return lambda x: x
    if isinstance(norm, RMSNorm):
        eps, gain = norm.eps, norm.weight
        if gain is None:
            return lambda x: _rms_norm(x, eps)
        detached_gain = gain.detach()
        return lambda x: _rms_norm(x, eps).mul_(detached_gain)
    assert isinstance(norm, nn.LayerNorm)
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
