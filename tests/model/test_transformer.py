"""Compare the transformer with other implementations and plain formulas, and check properties of every configuration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model.parts import case_network, cases_and_presets
from tiny import PRESETS, VOCAB_SIZE, add_noise_, causal_batch, ids, model, section
from torch import Tensor

from tinylm.cost import memory
from tinylm.model import functions
from tinylm.model.cache import KVCache
from tinylm.model.layers import ForwardContext
from tinylm.model.transformer import Transformer
from tinylm.recipe.presets import DECODER_PRESETS
from tinylm.recipe.schema import DecoderSection
from tinylm.training.objectives import CausalLM

# Equality with Hugging Face transformers


def _load_all(target: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights into another library's model. Raise an error if a weight is missing or unexpected."""
    target.load_state_dict(weights, strict=True)
    target.eval()


def _as_gpt2(network: Transformer) -> dict[str, Tensor]:
    ours = network.state_dict()
    theirs = {"transformer.wte.weight": ours["embedding.weight"], "transformer.wpe.weight": ours["positions.weight"]}
    theirs |= {f"transformer.ln_f.{part}": ours[f"final_norm.{part}"] for part in ("weight", "bias")}
    theirs["lm_head.weight"] = ours["head.weight"]
    names = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.input": "mlp.c_fc",
        "feed_forward.output": "mlp.c_proj",
    }
    for layer in range(network.model.n_layer):
        for name, other in names.items():
            weight = ours[f"blocks.{layer}.{name}.weight"]
            theirs[f"transformer.h.{layer}.{other}.weight"] = weight.T if weight.ndim == 2 else weight  # Conv1D is (in, out)
            theirs[f"transformer.h.{layer}.{other}.bias"] = ours[f"blocks.{layer}.{name}.bias"]
    return theirs


def _as_llama(network: Transformer) -> dict[str, Tensor]:
    ours, model = network.state_dict(), network.model
    theirs = {
        "model.embed_tokens.weight": ours["embedding.weight"],
        "model.norm.weight": ours["final_norm.weight"],
        "lm_head.weight": ours["head.weight"],
    }
    kv_width = model.kv_heads * model.head_width
    for layer in range(model.n_layer):
        our_name, their_name = f"blocks.{layer}", f"model.layers.{layer}"
        rows = ours[f"{our_name}.attention.qkv.weight"].split((model.n_head * model.head_width, kv_width, kv_width))
        for name, weight in zip("qkv", rows, strict=True):
            theirs[f"{their_name}.self_attn.{name}_proj.weight"] = weight
        gate, values = ours[f"{our_name}.feed_forward.input.weight"].chunk(2)
        theirs[f"{their_name}.self_attn.o_proj.weight"] = ours[f"{our_name}.attention.output.weight"]
        theirs[f"{their_name}.mlp.gate_proj.weight"] = gate
        theirs[f"{their_name}.mlp.up_proj.weight"] = values
        theirs[f"{their_name}.mlp.down_proj.weight"] = ours[f"{our_name}.feed_forward.output.weight"]
        theirs[f"{their_name}.input_layernorm.weight"] = ours[f"{our_name}.attention_norm.weight"]
        theirs[f"{their_name}.post_attention_layernorm.weight"] = ours[f"{our_name}.feed_forward_norm.weight"]
        if model.qk_norm:
            theirs[f"{their_name}.self_attn.q_norm.weight"] = ours[f"{our_name}.attention.query_gain"]
            theirs[f"{their_name}.self_attn.k_norm.weight"] = ours[f"{our_name}.attention.key_gain"]
    return theirs


def _assert_same_logits(network: Transformer, other: torch.nn.Module, length: int) -> None:
    tokens = ids(3, length)
    with torch.no_grad():
        torch.testing.assert_close(network(tokens), other(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        {"n_head": 4, "n_embd": 32},
        {"n_head": 1, "n_embd": 24, "n_layer": 3},
        {"n_head": 3, "n_embd": 48, "feed_forward_multiple": 2.5, "norm_eps": 1e-3},
        {"n_head": 2, "n_embd": 16, "tie_embeddings": False},
    ],
)
def test_the_gpt2_preset_matches_transformers_gpt2(overrides: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    network = model("gpt2", **overrides)
    shape = network.model
    config = transformers.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=shape.context_length,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_inner=shape.feed_forward_width,
        layer_norm_epsilon=shape.norm_eps,
        tie_word_embeddings=shape.tie_embeddings,
    )
    other = transformers.GPT2LMHeadModel(config)
    _load_all(other, _as_gpt2(network))
    _assert_same_logits(network, other, shape.context_length)


