"""Hook points: activations match other implementations and plain formulas, and replacements take effect."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model.parts import case_network, cases_and_presets
from tiny import PRESETS, VOCAB_SIZE, ids, model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from tinylm.errors import InputError
from tinylm.interchange.hf_architectures import export_state_dict, find_family, make_config
from tinylm.model.decoder import Decoder, as_decoder, make_decoder
from tinylm.model.full_pass import FullPassDecoder
from tinylm.model.hooks import has_functions
from tinylm.reporting import SILENT
from tinylm.training.parallel import Parallel, full_tensor

COMBINATIONS: list[dict[str, Any]] = [
    {"qk_norm": True, "n_kv_head": 1},
    {"position": "rope", "head_dim": 6},
    {"parallel_residual": True, "norm_position": "post"},
    {"value_embeddings": 1, "value_residual": True, "n_kv_head": 2},
    {"embedding_shortcut": True, "logit_softcap": 3.0, "attention_window": 3},
]
CASES = [*cases_and_presets(), *((preset, overrides) for overrides in COMBINATIONS for preset in PRESETS)]
ATTENTION_HOOKS = ("resid_pre", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern", "attn.z", "attn_out")
"""The hook points of every block up to its attention output, in the order of the forward pass."""


def _block_names(layer: int, *names: str) -> list[str]:
    return [f"blocks.{layer}.{name}" for name in names]


def _keep(x: Tensor, name: str) -> None:
    """Leave the activation unchanged. Attaching this function to `attn.scores` or `attn.pattern` selects unfused attention."""


# Names and shapes


def test_hook_names_are_listed_in_the_order_of_the_forward_pass() -> None:
    mlp = ("resid_mid", "mlp.pre", "mlp.post", "mlp_out", "resid_post")
    gpt2 = model("gpt2")
    assert gpt2.hook_names() == [
        "embed",
        "pos_embed",
        *_block_names(0, *ATTENTION_HOOKS, *mlp),
        *_block_names(1, *ATTENTION_HOOKS, *mlp),
        "final_norm",
    ]
    _, cache = gpt2.run_with_cache(ids())
    assert list(cache) == gpt2.hook_names()


def test_hook_points_that_a_model_does_not_have_are_not_listed() -> None:
    names = model("llama", parallel_residual=True, norm_position="post", n_layer=1, ngram_embeddings=[2]).hook_names()
    mlp = ("mlp.pre", "mlp.pre_linear", "mlp.post", "mlp_out", "resid_post")
    assert names == ["embed", "ngram_embed", *_block_names(0, *ATTENTION_HOOKS, *mlp)]


def test_activations_have_the_documented_shapes() -> None:
    _, cache = model("llama", n_kv_head=2, head_dim=6, n_inner=40).run_with_cache(ids(3, 12))
    shapes = {name.removeprefix("blocks.1."): tuple(value.shape) for name, value in cache.items()}
    width = (3, 12, 32)
    assert all(shapes[name] == width for name in ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"))
    assert shapes["final_norm"] == width
    assert shapes["attn.q"] == shapes["attn.z"] == (3, 12, 4, 6)
    assert shapes["attn.k"] == shapes["attn.v"] == (3, 12, 2, 6)
    assert shapes["attn.scores"] == shapes["attn.pattern"] == (3, 4, 12, 12)
    assert shapes["mlp.pre"] == shapes["mlp.pre_linear"] == shapes["mlp.post"] == (3, 12, 40)
    assert model("gpt2").run_with_cache(ids(3, 12), ["pos_embed"])[1]["pos_embed"].shape == width
    assert not any(value.requires_grad for value in cache.values())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("hook_embed", "embed"),
        ("hook_pos_embed", "pos_embed"),
        ("blocks.0.hook_resid_pre", "blocks.0.resid_pre"),
        ("blocks.1.hook_mlp_out", "blocks.1.mlp_out"),
        ("blocks.0.attn.hook_q", "blocks.0.attn.q"),
        ("blocks.0.attn.hook_rot_k", "blocks.0.attn.k"),
        ("blocks.0.attn.hook_attn_scores", "blocks.0.attn.scores"),
        ("blocks.0.attn.hook_pattern", "blocks.0.attn.pattern"),
        ("blocks.0.mlp.hook_post", "blocks.0.mlp.post"),
        ("ln_final.hook_normalized", "final_norm"),
    ],
)
def test_transformer_lens_names_are_accepted(theirs: str, ours: str) -> None:
    _, cache = model("gpt2").run_with_cache(ids(), [theirs])
    assert list(cache) == [ours]
    assert cache[theirs] is cache[ours]


def test_names_can_be_selected_by_pattern_and_predicate() -> None:
    network = model("gpt2")
    posts = ["blocks.0.resid_post", "blocks.1.resid_post"]
    for names in (["blocks.*.resid_post"], ["*hook_resid_post"], posts[::-1], lambda name: name.endswith("resid_post")):
        assert list(network.run_with_cache(ids(), names)[1]) == posts


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("blocks.0.resid_prev", "did you mean blocks.0.resid_pre"),
        ("blocks.7.attn.hook_q", "did you mean blocks.1.attn.q"),
        ("zzz*", "hook_names()"),
    ],
)
def test_unknown_names_raise_an_error_with_close_matches(name: str, suggestion: str) -> None:
    network = model("gpt2")
    with pytest.raises(ValueError) as error:
        network.run_with_cache(ids(), ["embed", name])
    assert name in str(error.value)
    assert suggestion in str(error.value)
    with pytest.raises(ValueError), network.hooks({"embed": _keep, name: _keep}):
        pass
    assert not has_functions(network)
    _, cache = network.run_with_cache(ids(), ["embed"])
    with pytest.raises(KeyError, match=r"embd is not in the cache; did you mean embed\?"):
        cache["embd"]


# Values


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [("gpt2", {}), ("gpt2", {"n_layer": 3}), ("llama", {}), ("llama", {"n_kv_head": 2}), ("llama", {"qk_norm": True})],
)
def test_residuals_and_patterns_match_transformers(preset: str, overrides: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    network, tokens = model(preset, **overrides), ids(2, 16)
    family, _ = find_family(network.model)
    assert family is not None
    config = transformers.AutoConfig.for_model(**make_config(network.model, family, VOCAB_SIZE))
    other = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    other.load_state_dict(export_state_dict(network.state_dict(), network.model, family), strict=not network.model.tie_embeddings)
    with torch.no_grad():
        theirs = other(tokens, output_hidden_states=True, output_attentions=True)
        logits, cache = network.run_with_cache(tokens)
    layers = range(network.model.n_layer)
    ours = [cache[f"blocks.{layer}.resid_pre"] for layer in layers] + [cache["final_norm"]]
    torch.testing.assert_close(ours, list(theirs.hidden_states), atol=1e-4, rtol=1e-4)
    patterns = [cache[f"blocks.{layer}.attn.pattern"] for layer in layers]
    torch.testing.assert_close(patterns, list(theirs.attentions), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits, theirs.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("preset", "overrides"), CASES, ids=str)
@torch.no_grad()
def test_attention_matches_the_formula(preset: str, overrides: dict[str, Any]) -> None:
    """Compare with softmax(q k' / sqrt(d)) v, computed one head at a time."""
    network = case_network(overrides, preset)
    _, cache = network.run_with_cache(ids())
    heads, width = network.model.n_head, network.model.head_width
    distances = torch.arange(12)[:, None] - torch.arange(12)  # (query, key)
    for layer, block in enumerate(network.blocks):
        masked = (distances < 0) | (distances >= (network.model.window_of(layer) or 12))
        q, k, v, scores, pattern, z = (cache[f"blocks.{layer}.attn.{name}"] for name in ("q", "k", "v", "scores", "pattern", "z"))
        for head in range(heads):
            group = head // (heads // network.model.kv_heads)
            expected = torch.einsum("btd,bsd->bts", q[:, :, head], k[:, :, group]) / math.sqrt(width)
            if cap := network.model.attention_softcap:
                expected = cap * torch.tanh(expected / cap)
            expected[:, masked] = -math.inf
            torch.testing.assert_close(scores[:, head], expected, atol=1e-5, rtol=1e-5)
            exponentials = expected.exp()
            expected = exponentials / exponentials.sum(-1, keepdim=True)
            torch.testing.assert_close(pattern[:, head], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(z[:, :, head], expected @ v[:, :, group], atol=1e-5, rtol=1e-5)
        output_norms = {"output": block.attention_norm, "both": block.attention_output_norm}
        norm = output_norms.get(network.model.norm_position, torch.nn.Identity())
        output = norm(block.attention.output(z.flatten(2)))
        torch.testing.assert_close(cache[f"blocks.{layer}.attn_out"], output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_residuals_are_sums_of_embeddings_and_layer_outputs(preset: str) -> None:
    network = model(preset, ngram_embeddings=[2], embedding_norm=False)
    logits, cache = network.run_with_cache(ids())
    torch.testing.assert_close(cache["embed"], network.embedding.weight[ids()])
    embedded = cache["embed"] + cache["ngram_embed"] + cache.get("pos_embed", torch.zeros(()))
    torch.testing.assert_close(cache["blocks.0.resid_pre"], embedded)
    for layer, block in enumerate(network.blocks):
        activations = {
            name: cache[f"blocks.{layer}.{name}"] for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        }
        torch.testing.assert_close(activations["resid_mid"], activations["resid_pre"] + activations["attn_out"])
        torch.testing.assert_close(activations["resid_post"], activations["resid_mid"] + activations["mlp_out"])
        pre, post = cache[f"blocks.{layer}.mlp.pre"], cache[f"blocks.{layer}.mlp.post"]
        if preset == "llama":
            expected = F.silu(pre) * cache[f"blocks.{layer}.mlp.pre_linear"]
        else:
            expected = F.gelu(pre, approximate="tanh") if preset == "gpt2" else pre.clamp_min(0) ** 2
        torch.testing.assert_close(post, expected)
        torch.testing.assert_close(activations["mlp_out"], block.feed_forward.output(post))
        normed = block.feed_forward_norm(activations["resid_mid"])
        torch.testing.assert_close(pre, block.feed_forward.input(normed)[..., : pre.shape[-1]])
    torch.testing.assert_close(cache["blocks.1.resid_pre"], cache["blocks.0.resid_post"])
    torch.testing.assert_close(logits, cache["final_norm"] @ network.head.weight.T)


@torch.no_grad()
def test_queries_and_keys_are_projections_of_the_normalized_residual() -> None:
    network = model("gpt2")
    _, cache = network.run_with_cache(ids())
    block = network.blocks[1]
    normed = F.layer_norm(cache["blocks.1.resid_pre"], (32,), block.attention_norm.weight, block.attention_norm.bias)
    expected = (normed @ block.attention.qkv.weight.T + block.attention.qkv.bias).view(2, 12, 3, 4, 8).unbind(2)
    torch.testing.assert_close([cache[f"blocks.1.attn.{name}"] for name in "qkv"], list(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_residuals_of_a_post_norm_model_are_normalized() -> None:
    network = model("gpt2", norm_position="post")
    _, cache = network.run_with_cache(ids())
    block, names = network.blocks[0], ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    pre, attn_out, mid, mlp_out, post = (cache[f"blocks.0.{name}"] for name in names)
    torch.testing.assert_close(mid, block.attention_norm(pre + attn_out))
    torch.testing.assert_close(post, block.feed_forward_norm(mid + mlp_out))


# Fused and unfused attention


@pytest.mark.parametrize(("preset", "overrides"), CASES, ids=str)
def test_unfused_attention_equals_fused_attention(preset: str, overrides: dict[str, Any]) -> None:
    network, tokens = case_network(overrides, preset), ids()
    results = []
    for names in ([], ["blocks.0.attn.scores"], ["*.attn.pattern"]):
        with network.hooks(dict.fromkeys(names, _keep)):
            network.zero_grad()
            logits = network(tokens)
            logits.square().sum().backward()
            gradients = [parameter.grad.clone() for parameter in network.parameters() if parameter.requires_grad]
            results.append((logits.detach(), gradients))
    for logits, gradients in results[1:]:
        torch.testing.assert_close(logits, results[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradients, results[0][1], atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_unfused_attention_respects_segments_and_padding() -> None:
    network, tokens = model("llama", n_kv_head=2), ids(2, 12)
    segments = torch.tensor([[0] * 5 + [1] * 7, [0] * 4 + [1] * 4 + [-1] * 4])
    logits, cache = network.run_with_cache(tokens, ["*.attn.pattern"], segments=segments)
    valid = segments >= 0
    torch.testing.assert_close(logits[valid], network(tokens, segments=segments)[valid], atol=1e-5, rtol=1e-5)
    pattern = cache["blocks.0.attn.pattern"]
    assert not pattern[0, :, 5:, :5].any()
    torch.testing.assert_close(pattern.sum(-1).amin(1)[valid], torch.ones(int(valid.sum())))
    assert not pattern.isnan().any()


@torch.no_grad()
def test_a_query_whose_scores_are_all_masked_attends_to_nothing() -> None:
    network = model("gpt2")
    with network.hooks({"blocks.0.attn.scores": lambda scores, name: torch.full_like(scores, -math.inf)}):
        _, cache = network.run_with_cache(ids(), ["blocks.0.attn.pattern", "blocks.0.attn_out"])
    assert not cache["blocks.0.attn.pattern"].any()
    bias = network.blocks[0].attention.output.bias
    torch.testing.assert_close(cache["blocks.0.attn_out"], bias.expand(2, 12, 32))


# Replacing activations


@torch.no_grad()
def test_zeroing_attention_outputs_equals_zeroing_their_weights() -> None:
    network, without_attention = model("gpt2"), model("gpt2")
    for block in without_attention.blocks:
        block.attention.output.weight.zero_()
        block.attention.output.bias.zero_()
    expected = without_attention(ids())

    def zero_in_place(x: Tensor, name: str) -> None:
        x.zero_()

    for function in (lambda x, name: torch.zeros_like(x), zero_in_place):
        with network.hooks({"blocks.*.attn_out": function}):
            assert torch.equal(network(ids()), expected)


@torch.no_grad()
def test_zeroing_a_head_equals_zeroing_its_columns_in_the_output_matrix() -> None:
    network, pruned = model("modern"), model("modern")
    pruned.blocks[1].attention.output.weight[:, 8:16] = 0

    def zero_head(z: Tensor, name: str) -> Tensor:
        z[:, :, 1] = 0
        return z

    with network.hooks({"blocks.1.attn.z": zero_head}):
        torch.testing.assert_close(network(ids()), pruned(ids()))


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_patching_in_activations_from_another_input_reproduces_the_logits_of_that_input(preset: str) -> None:
    network, clean, corrupted = model(preset), ids(seed=0), ids(seed=1)
    logits, cache = network.run_with_cache(clean)
    patches = [{"embed": cache["embed"]}, {"final_norm": cache["final_norm"]}, {"blocks.1.resid_pre": cache["blocks.1.resid_pre"]}]
    for patch in patches:
        with network.hooks({name: lambda x, name, patch=patch: patch[name] for name in patch}):
            torch.testing.assert_close(network(corrupted), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("preset", "overrides"), CASES, ids=str)
@torch.no_grad()
def test_every_hook_point_has_an_effect(preset: str, overrides: dict[str, Any]) -> None:
    """All rows of the batch are equal, and each function scales one of them, so that one pass tests many hook points.

    `attn.scores` and `attn.pattern` have a pass of their own, because a function attached to them selects unfused attention.
    """
    network = case_network(overrides, preset)
    plain, names = network(ids(1)), network.hook_names()
    unfused = [name for name in names if name.endswith(("attn.scores", "attn.pattern"))]
    for group in ([name for name in names if name not in unfused], unfused):
        calls = []

        def scale_a_row(x: Tensor, name: str, group: list[str] = group, calls: list[str] = calls) -> Tensor:
            calls.append(name)
            scaled = x.clone()
            scaled[group.index(name)] *= torch.linspace(0.5, 1.5, x.shape[-1])
            return scaled

        with network.hooks(dict.fromkeys(group, scale_a_row)):
            *changed, unchanged = network(ids(1).expand(len(group) + 1, -1))
        assert calls == group
        for name, logits in zip(group, changed, strict=True):
            assert not torch.allclose(logits, unchanged, atol=1e-6), name
        torch.testing.assert_close(unchanged, plain[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(network(ids(1)), plain)


@torch.no_grad()
def test_cached_activations_do_not_change_when_a_later_function_modifies_its_copy() -> None:
    network = model("gpt2")
    _, expected = network.run_with_cache(ids(), ["blocks.0.resid_post"])
    with network.caching(["blocks.0.resid_post"]) as cache, network.hooks({"blocks.1.resid_pre": lambda x, name: x.zero_()}):
        network(ids())
    assert torch.equal(cache["blocks.0.resid_post"], expected["blocks.0.resid_post"])


@torch.no_grad()
def test_functions_from_nested_contexts_are_called_outermost_first() -> None:
    network = model("gpt2")
    _, expected = network.run_with_cache(ids(), ["embed"])
    with network.hooks({"embed": lambda x, name: x + 1}), network.hooks({"hook_embed": lambda x, name: x * 2}):
        _, cache = network.run_with_cache(ids(), ["embed"])
    assert torch.equal(cache["embed"], (expected["embed"] + 1) * 2)
    assert not has_functions(network)


def test_a_replacement_with_a_different_shape_raises_and_removes_all_functions() -> None:
    network = model("gpt2")
    plain = network(ids())
    with (
        pytest.raises(ValueError, match=r"blocks.0.mlp_out must return shape \(2, 12, 32\), not \(12, 32\)"),
        network.hooks({"blocks.*.mlp_out": lambda x, name: x[0], "*.attn.scores": _keep}),
    ):
        network(ids())
    assert not has_functions(network)
    assert torch.equal(network(ids()), plain)


# Training, compiling, copying and saving


def test_gradients_flow_through_hook_functions() -> None:
    network, tokens = model("modern"), ids(2, 13)
    plain = network(tokens[:, :-1], targets=tokens[:, 1:])
    plain.backward()
    expected = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    with network.hooks({"blocks.*.resid_post": lambda x, name: x + 0, "*.attn.q": _keep}):
        network(tokens[:, :-1], targets=tokens[:, 1:]).backward()
    assert all(torch.equal(parameter.grad, other) for parameter, other in zip(network.parameters(), expected, strict=True))
    network.zero_grad()
    with network.hooks({"blocks.0.resid_post": lambda x, name: x.detach()}):
        network(tokens[:, :-1], targets=tokens[:, 1:]).backward()
    assert network.embedding.weight.grad is None
    assert network.blocks[1].attention.qkv.weight.grad is not None


def test_activation_checkpointing_calls_functions_once_even_if_backward_runs_after_the_context() -> None:
    network, tokens, calls = model("modern"), ids(2, 13), []
    gradients = []
    for network.recompute in (False, True):
        network.zero_grad()
        with network.hooks({"blocks.*.resid_mid": lambda x, name: calls.append(name) or x * 1.5}):
            loss = network(tokens[:, :-1], targets=tokens[:, 1:])
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert network.recompute
    assert calls == ["blocks.0.resid_mid", "blocks.1.resid_mid"] * 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiled_blocks_share_their_code_and_run_uncompiled_while_functions_are_attached() -> None:
    network, counter, calls = model("modern"), CompileCounter(), []
    torch._dynamo.reset()
    for block in network.blocks:
        block.compile(backend=counter, dynamic=False)
    with torch.no_grad():
        plain = network(ids())
        frames = counter.frame_count
        assert frames == 1, "both blocks share one graph"
        with network.hooks({"blocks.*.attn.q": lambda x, name: calls.append(name)}), network.hooks({"embed": _keep}):
            torch.testing.assert_close(network(ids()), plain)
        assert calls == ["blocks.0.attn.q", "blocks.1.attn.q"]
        assert counter.frame_count == frames
        assert torch.equal(network(ids()), plain)
        assert counter.frame_count == frames, "the blocks must not be compiled again"
        assert all(block._compiled_call_impl is not None for block in network.blocks)
    torch._dynamo.reset()


def _shapes(network: nn.Module) -> Mapping[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}


def test_hook_points_add_nothing_to_the_state_dict_and_copies_have_no_functions() -> None:
    network = model("gpt2")
    shapes = _shapes(network)
    assert not any("hook" in name for name in shapes)
    with network.hooks({"*": lambda x, name: x * 0}):
        assert _shapes(network) == shapes
        duplicate = copy.deepcopy(network)
        assert has_functions(network)
        assert not has_functions(duplicate)
    assert torch.equal(duplicate(ids()), network(ids()))
    _, cache = duplicate.run_with_cache(ids(), ["embed"])
    assert list(cache) == ["embed"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="requires torch.distributed")
def test_functions_receive_and_replace_full_activations_in_a_sharded_model(tmp_path: Path) -> None:
    plain, sharded, tokens = model("llama"), model("llama"), ids(2, 13)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        Parallel(sharded, "fsdp")
        losses, caches = [], []
        for network in (plain, sharded):
            with network.hooks({"blocks.0.mlp.post": lambda x, name: x * 2}), network.caching() as cache:
                losses.append(network(tokens[:, :-1], targets=tokens[:, 1:]))
            losses[-1].backward()
            caches.append(cache)
        torch.testing.assert_close(losses[0], losses[1])
        torch.testing.assert_close(caches[0], caches[1])
        assert list(caches[1]) == plain.hook_names()
        for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(a.grad, full_tensor(b.grad), atol=1e-4, rtol=1e-4)
    finally:
        torch.distributed.destroy_process_group()


# Generation


@torch.inference_mode()
def test_a_decoder_created_inside_the_context_calls_the_functions_at_every_step() -> None:
    network, tokens = model("llama"), ids(2, 12)

    def steer(x: Tensor, name: str) -> Tensor:
        return x + 1

    with network.hooks({"blocks.0.resid_mid": steer}):
        expected = network(tokens)
        decoder = make_decoder(network, weights=None, compiled=None, steps=None, reporter=SILENT)
        state = decoder.new_state(2)
        prefilled = torch.stack([decoder.prefill(state, row, tokens[row, :9]) for row in range(2)])
        torch.testing.assert_close(prefilled, expected[:, 8], atol=1e-5, rtol=1e-5)
        for position in range(9, 12):
            torch.testing.assert_close(decoder.step(state, tokens[:, position]), expected[:, position], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, network(tokens))


@torch.inference_mode()
def test_functions_receive_the_activations_of_all_tokens_so_far_during_generation() -> None:
    network, tokens, lengths = model("llama"), ids(2, 12), []

    def record(x: Tensor, name: str) -> None:
        lengths.append(x.shape[1])

    with network.hooks({"blocks.*.attn.q": record, "blocks.*.resid_post": record}):
        decoder = as_decoder(network)
        assert isinstance(decoder, FullPassDecoder)
        state = decoder.new_state(2)
        for row in range(2):
            decoder.prefill(state, row, tokens[row, :9])
        decoder.step(state, tokens[:, 9])
    assert lengths == [9] * 8 + [10] * 4


@pytest.mark.parametrize("options", [{"weights": "int8"}, {"weights": "bf16"}, {"compiled": True}], ids=str)
def test_packed_or_compiled_decoding_with_functions_attached_is_rejected(options: dict[str, Any]) -> None:
    network, arguments = model(), {"weights": "fp32", "compiled": None} | options
    with network.hooks({"embed": _keep}), pytest.raises(InputError, match="uncompiled decoding with fp32 weights"):
        make_decoder(network, **arguments, steps=None, reporter=SILENT)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_decoder_with_a_kv_cache_rejects_a_network_with_functions_attached(compiled: bool) -> None:
    network = model()
    with network.hooks({"embed": _keep}), pytest.raises(ValueError, match="does not call functions at hook points"):
        Decoder(network, compiled=compiled)
