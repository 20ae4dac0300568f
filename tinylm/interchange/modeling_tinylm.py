"""A tinylm model for Hugging Face transformers.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Needs only torch and transformers. Supports every model setting of a tinylm recipe, and `generate` with a KV cache, padding on
either side, and beam search. Tensors have the same names as in tinylm.

Legend: B batch, T new positions, S all positions so far, C width, H query heads, K key/value heads, D head width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class TinylmConfig(PretrainedConfig):
    """The vocabulary size, and the `model:` section of a tinylm recipe. Most keys have the same names."""

    model_type = "tinylm"
    attribute_map = {  # noqa: RUF012  the names that transformers expects
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "context_length",
        "intermediate_size": "n_inner",
    }

    def __init__(
        self,
        vocab_size=257,
        context_length=256,
        n_layer=6,
        n_head=6,
        n_kv_head=6,
        head_dim=64,
        n_embd=384,
        n_inner=1536,
        norm="rmsnorm",
        norm_position="pre",
        norm_eps=1e-6,
        norm_gain=True,
        position="rope",
        rotary_base=10000.0,
        feed_forward="relu2",
        bias=False,
        qk_norm=True,
        qk_gain=True,
        embedding_norm=True,
        ngram_embeddings=(),
        ngram_rows=16384,
        ngram_width=32,
        value_embeddings=0,
        value_residual=False,
        embedding_shortcut=False,
        parallel_residual=False,
        logit_softcap=None,
        attention_window=None,
        attention_pattern=("local",),
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_kv_head = n_kv_head
        self.head_dim = head_dim
        self.n_embd = n_embd
        self.n_inner = n_inner
        self.norm = norm
        self.norm_position = norm_position
        self.norm_eps = norm_eps
        self.norm_gain = norm_gain
        self.position = position
        self.rotary_base = rotary_base
        self.feed_forward = feed_forward
        self.bias = bias
        self.qk_norm = qk_norm
        self.qk_gain = qk_gain
        self.embedding_norm = embedding_norm
        self.ngram_embeddings = list(ngram_embeddings)
        self.ngram_rows = ngram_rows
        self.ngram_width = ngram_width
        self.value_embeddings = value_embeddings
        self.value_residual = value_residual
        self.embedding_shortcut = embedding_shortcut
        self.parallel_residual = parallel_residual
        self.logit_softcap = logit_softcap
        self.attention_window = attention_window
        self.attention_pattern = list(attention_pattern)
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


def rotate(x, positions, base):
    """Rotary positions (Su et al. 2021): rotate the pairs (x[i], x[i + D/2]) of x (B, heads, T, D) to positions (B, T)."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = positions[:, None, :, None].double() * frequencies  # (B, 1, T, D/2)
    cosines, sines = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.rows = [config.n_head * config.head_dim, config.n_kv_head * config.head_dim, config.n_kv_head * config.head_dim]
        self.qkv = nn.Linear(config.n_embd, sum(self.rows), bias=config.bias)
        self.output = nn.Linear(self.rows[0], config.n_embd, bias=config.bias)
        gains = config.qk_norm and config.qk_gain
        self.query_gain = nn.Parameter(torch.ones(config.head_dim)) if gains else None
        self.key_gain = nn.Parameter(torch.ones(config.head_dim)) if gains else None
        self.value_share = nn.Parameter(torch.tensor([0.5])) if config.value_residual and layer > 0 else None

    def forward(self, x, positions, mask, cache, added_values, first_values):
        """x (B, T, C) -> (B, T, C) and the values (B, K, T, D), without cached values."""
        config, (B, T, _) = self.config, x.shape
        q, k, v = (part.view(B, T, -1, config.head_dim).transpose(1, 2) for part in self.qkv(x).split(self.rows, dim=-1))
        if config.qk_norm:
            q, k = rms_norm(q, self.query_gain, config.norm_eps), rms_norm(k, self.key_gain, config.norm_eps)
        if config.position == "rope":
            q, k = rotate(q, positions, config.rotary_base), rotate(k, positions, config.rotary_base)
        if added_values is not None:
            v = v + added_values.view(B, T, -1, config.head_dim).transpose(1, 2)
        if self.value_share is not None:
            v = torch.lerp(first_values, v, self.value_share)
        values = v
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        groups = config.n_head // config.n_kv_head
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, D)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, D)
        return self.output(attended.transpose(1, 2).reshape(B, T, -1)), values


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind = config.feed_forward
        self.input = nn.Linear(config.n_embd, config.n_inner * (2 if self.kind == "swiglu" else 1), bias=config.bias)
        self.output = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.input(x)
        if self.kind == "swiglu":
            gate, values = x.chunk(2, dim=-1)
            x = F.silu(gate) * values
        elif self.kind in ("relu", "relu2"):
            x = F.relu(x) if self.kind == "relu" else F.relu(x).square()
        else:
            x = F.gelu(x, approximate="tanh" if self.kind == "gelu" else "none")
        return self.output(x)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.post, self.parallel = config.norm_position == "post", config.parallel_residual
        self.residual_mix = nn.Parameter(torch.tensor([1.0, 0.0])) if config.embedding_shortcut else None
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        is_outer = layer < config.value_embeddings or layer >= config.n_layer - config.value_embeddings
        self.value_embedding = nn.Embedding(config.vocab_size, config.n_kv_head * config.head_dim) if is_outer else None
        self.feed_forward_norm = None if self.post and self.parallel else make_norm(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x, tokens, embedded, positions, mask, cache, first_values):
        if self.residual_mix is not None:
            x = self.residual_mix[0] * x + self.residual_mix[1] * embedded
        added_values = None if self.value_embedding is None else self.value_embedding(tokens)
        normed = x if self.post else self.attention_norm(x)
        attended, values = self.attention(normed, positions, mask, cache, added_values, first_values)
        if self.post and self.parallel:
            return self.attention_norm(x + attended + self.feed_forward(x)), values
        if self.post:
            x = self.attention_norm(x + attended)
            return self.feed_forward_norm(x + self.feed_forward(x)), values
        if self.parallel:
            return x + attended + self.feed_forward(self.feed_forward_norm(x)), values
        x = x + attended
        return x + self.feed_forward(self.feed_forward_norm(x)), values