def _llama_config(network: Transformer) -> dict[str, Any]:
    shape = network.model
    return {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": shape.context_length,
        "hidden_size": shape.n_embd,
        "intermediate_size": shape.feed_forward_width,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta or 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta or 10000.0},
        "tie_word_embeddings": shape.tie_embeddings,
    }


@pytest.mark.parametrize(
    "overrides",
    [
        {"n_head": 4, "n_embd": 32},
        {"n_head": 4, "n_kv_head": 2, "n_embd": 48, "n_layer": 3},
        {"n_head": 4, "n_kv_head": 1, "n_embd": 32, "rope_theta": 500.0},
        {"n_head": 2, "n_embd": 40, "tie_embeddings": True, "norm_eps": 1e-3},
    ],
)
def test_the_llama_preset_matches_transformers_llama(overrides: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    network = model("llama", **overrides)
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_llama_config(network)))
    _load_all(other, _as_llama(network))
    _assert_same_logits(network, other, network.model.context_length)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_llama_with_query_and_key_norms_matches_transformers_qwen3(kv_heads: int | None) -> None:
    transformers = pytest.importorskip("transformers")
    network = model("llama", qk_norm=True, n_kv_head=kv_heads)
    other = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_llama_config(network)))
    _load_all(other, _as_llama(network))
    _assert_same_logits(network, other, network.model.context_length)


@pytest.mark.parametrize("window", [1, 3, 9, 40])
def test_llama_with_an_attention_window_matches_transformers_mistral(window: int) -> None:
    transformers = pytest.importorskip("transformers")
    network = model("llama", attention_window=window, n_kv_head=2)
    other = transformers.MistralForCausalLM(transformers.MistralConfig(**_llama_config(network), sliding_window=window))
    _load_all(other, _as_llama(network))
    _assert_same_logits(network, other, network.model.context_length)


# Every setting has an effect

CHANGES = [
    {"preset": "llama"},
    {"n_layer": 3},
    {"n_head": 2},
    {"n_kv_head": 2},
    {"n_embd": 48},
    {"norm": "layernorm"},
    {"norm_position": "post"},
    {"norm_position": "output"},
    {"norm_position": "both"},
    {"norm_eps": 0.1},
    {"position": "learned"},
    {"position": "sinusoidal"},
    {"position": "none"},
    {"rope_theta": 10.0},
    {"rope_theta_local": 10.0, "attention_window": 12, "attention_pattern": ["global", "local"]},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_fraction": 0.5},
    {"rope_pattern": ["rope", "none"]},
    {"embedding_scale": 3.0, "embedding_norm": False},
    {"qk_norm_joint": True, "qk_gain": False},
    {"attention_softcap": 0.5},
    {"shifted_key_heads": 1},
    {"feed_forward": "geglu"},
    {"feed_forward": "gelu"},
    {"feed_forward": "gelu", "n_inner": 60},
    {"feed_forward": "gelu_exact"},
    {"head_dim": 4},
    {"feed_forward": "relu"},
    {"feed_forward": "swiglu"},
    {"feed_forward_multiple": 2.0},
    {"bias": True},
    {"head_bias": True},
    {"tie_embeddings": True},
    {"qk_norm": False},
    {"embedding_norm": False},
    {"zero_init_outputs": False},
    {"parallel_residual": True},
    {"logit_softcap": 2.0},
    {"norm_gain": False},
    {"qk_gain": False},
    {"ngram_embeddings": [2]},
    {"ngram_embeddings": [2, 3]},
    {"ngram_embeddings": [3], "ngram_rows": 50, "ngram_width": 8},
    {"value_embeddings": 1},
    {"value_residual": True},
    {"embedding_shortcut": True},
    {"attention_window": 4},
    {"attention_window": 4, "attention_pattern": ["global", "local"]},
]


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_setting_has_an_effect(change: dict[str, Any]) -> None:
    """The models share every weight whose name and shape match, so only the setting can change the output."""
    before, after = Transformer(section(), VOCAB_SIZE), Transformer(section(**change), VOCAB_SIZE)
    if change == {"zero_init_outputs": False}:
        weights = zip(before.parameters(), after.parameters(), strict=True)
        assert not all(_close(a, b) for a, b in weights), "zero_init_outputs must change the initial weights"
        return
    add_noise_(before).eval()
    add_noise_(after, seed=1).eval()
    shapes = {name: value.shape for name, value in after.state_dict().items()}
    shared = {name: value for name, value in before.state_dict().items() if shapes.get(name) == value.shape}
    assert shared or "n_embd" in change
    after.load_state_dict(shared, strict=False)
    with torch.no_grad():
        assert not _close(before(ids()), after(ids()))


