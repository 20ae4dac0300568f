"""The bytes that a plan counts are those that torch saves, allocates and frees."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinylm.cost import memory
from tinylm.cost.memory import Numbers, Pass, activation_bytes, evaluation_bytes, kept_bytes, matrix_shapes, muon_bytes
from tinylm.evaluation import perplexity
from tinylm.model import functions, transformer
from tinylm.model.functions import summed_cross_entropy
from tinylm.model.objective import CausalObjective
from tinylm.model.transformer import Transformer
from tinylm.optim import groups
from tinylm.optim.muon import Muon
from tinylm.recipe.presets import PRESETS
from tinylm.recipe.schema import ModelSection, MuonOptimizer
from tinylm.training import out_of_memory

VOCABULARY, TIME, WIDTH = 61, 48, 64
DTYPES: dict[Numbers, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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
]


def section(**parts: Any) -> ModelSection:
    shape = {"n_layer": 3, "n_head": 4, "n_embd": WIDTH, "context_length": TIME}
    return ModelSection.model_validate({**shape, **parts})


class Saved:
    """Collects the storages that a forward pass saves, each once, but those of parameters and buffers."""

    def __init__(self, network: Transformer) -> None:
        self._own = {each.untyped_storage()._cdata for each in [*network.parameters(), *network.buffers()]}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def saved_bytes(model: ModelSection, sequences: int, precision: Numbers, recompute: bool) -> int:
    network = Transformer(model, VOCABULARY).train()
    network.recompute = recompute
    saved = Saved(network)
    tokens = torch.randint(VOCABULARY, (sequences, model.context_length))
    autocast = contextlib.nullcontext() if precision == "fp32" else torch.autocast("cpu", dtype=DTYPES[precision])
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor), autocast:
        network(tokens, targets=tokens)
    return saved.bytes


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_forward_pass_on_a_cpu_saves_what_is_counted(preset: str, precision: Numbers, recompute: bool) -> None:
    for parts in PARTS:
        model = section(preset=preset, **parts)
        counted = kept_bytes(model, Pass(VOCABULARY, 4, precision, recompute=recompute))
        assert counted == pytest.approx(saved_bytes(model, 4, precision, recompute), rel=0.03), parts


class _Flash(torch.autograd.Function):
    """Saves what a GPU's fused attention saves."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)  # in memory time comes before heads
        ctx.save_for_backward(q, k, v, mixed, q.new_empty(q.shape[:-1]))
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError


class _Norm(torch.autograd.Function):
    """Saves what CUDA's fused norm saves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, gain, x.new_empty(*x.shape[:-1], 1))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("preset", PRESETS)
def test_a_forward_pass_elsewhere_saves_what_is_counted(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's `meta` device, which runs the formulas of GPUs without numbers, in float32; fused kernels have stand-ins."""

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        result: Tensor = _Flash.apply(q, k, v)  # type: ignore[no-untyped-call]
        return result

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, gain, eps: _Norm.apply(x, gain))  # type: ignore[no-untyped-call]
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which does not know this device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    for parts in PARTS:
        if "n_kv_head" in parts or "dropout" in parts:  # keys are repeated, and masks are bytes, on CUDA only
            continue
        model = section(preset=preset, **parts)
        network = Transformer(model, VOCABULARY, seed=None).to("meta").train()
        saved = Saved(network)
        tokens = torch.zeros((4, TIME), dtype=torch.long, device="meta")
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            network(tokens, targets=tokens)
        counted = kept_bytes(model, Pass(VOCABULARY, 4, "fp32", on_gpu=True))
        assert counted == pytest.approx(saved.bytes, rel=0.05), parts


class Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the most bytes of results that are alive at once, told by their storages' owners."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, Any] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self._storages[storage._cdata] = (torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes())
        self._storages = {key: (owner, size) for key, (owner, size) in self._storages.items() if not owner.expired()}
        self.most = max(self.most, sum(size for _, size in self._storages.values()))
        return result


def most_alive(work: Callable[[], object]) -> int:
    with Living() as living:
        work()
    return living.most


@pytest.mark.parametrize(("preset", "precision"), [("modern", "fp32"), ("gpt2", "fp32"), ("llama", "bf16"), ("modern", "bf16")])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("vocab_size", [100, 1000])
def test_the_height_of_a_pass_is_what_is_alive_at_once(preset: str, precision: Numbers, recompute: bool, vocab_size: int) -> None:
    model = section(preset=preset, n_layer=6, context_length=128)
    network = Transformer(model, vocab_size).train()
    network.recompute = recompute
    tokens = torch.randint(vocab_size, (16, 128))

    def work() -> None:
        with contextlib.nullcontext() if precision == "fp32" else torch.autocast("cpu", dtype=DTYPES[precision]):
            loss = network(tokens, targets=tokens)
        loss.backward()

    counted = activation_bytes(model, Pass(vocab_size, 16, precision, recompute=recompute))
    assert counted == pytest.approx(most_alive(work), rel=0.15)