class NgramEmbedding(nn.Module):
    """For each order n, a hash of the last n ids selects a row of a table."""

    def __init__(self, config):
        super().__init__()
        self.orders, self.rows, self.pad_id = config.ngram_embeddings, config.ngram_rows, config.vocab_size
        self.table = nn.Embedding(len(self.orders) * self.rows, config.ngram_width)
        self.projection = nn.Linear(len(self.orders) * config.ngram_width, config.n_embd, bias=False)

    def forward(self, tokens):
        """Ids (B, S), with `pad_id` at padding -> (B, S, C)."""
        indices = torch.stack([self.row_indices(tokens, order) + i * self.rows for i, order in enumerate(self.orders)], dim=-1)
        return self.projection(self.table(indices).flatten(-2))

    def row_indices(self, tokens, order):
        padded = F.pad(tokens, (order - 1, 0), value=self.pad_id)
        key = torch.full_like(tokens, order)
        for offset in range(order):
            key = (key + padded[:, offset : offset + tokens.shape[1]] + 1) * 0x5851F42D4C957F2D  # Knuth's 64-bit multiplier
            key = key ^ (key >> 29)
        return key.remainder(self.rows)


class TinylmForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TinylmConfig
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.ngrams = NgramEmbedding(config) if config.ngram_embeddings else None
        self.positions = nn.Embedding(config.context_length, config.n_embd) if config.position == "learned" else None
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = make_norm(config) if config.norm_position == "pre" else None
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def set_input_embeddings(self, value):
        self.embedding = value

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, value):
        self.head = value

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        labels=None,
        previous_ids=None,
        return_dict=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Ids (B, T) -> logits (B, T, V). With a cache, the ids follow those in the cache.

        `attention_mask` (B, S): 0 at padding. `previous_ids` (B, n - 1): the ids before `input_ids`. With a cache, n-gram
        embeddings need them; `generate` passes them.
        """
        B, T = input_ids.shape
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past + T > self.config.context_length:
            raise ValueError(f"{past + T} positions do not fit in the context length of {self.config.context_length}")
        if attention_mask is None:
            attention_mask = torch.ones((B, past + T), dtype=torch.long, device=input_ids.device)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, -T:]
        x = embedded = self._embed(input_ids, attention_mask, position_ids, past, previous_ids)
        masks = {"global": self._mask(attention_mask, T), "local": self._mask(attention_mask, T, self.config.attention_window)}
        pattern, first_values = self.config.attention_pattern, None
        for layer, block in enumerate(self.blocks):
            mask = masks[pattern[layer % len(pattern)]]
            x, values = block(x, input_ids, embedded, position_ids, mask, past_key_values, first_values)
            first_values = values if first_values is None else first_values
        if self.final_norm is not None:
            x = self.final_norm(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(x[:, kept])
        cap = self.config.logit_softcap
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)
        return output.to_tuple() if return_dict is False else output

    def _embed(self, tokens, attention_mask, positions, past, previous_ids):
        config, T = self.config, tokens.shape[1]
        x = self.embedding(tokens)
        if self.ngrams is not None:
            if previous_ids is None and past:
                raise ValueError("with a cache, n-gram embeddings need previous_ids, the ids before input_ids")
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

    def _mask(self, attention_mask, T, window=None):
        """Return a mask (B, 1, T, S) that is True where a query may attend to a key.

        The key must not come later or be padding. A query always attends to itself, so that no row is all False. With a `window`,
        it attends only to the last `window` positions up to its own.
        """
        S = attention_mask.shape[1]
        causal = torch.ones((T, S), dtype=torch.bool, device=attention_mask.device).tril(S - T)
        if window is not None:
            causal = causal.triu(S - T - window + 1)
        diagonal = torch.eye(S, dtype=torch.bool, device=attention_mask.device)[-T:]
        return (causal & attention_mask[:, None, :].bool() | diagonal)[:, None]

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        if self.ngrams is not None:
            new = inputs["input_ids"].shape[1]
            ids = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, self.ngrams.pad_id)
            inputs["previous_ids"] = ids[:, : ids.shape[1] - new][:, -(max(self.config.ngram_embeddings) - 1) :]
        return inputs