def test_a_sequence_longer_than_the_context_length_raises() -> None:
    short, long = model(context_length=8), model(context_length=9)
    assert long(ids(1, 9)).shape == (1, 9, VOCAB_SIZE)
    with pytest.raises(ValueError, match="9 positions do not fit in the context length of 8"):
        short(ids(1, 9))


def test_dropout_is_active_only_in_training_mode() -> None:
    network, plain = model(dropout=0.5), model()
    tokens = ids()
    assert torch.equal(network(tokens), plain(tokens))
    network.train()
    assert not torch.equal(network(tokens), network(tokens))


@pytest.mark.parametrize("preset", PRESETS)
def test_attention_dropout_defaults_to_dropout_except_in_the_modern_preset(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, seen = torch.nn.functional.scaled_dot_product_attention, set()

    def recorded(*tensors: torch.Tensor, dropout_p: float = 0.0, **rest: Any) -> torch.Tensor:
        seen.add(dropout_p)
        return attention(*tensors, dropout_p=dropout_p, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    for overrides, expected in (
        ({"dropout": 0.3}, 0.0 if preset == "modern" else 0.3),
        ({"attention_dropout": 0.2}, 0.2),
        ({"dropout": 0.3, "attention_dropout": 0.0}, 0.0),
    ):
        seen.clear()
        network = model(preset, **overrides)
        network.train()(ids())
        assert seen == {expected}
        assert network.model.uses_dropout
        network.eval()(ids())
        assert seen == {expected, 0.0}


def test_dropout_zeroes_the_configured_fraction_of_elements_and_preserves_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 257, requires_grad=True)
    dropped = functions.Dropout(0.3)(x)
    dropped.sum().backward()
    fraction = float((dropped == 0).float().mean())
    assert fraction == pytest.approx(0.3, abs=0.006)  # four standard deviations
    assert sorted(dropped.detach().unique().tolist()) == pytest.approx([0.0, 1 / 0.7], rel=1e-4)
    assert torch.equal(x.grad, dropped.detach())
    columns = (dropped == 0).float().mean(0)
    assert float(columns.std()) == pytest.approx((0.21 / 400) ** 0.5, rel=0.15), "elements must be dropped independently"
    torch.manual_seed(0)
    assert torch.equal(functions.Dropout(0.3)(x), dropped)
    assert torch.equal(functions.Dropout(0.3).eval()(x), x)
    assert not functions.Dropout(1.0)(x).any()


def test_every_model_setting_is_tested() -> None:
    tested_elsewhere = {
        "architecture",
        "context_length",
        "dropout",
        "attention_dropout",
        "ngram_dropout",
        "init_embeddings",
        "freeze_embeddings",
        "init_from",
    }
    tested = {key for change in CHANGES for key in change} | tested_elsewhere
    assert tested == set(DecoderSection.model_fields)
    assert all(set(overrides) <= tested for overrides in DECODER_PRESETS.values())


def test_every_combination_of_norm_position_and_parallel_residual_has_different_logits() -> None:
    tokens = ids()
    logits = [
        model(norm_position=position, parallel_residual=parallel)(tokens)
        for position in ("pre", "post")
        for parallel in (False, True)
    ]
    assert not any(_close(logits[a], logits[b]) for a in range(4) for b in range(a))


def test_soft_capping_bounds_every_logit() -> None:
    capped = model(logit_softcap=0.5)(ids())
    assert capped.abs().max() < 0.5
    torch.testing.assert_close(capped, 0.5 * torch.tanh(model()(ids()) / 0.5))


@pytest.mark.parametrize(("multiple", "width"), [(8 / 3, 88), (4.0, 128), (1.1, 32), (0.01, 8)])
def test_the_feed_forward_width_is_rounded_to_a_multiple_of_eight(multiple: float, width: int) -> None:
    network = model(feed_forward_multiple=multiple)
    assert network.model.feed_forward_width == width
    assert network.blocks[0].feed_forward.output.weight.shape == (32, width)


# Properties of every configuration

CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    *((preset, {}) for preset in PRESETS),
    ("llama", {"n_kv_head": 2}),
    ("modern", {"n_kv_head": 1, "norm_position": "post"}),
    ("gpt2", {"position": "sinusoidal", "parallel_residual": True}),
    ("gpt2", {"position": "none"}),
    ("modern", {"ngram_embeddings": [2, 4], "ngram_rows": 97}),
    ("llama", {"value_embeddings": 1, "value_residual": True, "n_kv_head": 2, "n_layer": 3}),
    ("modern", {"embedding_shortcut": True, "norm_gain": False, "qk_gain": False, "logit_softcap": 5.0}),
]


