"""Test that the estimated bytes match the tensors that torch saves, allocates and frees."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peaks import DTYPES, peak_bytes
from tiny import causal_batch
from torch import Tensor

from tinylm.cost import memory
from tinylm.cost.memory import PassConfig, activation_bytes, evaluation_bytes, matrix_shapes, muon_bytes, saved_bytes
from tinylm.evaluation import perplexity
from tinylm.model import functions, fused_attention, transformer
from tinylm.model.functions import summed_cross_entropy
from tinylm.model.transformer import Transformer
from tinylm.optim import groups
from tinylm.optim.muon import Muon
from tinylm.recipe.presets import DECODER_PRESETS
from tinylm.recipe.schema import DecoderSection, MuonOptimizer
from tinylm.recipe.values import ComputeDtype
from tinylm.training import out_of_memory
from tinylm.training.objectives import CausalLM

VOCAB_SIZE, TIME, WIDTH = 61, 48, 64
PARTS: list[dict[str, Any]] = [
    {},
    {"norm": "layernorm"},
    {"norm": "rmsnorm"},
    {"norm_position": "post"},
    {"norm_position": "post", "parallel_residual": True},
    {"parallel_residual": True},
    {"position": "learned"},
    {"position": "sinusoidal"},
    {"position": "none"},
    {"position": "rope"},
    {"feed_forward": "gelu"},
    {"feed_forward": "relu"},
    {"feed_forward": "relu2"},
    {"feed_forward": "swiglu", "feed_forward_multiple": 2.7},
    {"bias": True},
    {"tie_embeddings": True},
    {"tie_embeddings": False},
    {"qk_norm": True},
    {"qk_norm": False},
    {"qk_norm": True, "qk_gain": False},
    {"qk_norm": True, "qk_gain": False, "position": "none"},
    {"embedding_norm": True, "norm": "layernorm", "bias": True},
    {"n_kv_head": 1},
    {"norm_gain": False},
    {"norm_gain": False, "norm": "layernorm"},
    {"ngram_embeddings": [2, 3], "ngram_rows": 50},
    {"ngram_embeddings": [2], "ngram_dropout": 0.5},
    {"value_embeddings": 1},
    {"value_embeddings": 3, "n_kv_head": 2},
    {"value_residual": True},
    {"value_residual": True, "value_embeddings": 1},
    {"embedding_shortcut": True},
    {"dropout": 0.1},
    {"dropout": 0.1, "value_residual": True},
    {"logit_softcap": 15.0},
    {"shifted_key_heads": 2},
    {"shifted_key_heads": 1, "n_kv_head": 2, "qk_norm": False, "position": "learned"},
]


def section(**parts: Any) -> DecoderSection:
    shape = {"n_layer": 3, "n_head": 4, "n_embd": WIDTH, "context_length": TIME}
    return DecoderSection.model_validate({**shape, **parts})


class Saved:
    """Collects the storages that a forward pass saves for the backward pass, except those of parameters and buffers."""

    def __init__(self, network: Transformer) -> None:
        self._own = {tensor.untyped_storage()._cdata for tensor in [*network.parameters(), *network.buffers()]}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def measured_bytes(
    model: DecoderSection, sequences: int, precision: ComputeDtype, recompute: bool, segments: Tensor | None = None
) -> int:
    network = Transformer(model, VOCAB_SIZE).train()
    network.recompute = recompute
    saved = Saved(network)
    tokens = torch.randint(VOCAB_SIZE, (sequences, model.context_length))
    autocast = contextlib.nullcontext() if precision == "fp32" else torch.autocast("cpu", dtype=DTYPES[precision])
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor), autocast:
        network(tokens, targets=tokens, segments=segments)
    return saved.bytes


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("preset", "precision"),
    # Float16 saves the same tensors as bfloat16. It is slow on a CPU, so one preset has to do.
    [*((preset, precision) for preset in DECODER_PRESETS for precision in ("fp32", "bf16")), ("modern", "fp16")],
)
def test_saved_bytes_match_a_forward_pass_on_a_cpu(preset: str, precision: ComputeDtype, recompute: bool) -> None:
    for parts in PARTS:
        model = section(preset=preset, **parts)
        counted = saved_bytes(model, PassConfig(VOCAB_SIZE, 4, precision, recompute=recompute))
        assert counted == pytest.approx(measured_bytes(model, 4, precision, recompute), rel=0.03), parts


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", DECODER_PRESETS)
def test_saved_bytes_include_the_document_mask(preset: str, precision: ComputeDtype, recompute: bool) -> None:
    for parts in ({}, {"dropout": 0.1}, {"position": "sinusoidal"}):
        model = section(preset=preset, **parts)
        segments = (torch.arange(TIME) // 10).expand(4, -1).contiguous()
        masked = saved_bytes(model, PassConfig(VOCAB_SIZE, 4, precision, recompute=recompute, document_mask=True))
        plain = saved_bytes(model, PassConfig(VOCAB_SIZE, 4, precision, recompute=recompute))
        measured = measured_bytes(model, 4, precision, recompute, segments) - measured_bytes(model, 4, precision, recompute)
        assert masked - plain == measured, parts


class _Flash(torch.autograd.Function):
    """Saves the same tensors as fused attention on a GPU."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)  # in memory, time comes before heads
        ctx.save_for_backward(q, k, v, mixed, q.new_empty(q.shape[:-1]))
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError


class _Norm(torch.autograd.Function):
    """Saves the same tensors as the fused norm on CUDA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, gain, x.new_empty(*x.shape[:-1], 1))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("preset", DECODER_PRESETS)
def test_saved_bytes_match_a_forward_pass_on_a_gpu(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, torch's `meta` device follows the same code paths as a GPU, but without data. Stubs replace fused kernels."""

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        result: Tensor = _Flash.apply(q, k, v)  # type: ignore[no-untyped-call]
        return result

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, gain, eps: _Norm.apply(x, gain))  # type: ignore[no-untyped-call]
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # autocast does not support the meta device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    for parts in PARTS:
        if "n_kv_head" in parts or "dropout" in parts:  # the meta device does not repeat keys or use one-byte masks
            continue
        model = section(preset=preset, **parts)
        network = Transformer(model, VOCAB_SIZE, seed=None).to("meta").train()
        saved = Saved(network)
        tokens = torch.zeros((4, TIME), dtype=torch.long, device="meta")
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            network(tokens, targets=tokens)
        counted = saved_bytes(model, PassConfig(VOCAB_SIZE, 4, "fp32", on_gpu=True))
        assert counted == pytest.approx(saved.bytes, rel=0.05), parts


@pytest.mark.parametrize(
    ("preset", "precision", "recompute", "vocab_size"),
    [
        ("modern", "fp32", False, 100),
        ("modern", "fp32", True, 1000),
        ("gpt2", "fp32", False, 1000),
        ("gpt2", "fp32", True, 100),
        ("llama", "bf16", False, 100),
        ("llama", "bf16", True, 1000),
        ("modern", "bf16", False, 1000),
        ("modern", "bf16", True, 100),
    ],
)
def test_activation_bytes_match_the_peak_of_a_forward_and_backward_pass(
    preset: str, precision: ComputeDtype, recompute: bool, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = section(preset=preset, n_layer=6, context_length=128)
    network = Transformer(model, vocab_size).train()
    network.recompute = recompute
    tokens = torch.randint(vocab_size, (16, 128))

    def work() -> None:
        with contextlib.nullcontext() if precision == "fp32" else torch.autocast("cpu", dtype=DTYPES[precision]):
            loss = network(tokens, targets=tokens)
        loss.backward()

    # LiveBytes does not see the tensors inside a custom operator, so call the function without it.
    monkeypatch.setattr(fused_attention, "_attention_gradients", fused_attention._compute_gradients)
    counted = activation_bytes(model, PassConfig(vocab_size, 16, precision, recompute=recompute))
    assert counted == pytest.approx(peak_bytes(work), rel=0.15)


@pytest.mark.parametrize("cap", [None, 15.0])
@pytest.mark.parametrize("rows", [200, 1000])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_loss_bytes_match_the_peak_of_the_loss(
    cap: float | None, rows: int, precision: ComputeDtype, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "prefers_composite_ops", lambda x: on_gpu)
    monkeypatch.setitem(memory.LOSS_BYTES, "gpu", memory.LOSS_BYTES["cpu"])
    model = DecoderSection.model_validate({"n_head": 1, "n_embd": 8, "context_length": rows, "logit_softcap": cap})
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(20_000, 8, requires_grad=True)
    targets = torch.randint(20_000, (rows,))
    config = PassConfig(20_000, 1, precision, on_gpu=on_gpu)
    gradients = 4 * weight.numel() + (4 - config.s) * hidden.numel()  # computed by the loss, in float32

    def work() -> None:
        with contextlib.nullcontext() if precision == "fp32" else torch.autocast("cpu", dtype=DTYPES[precision]):
            summed_cross_entropy(hidden, weight, targets, cap, memory.LOSS_ROWS)

    assert memory.loss_bytes(model, config) + gradients == pytest.approx(peak_bytes(work), rel=0.05)


@pytest.mark.parametrize(
    ("rows", "vocab_size", "chunk"),
    [
        (65_536, 50_304, 8_192),  # 1.5 GiB in float32; 8 equal chunks
        (16_384, 50_304, 4_096),  # a quarter of the micro-batch
        (8_192, 50_304, 2_048),  # no larger than a chunk of the uncompiled loss
        (12_345, 50_304, 3_072),  # no multiple of 128 divides the micro-batch
        (65_536, 256_000, 2_048),
        (640, 10_000_000, 512),  # the smallest chunk
    ],
)
def test_chunks_of_the_compiled_loss_are_large_and_equal(rows: int, vocab_size: int, chunk: int) -> None:
    plain = memory.loss_chunk_rows(vocab_size, on_gpu=True)
    assert memory.fused_loss_rows(rows, vocab_size, plain) == chunk


@pytest.mark.parametrize(("precision", "per_logit"), [("bf16", 4), ("fp32", 8)])
def test_the_compiled_loss_needs_memory_for_a_chunk_of_logits_and_its_gradient(precision: ComputeDtype, per_logit: int) -> None:
    model = section(n_embd=64, context_length=1024)
    config = PassConfig(50_304, 64, precision, on_gpu=True)
    head = 2 * 2 * 50_304 * 64 if precision == "bf16" else 0
    states = 65_536 * 64 * config.s
    assert memory.loss_bytes(model, config) == states + head + 8_192 * 50_304 * per_logit


@pytest.mark.parametrize(
    "settings",
    [
        {"newton_schulz_dtype": "bf16"},
        {"newton_schulz_dtype": "fp32"},
        {"orthogonalization": "rational"},
        {"orthogonalization": "rational", "cautious_weight_decay": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("parts", [{}, {"preset": "llama", "n_kv_head": 1}, {"ngram_embeddings": [2, 3]}])
def test_muon_bytes_match_the_peak_of_a_muon_step(parts: dict[str, Any], settings: dict[str, str]) -> None:
    model = section(**parts)
    network = Transformer(model, VOCAB_SIZE)
    optimizer = MuonOptimizer.model_validate({"name": "muon", **settings})
    muon = groups.build(optimizer, network).parts["muon"]
    assert isinstance(muon, Muon)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    muon.step()
    assert peak_bytes(muon.step) == pytest.approx(muon_bytes(matrix_shapes(model), optimizer), rel=0.15)


@pytest.mark.parametrize("preset", DECODER_PRESETS)
def test_matrix_shapes_match_the_matrices_that_muon_updates(preset: str) -> None:
    for parts in PARTS:
        model = section(preset=preset, **parts)
        network = Transformer(model, VOCAB_SIZE)
        muon = groups.build(MuonOptimizer(name="muon"), network).parts["muon"]
        assert isinstance(muon, Muon)
        stacked = network.stacked_matrices()
        rows = {id(p): stacked.get(name, (len(p),)) for name, p in network.named_parameters()}
        parameters = [p for group in muon.param_groups for p in group["params"]]
        shapes = [tuple(matrix.shape) for p in parameters for matrix in torch.split(p, rows[id(p)])]
        assert {shape: shapes.count(shape) for shape in shapes} == dict(matrix_shapes(model)), parts


@pytest.mark.parametrize(("vocab_size", "part"), [(61, 0), (4000, 1)])
@pytest.mark.parametrize("preset", DECODER_PRESETS)
@pytest.mark.parametrize("cap", [None, 15.0])
def test_evaluation_bytes_match_the_peak_of_an_evaluation(preset: str, vocab_size: int, part: int, cap: float | None) -> None:
    model = section(preset=preset, n_embd=32, context_length=64, logit_softcap=cap)
    network, objective = Transformer(model, vocab_size).eval(), CausalLM()
    tokens = torch.randint(vocab_size, (memory.EVALUATION_BATCH_TOKENS // 64, 65))

    @torch.no_grad()
    def work() -> None:
        objective.losses(network, causal_batch(tokens))

    counted = evaluation_bytes(model, vocab_size)
    assert max(counted) == counted[part]
    assert max(counted) == pytest.approx(peak_bytes(work), rel=0.15)


def test_the_model_and_the_evaluation_use_the_batch_sizes_that_the_estimate_assumes() -> None:
    assert transformer.loss_chunk_rows is memory.loss_chunk_rows
    assert perplexity.EVALUATION_BATCH_TOKENS is memory.EVALUATION_BATCH_TOKENS
    assert perplexity.EVALUATION_BATCH_LOGITS is memory.EVALUATION_BATCH_LOGITS


@pytest.mark.parametrize("free_gib", [0.1, 1.5, 12, 120])
def test_an_evaluation_batch_on_a_gpu_fits_into_a_quarter_of_the_free_memory(free_gib: float) -> None:
    free = int(free_gib * 2**30)
    tokens, logits = memory.gpu_evaluation_batch(768, free)
    assert 4 * 32 * 768 * tokens <= free // 4
    assert 12 * logits <= free // 4 or logits == memory.EVALUATION_BATCH_LOGITS
    assert tokens <= memory.GPU_EVALUATION_TOKENS
    assert logits <= memory.GPU_EVALUATION_LOGITS


def test_the_mmap_threshold_matches_the_allocator_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[int, int] = {}

    class Library:
        def __init__(self, name: None) -> None: ...

        def mallopt(self, name: Any, value: Any) -> int:
            settings[name.value] = value.value
            return 1

    monkeypatch.setattr(out_of_memory.sys, "platform", "linux")
    monkeypatch.setattr(out_of_memory.ctypes, "CDLL", Library)
    out_of_memory.keep_freed_memory()
    # M_MMAP_THRESHOLD is -3, see mallopt(3).
    assert settings[-3] == memory.MMAP_THRESHOLD