@pytest.mark.parametrize("cap", [None, 15.0])
@pytest.mark.parametrize("rows", [200, 1000])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_loss_holds_a_few_chunks_of_logits(
    cap: float | None, rows: int, precision: Numbers, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "_left_to_others", lambda x: on_gpu)
    monkeypatch.setitem(memory.LOSS_BYTES, "gpu", memory.LOSS_BYTES["cpu"])
    model = ModelSection.model_validate({"n_head": 1, "n_embd": 8, "context_length": rows, "logit_softcap": cap})
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(20_000, 8, requires_grad=True)
    targets = torch.randint(20_000, (rows,))
    at = Pass(20_000, 1, precision, on_gpu=on_gpu)
    kept = 4 * weight.numel() + (4 - at.s) * hidden.numel()  # the loss's own gradients, here in float32

    def work() -> None:
        with contextlib.nullcontext() if precision == "fp32" else torch.autocast("cpu", dtype=DTYPES[precision]):
            summed_cross_entropy(hidden, weight, targets, cap, memory.LOSS_ROWS)

    assert memory.loss_bytes(model, at) + kept == pytest.approx(most_alive(work), rel=0.05)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("parts", [{}, {"preset": "llama", "n_kv_head": 1}, {"ngram_embeddings": [2, 3]}])
def test_a_step_of_muon_holds_what_is_counted(parts: dict[str, Any], half: bool) -> None:
    model = section(**parts)
    network = Transformer(model, VOCABULARY)
    kind = MuonOptimizer(name="muon", newton_schulz_dtype="bf16" if half else "fp32")
    muon = groups.build(kind, network, network.stacked_matrices()).parts["muon"]
    assert isinstance(muon, Muon)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    muon.step()
    assert most_alive(muon.step) == pytest.approx(muon_bytes(model, half=half), rel=0.15)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_matrices_are_those_that_muon_is_given(preset: str) -> None:
    for parts in PARTS:
        model = section(preset=preset, **parts)
        network = Transformer(model, VOCABULARY)
        muon = groups.build(MuonOptimizer(name="muon"), network, network.stacked_matrices()).parts["muon"]
        assert isinstance(muon, Muon)
        matrices = [matrix for group in muon.param_groups for p in group["params"] for matrix in torch.split(p, muon._blocks(p))]
        shapes = [tuple(matrix.shape) for matrix in matrices]
        assert {shape: shapes.count(shape) for shape in shapes} == dict(matrix_shapes(model)), parts


@pytest.mark.parametrize(("vocab_size", "part"), [(61, 0), (4000, 1)])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("cap", [None, 15.0])
def test_an_evaluation_holds_what_is_counted(preset: str, vocab_size: int, part: int, cap: float | None) -> None:
    model = section(preset=preset, n_embd=32, context_length=64, logit_softcap=cap)
    network, objective = Transformer(model, vocab_size).eval(), CausalObjective()
    tokens = torch.randint(vocab_size, (memory.EVALUATION_TOKENS // 64, 65))

    @torch.no_grad()
    def work() -> None:
        objective.losses(network, objective.example(tokens))

    counted = evaluation_bytes(model, vocab_size)
    assert max(counted) == counted[part]
    assert max(counted) == pytest.approx(most_alive(work), rel=0.15)


def test_what_is_stated_twice_is_the_same() -> None:
    """Both sides import without the other: this one without torch."""
    assert transformer.LOSS_BYTES is memory.LOSS_BYTES
    assert memory.EVALUATION_TOKENS == perplexity.BATCH_TOKENS
    assert memory.EVALUATION_LOGITS == perplexity.BATCH_LOGITS


def test_the_allocator_is_told_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[int, int] = {}

    class Library:
        def __init__(self, name: None) -> None: ...

        def mallopt(self, name: Any, value: Any) -> int:
            told[name.value] = value.value
            return 1

    monkeypatch.setattr(out_of_memory.sys, "platform", "linux")
    monkeypatch.setattr(out_of_memory.ctypes, "CDLL", Library)
    out_of_memory.keep_freed_memory()
    assert told[out_of_memory._MMAP_THRESHOLD] == memory.MAPPED