@pytest.mark.parametrize(("preset", "overrides"), [*CONFIGURATIONS, *cases_and_presets()], ids=str)
def test_a_later_token_never_changes_an_earlier_logit(preset: str, overrides: dict[str, Any]) -> None:
    network = case_network(overrides, preset)
    tokens = ids(1, 12)
    before = network(tokens)
    for position in (3, 8, 11):
        changed = tokens.clone()
        changed[0, position:] = (changed[0, position:] + 7) % VOCAB_SIZE
        after = network(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(after[:, position], before[:, position], atol=1e-3)


@pytest.mark.parametrize(("preset", "overrides"), CONFIGURATIONS, ids=str)
def test_the_first_token_affects_every_later_logit(preset: str, overrides: dict[str, Any]) -> None:
    network = model(preset, **overrides)
    tokens = ids(1, 12)
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 7) % VOCAB_SIZE
    difference = (network(changed) - network(tokens)).abs().amax(dim=-1)[0]
    assert (difference > 1e-5).all()


@pytest.mark.parametrize(("preset", "overrides"), [*CONFIGURATIONS, *cases_and_presets()], ids=str)
def test_cached_forward_passes_match_a_full_pass(preset: str, overrides: dict[str, Any]) -> None:
    network = case_network(overrides, preset)
    context = network.model.context_length
    tokens = ids(2, context)
    cache = KVCache(network.model, 2, context, device=torch.device("cpu"), dtype=torch.float32).row_slice()
    logits, start = [], 0
    with torch.no_grad():
        for step in (5, 1, 1, 4, 1, 3, context - 15):  # a prompt, then one or more tokens at a time
            logits.append(network(tokens[:, start : start + step], cache))
            start += step
            assert cache.length == start
        torch.testing.assert_close(torch.cat(logits, dim=1), network(tokens), atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=f"{context + 1} positions do not fit"):
        network(tokens[:, :1], cache)


@pytest.mark.parametrize(("preset", "overrides"), CONFIGURATIONS, ids=str)
def test_gradients_match_finite_differences(preset: str, overrides: dict[str, Any]) -> None:
    """Compare with central differences in float64 along a random direction for each parameter."""
    network = model(preset, n_embd=16, feed_forward_multiple=1.0, **{"n_layer": 2, **overrides}).double()
    tokens = ids(2, 9)

    def loss() -> Tensor:
        objective = CausalLM()
        return objective.loss_sum(network, causal_batch(tokens))

    loss().backward()
    generator = torch.Generator().manual_seed(1)
    parameters = dict(network.named_parameters())
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = loss()
            parameter.sub_(direction, alpha=2 * step)
            below = loss()
            parameter.add_(direction, alpha=step)
        slope = (above - below) / (2 * step)
        torch.testing.assert_close(slope, (parameter.grad * direction).sum(), atol=1e-5, rtol=1e-5, msg=name)


