"""A tinylm model for Hugging Face transformers.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

This requires only torch and transformers (4.57.1 or newer). It supports `generate` with a dynamic or static KV cache, padding on
either side, and beam search. Tensors have the same names as in tinylm.

Legend: B batch, T new positions, S all positions so far, C width, H query heads, K key/value heads, D head width, V vocabulary.
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name of the KV cache in outputs. transformers 5.24 renamed it from `past_key_values`."""
LOSS_ARGUMENTS = {"num_items_in_batch", "ignore_index", "shift_labels"}
"""Arguments of `forward` that are passed on to the loss function."""
IGNORED_ARGUMENTS = {"cache_position", "is_first_iteration"}
"""Arguments that some versions of `generate` pass to `forward`. They do not affect this model."""


DEFAULTS = {
    "vocab_size": 257,
    "context_length": 256,
    "n_layer": 6,
    "n_head": 6,
    "n_kv_head": 6,
    "head_dim": 64,
    "n_embd": 384,
    "n_inner": 1536,
    "norm": "rmsnorm",
    "norm_position": "pre",
    "norm_eps": 1e-6,
    "norm_gain": True,
    "position": "rope",
    "rotary_base": 10000.0,
    "rotary_base_local": None,
    "rotary_fraction": 1.0,
    "rotary_pattern": ["rope"],
    "rotary_scaling": None,
    "feed_forward": "relu2",
    "bias": False,
    "head_bias": False,
    "qk_norm": True,
    "qk_norm_joint": False,
    "shifted_key_heads": 0,
    "qk_gain": True,
    "embedding_norm": True,
    "embedding_scale": 1.0,
    "ngram_embeddings": [],
    "ngram_rows": 16384,
    "ngram_width": 32,
    "ngram_pad_id": None,
    "value_embeddings": 0,
    "value_residual": False,
    "embedding_shortcut": False,
    "parallel_residual": False,
    "attention_softcap": None,
    "logit_softcap": None,
    "attention_window": None,
    "attention_pattern": ["local"],
    "use_cache": True,
}
"""The keys of `TinylmConfig` and their default values."""


class TinylmConfig(PretrainedConfig):
    """The vocabulary size and the `model:` section of a tinylm recipe. Most keys have the same names as in the recipe."""

    model_type = "tinylm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  the name that transformers expects
    attribute_map = {  # noqa: RUF012  the names that transformers expects
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "context_length",
        "intermediate_size": "n_inner",
    }

    def __init__(self, tie_word_embeddings=False, **kwargs):
        for name, default in DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, copy.copy(default)))
        # The n-gram hash depends on this id, so the id must not change when the embeddings are resized.
        self.ngram_pad_id = self.vocab_size if self.ngram_pad_id is None else self.ngram_pad_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def rms_norm(x, gain, eps):
    x_float = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = x * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps).to(x.dtype)
    return normed if gain is None else normed * gain


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.n_embd)) if config.norm_gain else None

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def make_norm(config):
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, eps=config.norm_eps, elementwise_affine=config.norm_gain, bias=config.bias)
    return RMSNorm(config)