# Settings that other libraries do not have, compared with their formulas

SETTINGS: list[dict[str, Any]] = [
    {},
    {"value_embeddings": 1},
    {"value_embeddings": 2, "n_kv_head": 2},
    {"value_residual": True},
    {"embedding_shortcut": True},
    {"ngram_embeddings": [2, 3], "ngram_rows": 97, "ngram_width": 8},
    {"logit_softcap": 3.0},
    {"shifted_key_heads": 1},
    {"shifted_key_heads": 2, "n_kv_head": 2},
    {"norm_gain": False},
    {"qk_gain": False},
    {
        "value_embeddings": 1,
        "value_residual": True,
        "embedding_shortcut": True,
        "ngram_embeddings": [2],
        "ngram_rows": 97,
        "logit_softcap": 3.0,
        "norm_gain": False,
        "qk_gain": False,
        "n_kv_head": 2,
    },
]


def _rms_norm(x: Tensor, eps: float, gain: Tensor | None) -> Tensor:
    normed = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return normed if gain is None else normed * gain


def _rotate(heads: Tensor, theta: float) -> Tensor:
    """Rotate `heads` (time, heads, D) by multiplying pair j at time t by exp(i t theta^(-2j/D))."""
    time, _, width = heads.shape
    angles = torch.outer(torch.arange(time), theta ** (-torch.arange(0, width, 2) / width)).double()[:, None]
    pairs = torch.complex(heads[..., : width // 2], heads[..., width // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def _reference_logits(network: Transformer, tokens: Tensor) -> Tensor:
    """Compute the logits of one sequence head by head, for the `modern` preset with any of `SETTINGS`.

    The n-gram embeddings come from the network itself.
    """
    shape, weights = network.model, dict(network.named_parameters())
    eps, width = shape.norm_eps, shape.head_width
    x = weights["embedding.weight"][tokens]
    if network.ngrams is not None:
        x = x + network.ngrams(tokens[None])[0]
    x = embedded = _rms_norm(x, eps, weights.get("embedding_norm.weight"))
    first_values = None
    for layer in range(shape.n_layer):
        block = {name.removeprefix(f"blocks.{layer}."): w for name, w in weights.items() if name.startswith(f"blocks.{layer}.")}
        if shape.embedding_shortcut:
            x = block["residual_mix"][0] * x + block["residual_mix"][1] * embedded
        rows = (shape.n_head * width, shape.kv_heads * width, shape.kv_heads * width)
        projected = _rms_norm(x, eps, block.get("attention_norm.weight")) @ block["attention.qkv.weight"].T
        q, k, v = (piece.unflatten(-1, (-1, width)) for piece in projected.split(rows, dim=-1))
        q = _rotate(_rms_norm(q, eps, block.get("attention.query_gain")), 10000.0)
        k = _rotate(_rms_norm(k, eps, block.get("attention.key_gain")), 10000.0)
        if layer < shape.value_embeddings or shape.n_layer - layer <= shape.value_embeddings:
            v = v + block["value_embedding.weight"][tokens].unflatten(-1, (-1, width))
        if first_values is None:
            first_values = v
        elif shape.value_residual:
            share = block["attention.value_share"]
            v = (1 - share) * first_values + share * v
        attended = []
        for head in range(shape.n_head):
            group = head * shape.kv_heads // shape.n_head
            keys = k[:, group]
            if group < shape.shifted_key_heads:
                keys = torch.stack([torch.zeros_like(keys[0]), *keys[:-1]])
            scores = q[:, head] @ keys.T / math.sqrt(width)
            is_local = shape.attention_pattern[layer % len(shape.attention_pattern)] == "local"
            window = (shape.attention_window if is_local else None) or len(tokens)
            masked = [[not 0 <= query - key < window for key in range(len(tokens))] for query in range(len(tokens))]
            attended.append(scores.masked_fill(torch.tensor(masked), float("-inf")).softmax(dim=-1) @ v[:, group])
        x = x + torch.cat(attended, dim=-1) @ block["attention.output.weight"].T
        hidden = _rms_norm(x, eps, block.get("feed_forward_norm.weight")) @ block["feed_forward.input.weight"].T
        x = x + hidden.clamp_min(0).square() @ block["feed_forward.output.weight"].T
    logits = _rms_norm(x, eps, weights.get("final_norm.weight")) @ weights["head.weight"].T
    return logits if shape.logit_softcap is None else shape.logit_softcap * torch.tanh(logits / shape.logit_softcap)


WINDOWS: list[dict[str, Any]] = [
    {"attention_window": 1},
    {"attention_window": 4, "n_kv_head": 2},
    {"attention_window": 3, "attention_pattern": ["local", "global"]},
    {"attention_window": 3, "attention_pattern": ["global", "global", "local"]},
]


@pytest.mark.parametrize("overrides", [*SETTINGS, *WINDOWS], ids=str)
def test_the_modern_preset_with_any_setting_matches_the_formula(overrides: dict[str, Any]) -> None:
    network = model(n_layer=3, **overrides).double()
    tokens = ids(2, 11)
    with torch.no_grad():
        expected = torch.stack([_reference_logits(network, row) for row in tokens])
        torch.testing.assert_close(network(tokens), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("overrides", SETTINGS[1:], ids=str)
def test_each_setting_except_gains_changes_the_output_and_every_parameter_has_a_gradient(overrides: dict[str, Any]) -> None:
    network = model(n_layer=3, **overrides)
    shared = {key: value for key, value in overrides.items() if key == "n_kv_head"}
    without = model(n_layer=3, **shared)
    weights = network.state_dict()
    without.load_state_dict({name: weights.get(name, torch.ones_like(value)) for name, value in without.state_dict().items()})
    tokens, objective = ids(4, 12), CausalLM()
    differs = not _close(network(tokens), without(tokens))
    assert differs == (overrides not in ({"norm_gain": False}, {"qk_gain": False})), "gains of 1 have no effect"
    assert network.parameter_count() != without.parameter_count() or {"logit_softcap", "shifted_key_heads"} & overrides.keys()
    objective.loss_sum(network, causal_batch(tokens)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.to_dense().abs().max() > 1e-6, name


def test_attention_windows_apply_within_segments() -> None:
    """Two texts packed into one row have the same logits as the texts in separate rows."""
    network, tokens = model(attention_window=3), ids(1, 12)
    segments = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        together = network.logits(network.hidden(tokens, segments=segments))
        alone = torch.cat((network(tokens[:, :5]), network(tokens[:, 5:])), dim=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_shifted_keys_do_not_cross_segment_boundaries() -> None:
    network = model(n_layer=2, shifted_key_heads=1)
    tokens, segments = ids(1, 9), torch.tensor([[0] * 4 + [1] * 5])
    with torch.no_grad():
        separate = torch.cat((network(tokens[:, :4]), network(tokens[:, 4:])), dim=1)
        torch.testing.assert_close(network(tokens, segments=segments), separate, atol=1e-5, rtol=1e-5)


def test_value_embeddings_are_in_the_first_and_last_blocks() -> None:
    def layers_with_value_embeddings(count: int, n_layer: int) -> list[int]:
        network = Transformer(section(value_embeddings=count, n_layer=n_layer), VOCAB_SIZE)
        return [layer for layer, block in enumerate(network.blocks) if block.value_embedding is not None]

    assert layers_with_value_embeddings(0, 3) == []
    assert layers_with_value_embeddings(1, 5) == [0, 4]
    assert layers_with_value_embeddings(2, 5) == [0, 1, 3, 4]
    assert layers_with_value_embeddings(9, 3) == [0, 1, 2]


# Summed loss and activation checkpointing


def test_the_summed_loss_does_not_compute_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, tokens, objective = model(vocab_size=1000), ids(8, 17, vocab_size=1000), CausalLM()
    batch = causal_batch(tokens)
    expected = objective.losses(network, batch).sum()
    monkeypatch.setitem(memory.LOSS_BYTES, "cpu", 0)  # use the smallest chunks
    monkeypatch.setattr(network, "logits", None)
    torch.testing.assert_close(network(batch.inputs, targets=batch.targets), expected)


def _gradients(network: Transformer, *, recompute: bool) -> tuple[list[Tensor], int]:
    """Return the gradients and the number of bytes saved for the backward pass."""
    objective, saved = CausalLM(), []
    network.recompute = recompute

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() * tensor.itemsize)
        return tensor

    network.zero_grad()
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = objective.loss_sum(network, causal_batch(ids(4, 17)))
        saved_bytes = sum(saved)
    loss.backward()
    return [parameter.grad.to_dense().clone() for parameter in network.parameters()], saved_bytes


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("preset", "overrides"), CONFIGURATIONS, ids=str)
def test_recomputation_saves_fewer_bytes_and_does_not_change_the_gradients(
    preset: str, overrides: dict[str, Any], dropout: float
) -> None:
    network = model(preset, **{**overrides, "n_layer": 4, "dropout": dropout}).double().train()
    expected, saved_bytes = _gradients(network, recompute=False)
    recomputed, recomputed_saved_bytes = _gradients(network, recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, recomputed, strict=True))
    assert recomputed_saved_bytes < 0.5 * saved_bytes


def test_recomputation_has_no_effect_without_gradients() -> None:
    network = model()
    network.recompute = True
    tokens = ids()
    with torch.no_grad():
        assert torch.equal(network(tokens), model()(tokens))


# Initial weights


def test_the_value_residual_starts_at_one_half_and_the_embedding_shortcut_starts_disabled() -> None:
    network = Transformer(section(value_residual=True, embedding_shortcut=True), VOCAB_SIZE)
    assert network.blocks[0].attention.value_share is None
    assert network.blocks[1].attention.value_share.item() == 0.5
    assert network.blocks[0].residual_mix.tolist() == network.blocks[1].residual_mix.tolist() == [1.0, 0.0]


def test_initial_weights_depend_only_on_the_seed() -> None:
    torch.manual_seed(5)
    first = Transformer(section(), VOCAB_SIZE, seed=3)
    torch.manual_seed(6)
    same, different = Transformer(section(), VOCAB_SIZE, seed=3), Transformer(section(), VOCAB_SIZE, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, different.embedding.weight)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_initial_loss_is_close_to_the_log_of_the_vocabulary_size(preset: str) -> None:
    network = Transformer(section(preset, n_embd=64), 500).eval()
    tokens = ids(8, 17, vocab_size=500)
    objective = CausalLM()
    loss = objective.losses(network, causal_batch(tokens)).mean()
    assert abs(loss.item() - math.log(500)) < 0.1


def test_with_zero_init_outputs_every_block_starts_as_the_identity() -> None:
    network = Transformer(section(), VOCAB_SIZE).eval()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    rotation = network.rope_cosines[:5, None], network.rope_sines[:5, None]
    output, values = network.blocks[0](x, ForwardContext(ids(2, 5), x, rotation), None)
    assert torch.equal(output, x)
    assert values.shape == (2, 5, 4, 8)


def test_gpt2_initial_weights_have_the_standard_deviations_from_the_paper() -> None:
    network = Transformer(section("gpt2", n_embd=128, n_layer=8), 1000)
    assert network.embedding.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert network.blocks[0].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert network.blocks[0].feed_forward.output.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert not network.blocks[0].attention.qkv.bias.any()


def test_a_tied_head_is_the_embedding_and_is_counted_once() -> None:
    tied, untied = model(tie_embeddings=True), model()
    assert tied.head.weight is tied.embedding.weight
    assert untied.parameter_count() - tied.parameter_count() == VOCAB_SIZE * 32


def test_stacked_matrices_lists_the_row_counts_of_fused_weights() -> None:
    rows = model("llama", n_kv_head=2).stacked_matrices()
    assert rows["blocks.0.attention.qkv.weight"] == (32, 16, 16)
    assert rows["blocks.1.feed_forward.input.weight"] == (88, 88)
    assert len(rows) == 4
    network = model("llama", n_kv_head=2)
    for name, sizes in rows.items():
        assert network.get_parameter(name).shape[0] == sum(sizes)


def test_logits_are_the_head_applied_to_the_hidden_states() -> None:
    network = model()
    tokens = ids()
    torch.testing.assert_close(network.logits(network.hidden(tokens)), network(tokens))
    torch.testing.assert_close(F.linear(network.hidden(tokens), network.head.weight), network(tokens))