def rotary_frequencies(config, base, scaling):
    """Return the frequency of each pair of dimensions, float64 (D/2,), and the factor for the cosines and sines."""
    half = config.head_dim // 2
    width = 2 * int(half * config.rotary_fraction)
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    frequencies, factor = scale_frequencies(frequencies, base, scaling)
    return F.pad(frequencies, (0, half - width // 2)), factor


def scale_frequencies(frequencies, base, scaling):
    """Scale rotary frequencies for a longer context with the linear, llama3 or yarn (Peng et al. 2023) method."""
    if scaling is None:
        return frequencies, 1.0
    slow = frequencies / scaling["factor"]
    if scaling["type"] == "linear":
        return slow, 1.0
    rotations = scaling["original_context"] * frequencies / (2 * math.pi)  # number of full turns in the original context
    if scaling["type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        share = ((rotations - low) / (high - low)).clamp(0, 1)
        return torch.lerp(slow, frequencies, share), 1.0
    pairs = len(frequencies)
    bounds = []
    for turns in (scaling["beta_fast"], scaling["beta_slow"]):
        bounds.append(pairs * math.log(scaling["original_context"] / (turns * 2 * math.pi)) / math.log(base))
    if scaling["truncate"]:
        bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
    low, high = max(bounds[0], 0), min(bounds[1], 2 * pairs - 1)
    ramp = ((torch.arange(pairs, dtype=torch.float64) - low) / (high - low or 0.001)).clamp(0, 1)
    default = 0.1 * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0
    return torch.lerp(frequencies, slow, ramp), scaling["attention_factor"] or default


def rotate(x, cosines, sines):
    """Apply rotary embeddings (Su et al. 2021): rotate the pairs (x[i], x[i + D/2]) in x (B, heads, T, D)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


class Inputs(NamedTuple):
    """Inputs that are the same for all blocks in a forward pass."""

    tokens: torch.Tensor | None  # (B, T)
    embedded: torch.Tensor  # (B, T, C), the input to the first block
    attention_mask: torch.Tensor  # (B, S), 0 at padding
    masks: dict  # for global and local blocks, (B, 1, T, S): True where a query can attend to a key
    rotations: dict  # for global and local blocks, the cosines and sines, (B, 1, T, D/2)
    cache: object
    cache_position: torch.Tensor  # (T,), positions in the cache
    return_attention: bool


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.rows = [config.n_head * config.head_dim, config.n_kv_head * config.head_dim, config.n_kv_head * config.head_dim]
        self.qkv = nn.Linear(config.n_embd, sum(self.rows), bias=config.bias)
        self.output = nn.Linear(self.rows[0], config.n_embd, bias=config.bias)
        gains = config.qk_norm and config.qk_gain
        self.whole_layer = config.qk_norm_joint
        widths = self.rows if self.whole_layer else [config.head_dim] * 2
        self.query_gain = nn.Parameter(torch.ones(widths[0])) if gains else None
        self.key_gain = nn.Parameter(torch.ones(widths[1])) if gains else None
        self.value_share = nn.Parameter(torch.tensor([0.5])) if config.value_residual and layer > 0 else None
        self.kind = config.attention_pattern[layer % len(config.attention_pattern)]
        self.rotary = config.position == "rope" and config.rotary_pattern[layer % len(config.rotary_pattern)] == "rope"

    def forward(self, x, inputs, added_values, first_values):
        """Map x (B, T, C) to (B, T, C). Also return the new values (B, K, T, D) and, on request, the attention pattern."""
        config, (B, T, _) = self.config, x.shape
        q, k, v = self.qkv(x).split(self.rows, dim=-1)
        if config.qk_norm and self.whole_layer:
            q, k = rms_norm(q, self.query_gain, config.norm_eps), rms_norm(k, self.key_gain, config.norm_eps)
        q, k, v = (part.view(B, T, -1, config.head_dim).transpose(1, 2) for part in (q, k, v))
        if config.qk_norm and not self.whole_layer:
            q, k = rms_norm(q, self.query_gain, config.norm_eps), rms_norm(k, self.key_gain, config.norm_eps)
        if self.rotary:
            q, k = rotate(q, *inputs.rotations[self.kind]), rotate(k, *inputs.rotations[self.kind])
        if added_values is not None:
            v = v + added_values.view(B, T, -1, config.head_dim).transpose(1, 2)
        if self.value_share is not None:
            v = torch.lerp(first_values, v, self.value_share)
        values = v
        if inputs.cache is not None:
            k, v = inputs.cache.update(k, v, self.layer, {"cache_position": inputs.cache_position})
        if config.shifted_key_heads:
            k = shift_keys(k, config.shifted_key_heads, inputs.attention_mask)
        mask = inputs.masks[self.kind]
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[3]))  # mask out the unused positions in a static cache
        groups = config.n_head // config.n_kv_head
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, D)
        pattern = None
        if inputs.return_attention or config.attention_softcap is not None:
            pattern = attention_pattern(q, k, mask, config.attention_softcap)  # (B, H, T, S)
            attended = pattern @ v  # (B, H, T, D)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, D)
        return self.output(attended.transpose(1, 2).reshape(B, T, -1)), values, pattern


def shift_keys(k, heads, attention_mask):
    """Move the keys (B, K, S, D) of the first `heads` heads to the next position. Keys of padding become zeros."""
    present = F.pad(attention_mask, (0, k.shape[2] - attention_mask.shape[1]))[:, None, :-1, None]
    return torch.cat((F.pad(k[:, :heads, :-1] * present, (0, 0, 1, 0)), k[:, heads:]), dim=1)


def attention_pattern(q, k, mask, cap):
    """Return the attention weights softmax(q k' / sqrt(D)), (B, H, T, S), with optional soft-capping of the scores."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(q.dtype)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind = config.feed_forward
        self.gated = self.kind in ("swiglu", "geglu")
        self.input = nn.Linear(config.n_embd, config.n_inner * (2 if self.gated else 1), bias=config.bias)
        self.output = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.input(x)
        if self.gated:
            gate, values = x.chunk(2, dim=-1)
            x = (F.silu(gate) if self.kind == "swiglu" else F.gelu(gate, approximate="tanh")) * values
        elif self.kind in ("relu", "relu2"):
            x = F.relu(x) if self.kind == "relu" else F.relu(x).square()
        else:
            x = F.gelu(x, approximate="tanh" if self.kind == "gelu" else "none")
        return self.output(x)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm_position, self.parallel = config.norm_position, config.parallel_residual
        self.residual_mix = nn.Parameter(torch.tensor([1.0, 0.0])) if config.embedding_shortcut else None
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.attention_output_norm = make_norm(config) if self.norm_position == "both" else None
        is_outer = layer < config.value_embeddings or layer >= config.n_layer - config.value_embeddings
        self.value_embedding = nn.Embedding(config.vocab_size, config.n_kv_head * config.head_dim) if is_outer else None
        self.feed_forward_norm = None if self.norm_position == "post" and self.parallel else make_norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_output_norm = make_norm(config) if self.norm_position == "both" else None

    def forward(self, x, inputs, first_values):
        """Map x (B, T, C) to (B, T, C). Also return the values and the pattern from the attention layer."""
        if self.residual_mix is not None:
            x = self.residual_mix[0] * x + self.residual_mix[1] * inputs.embedded
        added_values = None if self.value_embedding is None else self.value_embedding(inputs.tokens)
        normed = self.attention_norm(x) if self.norm_position in ("pre", "both") else x
        attended, values, pattern = self.attention(normed, inputs, added_values, first_values)
        return self.add(x, attended), values, pattern

    def add(self, x, attended):
        """Add the outputs of the attention layer and the feed-forward layer to x."""
        if self.norm_position == "post":
            if self.parallel:
                return self.attention_norm(x + attended + self.feed_forward(x))
            x = self.attention_norm(x + attended)
            return self.feed_forward_norm(x + self.feed_forward(x))
        if self.norm_position == "output":
            x = x + self.attention_norm(attended)
            return x + self.feed_forward_norm(self.feed_forward(x))
        if self.norm_position == "both":
            x = x + self.attention_output_norm(attended)
            return x + self.feed_forward_output_norm(self.feed_forward(self.feed_forward_norm(x)))
        if self.parallel:
            return x + attended + self.feed_forward(self.feed_forward_norm(x))
        x = x + attended
        return x + self.feed_forward(self.feed_forward_norm(x))


class NgramEmbedding(nn.Module):
    """Embeddings of n-grams. For each order n, a hash of the last n ids selects a row in a table."""

    def __init__(self, config):
        super().__init__()
        self.orders, self.rows, self.pad_id = config.ngram_embeddings, config.ngram_rows, config.ngram_pad_id
        self.table = nn.Embedding(len(self.orders) * self.rows, config.ngram_width)
        self.projection = nn.Linear(len(self.orders) * config.ngram_width, config.n_embd, bias=False)

    def forward(self, tokens):
        """Map ids (B, S), with `pad_id` at padding positions, to embeddings (B, S, C)."""
        indices = torch.stack([self.row_indices(tokens, order) + i * self.rows for i, order in enumerate(self.orders)], dim=-1)
        return self.projection(self.table(indices).flatten(-2))

    def row_indices(self, tokens, order):
        padded = F.pad(tokens, (order - 1, 0), value=self.pad_id)
        key = torch.full_like(tokens, order)
        for offset in range(order):
            key = (key + padded[:, offset : offset + tokens.shape[1]] + 1) * 0x5851F42D4C957F2D  # Knuth's 64-bit multiplier
            key = key ^ (key >> 29)
        return key.remainder(self.rows)


class TinylmModel(PreTrainedModel):
    """The model without its output head, which maps token ids to hidden states."""

    config_class = TinylmConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"head\.weight"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.ngrams = NgramEmbedding(config) if config.ngram_embeddings else None
        self.positions = nn.Embedding(config.context_length, config.n_embd) if config.position == "learned" else None
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = None if config.norm_position == "post" else make_norm(config)
        self.gradient_checkpointing = False
        self._add_head(config)
        self.post_init()

    def _add_head(self, config):
        """Create additional modules. Subclasses override this."""

    def get_input_embeddings(self):
        return self.embedding

    def set_input_embeddings(self, value):
        self.embedding = value

    def _resize_token_embeddings(self, new_num_tokens, *args, **kwargs):
        """Resize every table that is indexed by token id. The n-gram tables are indexed by a hash and keep their size."""
        resized = super()._resize_token_embeddings(new_num_tokens, *args, **kwargs)
        for block in self.blocks:
            if block.value_embedding is not None:
                table = self._get_resized_embeddings(block.value_embedding, self.embedding.num_embeddings, None, False)
                block.value_embedding = table
        return resized

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        previous_ids=None,
        cache=None,
        **kwargs,
    ):
        """Map ids (B, T) or embeddings (B, T, C) to hidden states (B, T, C). With a cache, the ids follow those in the cache.

        `attention_mask` (B, S) is 0 at padding. `cache` and `past_key_values` are two names for the same argument. `previous_ids`
        (B, n - 1) contains the ids before `input_ids`, which n-gram embeddings require with a cache. `generate` passes them.
        """
        check_arguments(kwargs, IGNORED_ARGUMENTS)
        hidden, cache, states, patterns = self._hidden(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values if cache is None else cache,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            previous_ids,
        )
        output = BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE_NAME: cache}, hidden_states=states, attentions=patterns)
        return output.to_tuple() if not self._returns_dict(return_dict) else output

    def _returns_dict(self, return_dict):
        return getattr(self.config, "return_dict", True) if return_dict is None else return_dict

    def _hidden(
        self,
        input_ids,
        attention_mask,
        position_ids,
        cache,
        inputs_embeds,
        use_cache,
        output_attentions,
        output_hidden_states,
        previous_ids,
    ):
        """Return the final hidden states, the cache and, on request, the hidden states and attention patterns of all layers."""
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if input_ids is None and (config.ngram_embeddings or config.value_embeddings):
            raise ValueError("this model requires input_ids because it looks up more than one embedding for each token")
        if output_attentions is None:
            output_attentions = getattr(config, "output_attentions", False)
        if output_hidden_states is None:
            output_hidden_states = getattr(config, "output_hidden_states", False)
        recompute = self.gradient_checkpointing and self.training
        use_cache = (config.use_cache if use_cache is None else use_cache) and not recompute
        if not use_cache:
            cache = None
        elif cache is None:
            cache = DynamicCache()
        B, T = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        device = (input_ids if inputs_embeds is None else inputs_embeds).device
        past = int(cache.get_seq_length()) if cache is not None else 0
        if past + T > config.context_length:
            raise ValueError(f"{past + T} positions do not fit in the context length of {config.context_length}")
        if attention_mask is None:
            attention_mask = torch.ones((B, past + T), dtype=torch.long, device=device)
        if attention_mask.ndim != 2 or attention_mask.shape[1] != past + T:
            raise ValueError(f"attention_mask must have the shape ({B}, {past + T}), not {tuple(attention_mask.shape)}")
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, -T:]
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        x = self._embed(x, input_ids, attention_mask, position_ids, past, previous_ids)
        masks = {"global": self._mask(attention_mask, T), "local": self._mask(attention_mask, T, config.attention_window)}
        cache_position = torch.arange(past, past + T, device=device)
        rotations = self._rotations(position_ids, x.dtype)
        inputs = Inputs(input_ids, x, attention_mask, masks, rotations, cache, cache_position, bool(output_attentions))
        states, patterns, first_values = (x,), (), None
        for block in self.blocks:
            if recompute:
                x, values, pattern = checkpoint(block, x, inputs, first_values, use_reentrant=False)
            else:
                x, values, pattern = block(x, inputs, first_values)
            first_values = values if first_values is None else first_values
            states, patterns = (*states, x), (*patterns, pattern)
        if self.final_norm is not None:
            x = self.final_norm(x)
        states = (*states[:-1], x) if output_hidden_states else None
        return x, cache, states, patterns if output_attentions else None

    def _embed(self, x, tokens, attention_mask, positions, past, previous_ids):
        """Map token embeddings (B, T, C) to the input to the first block (B, T, C)."""
        config, T = self.config, x.shape[1]
        if config.embedding_scale != 1:
            x = x * config.embedding_scale
        if self.ngrams is not None:
            if previous_ids is None and past:
                raise ValueError("with a cache, n-gram embeddings require previous_ids, the ids before input_ids")
            ids = tokens.masked_fill(attention_mask[:, -T:] == 0, self.ngrams.pad_id)
            ids = ids if previous_ids is None else torch.cat((previous_ids, ids), dim=1)
            x = x + self.ngrams(ids)[:, -T:]
        if self.positions is not None:
            x = x + self.positions(positions)
        elif config.position == "sinusoidal":
            frequencies = 10000.0 ** (-torch.arange(0, config.n_embd, 2, device=x.device, dtype=torch.float64) / config.n_embd)
            angles = positions[..., None].double() * frequencies
            x = x + torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(x.dtype)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _rotations(self, positions, dtype):
        """Map positions (B, T) to the cosines and sines (B, 1, T, D/2) for global and local blocks."""
        config, tables = self.config, {}
        if config.position != "rope":
            return tables
        local_base = config.rotary_base_local
        for kind in ("global", "local"):
            is_local = kind == "local" and local_base is not None
            base, scaling = (local_base, None) if is_local else (config.rotary_base, config.rotary_scaling)
            frequencies, factor = rotary_frequencies(config, base, scaling)
            angles = positions[:, None, :, None].double() * frequencies.to(positions.device)
            tables[kind] = (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
        return tables

    def _mask(self, attention_mask, T, window=None):
        """Return a mask (B, 1, T, S) that is True where a query can attend to a key.

        The key must not come after the query and must not be padding. A position can always attend to itself, so no row is all
        False. With a `window`, a query can attend only to the last `window` positions, including its own.
        """
        S = attention_mask.shape[1]
        causal = torch.ones((T, S), dtype=torch.bool, device=attention_mask.device).tril(S - T)
        if window is not None:
            causal = causal.triu(S - T - window + 1)
        diagonal = torch.eye(S, dtype=torch.bool, device=attention_mask.device)[-T:]
        return (causal & attention_mask[:, None, :].bool() | diagonal)[:, None]


def check_arguments(arguments, known):
    """Raise `TypeError` if `forward` would ignore an argument that has a value."""
    unknown = [name for name, value in arguments.items() if value is not None and name not in known]
    if unknown:
        raise TypeError(f"forward() does not support the arguments {', '.join(sorted(unknown))}")


class TinylmForCausalLM(TinylmModel, GenerationMixin):
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = None
    accepts_loss_kwargs = True

    def _add_head(self, config):
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.head_bias)

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, value):
        self.head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        previous_ids=None,
        cache=None,
        **kwargs,
    ):
        """Like `TinylmModel.forward`, but return logits (B, T, V) and, with `labels` (B, T), the mean loss of the next tokens."""
        check_arguments(kwargs, IGNORED_ARGUMENTS | LOSS_ARGUMENTS)
        hidden, cache, states, patterns = self._hidden(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values if cache is None else cache,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            previous_ids,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(hidden[:, kept])
        cap = self.config.logit_softcap
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            options = {name: value for name, value in kwargs.items() if name in LOSS_ARGUMENTS and value is not None}
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **options)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: cache}, hidden_states=states, attentions=patterns)
        return output if self._returns_dict(return_dict) else output.to_tuple()

    def create_masks_for_generate(self, *args, attention_mask=None, **kwargs):
        """Keep the mask (B, S) even with a static cache, because n-gram embeddings and positions need it."""
        return attention_mask

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        if self.ngrams is not None and inputs.get("input_ids") is not None:
            new = inputs["input_ids"].shape[1]
            ids = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, self.ngrams.pad_id)
            inputs["previous_ids"] = ids[:, : ids.shape[1] - new][:, -(max(self.config.ngram_embeddings) - 1) :]
        return inputs
