"""`auto` settings are chosen by measurement, and a resumed run keeps them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from tiny import ids, model
from torch import nn

from tinylm.cost import step_time
from tinylm.data.datasets import TokenStream
from tinylm.data.prepare import prepare
from tinylm.errors import WorkError
from tinylm.model.transformer import Transformer
from tinylm.optim import groups
from tinylm.pipeline import train
from tinylm.recipe import Recipe, load
from tinylm.reporting import SILENT, CollectingReporter
from tinylm.run import Run
from tinylm.training import auto_settings, compilation
from tinylm.training.objectives import CausalLM


def _resolved(recipe: Recipe, reporter: Any = SILENT, *, network: Any = Transformer, **options: bool) -> Recipe:
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    network = network(recipe.model, prepared.tokenizer.vocab_size)
    dataset = TokenStream(prepared.train.tokens, recipe.model.context_length, recipe.seed)
    budget = auto_settings.Budget(steps=10)
    return auto_settings.resolve(recipe, network, dataset, CausalLM(), budget, reporter, **options).recipe


def _fail_to_compile(block: nn.Module, **options: object) -> None:
    def fail(*inputs: object, **options: object) -> None:
        raise RuntimeError("no compiler found")

    block._compiled_call_impl = fail


def test_every_auto_setting_is_resolved(text_file: Path) -> None:
    recipe = _resolved(tiny_recipe(text_file, "modern", "training.precision=auto", "training.micro_batch_size=auto"))
    training = recipe.training
    assert "auto" not in (training.precision, training.micro_batch_size, training.compile)
    assert training.optimizer.newton_schulz_dtype in ("fp32", "bf16")


@pytest.mark.parametrize("micro_batch", ["2", "auto"])
@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen", "rounds"),
    [(1.0, 0.4, "bf16", 1), (1.0, 0.6, "bf16", 2), (1.0, 0.97, "fp32", 2), (0.4, 1.0, "fp32", 1)],
)
def test_bf16_is_chosen_only_if_it_is_clearly_faster_for_this_model(
    fp32: float, bf16: float, chosen: str, rounds: int, micro_batch: str, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_settings.precisions, "bf16_speedup", lambda device: 3.0)
    times = {"fp32": fp32, "bf16": bf16}
    trials: list[str] = []

    def run(trial: compilation.Trial) -> float:
        trials.append(trial.settings.precision.name)
        return times[trials[-1]]

    monkeypatch.setattr(compilation.Trial, "run", run)
    options = ("training.precision=auto", f"training.micro_batch_size={micro_batch}", "training.compile=off")
    assert _resolved(tiny_recipe(text_file, "modern", *options)).training.precision == chosen
    warm_up = ["bf16", "fp32"] if micro_batch == "auto" else ["fp32", "bf16"]
    assert trials == warm_up + ["fp32", "bf16"] * rounds


def test_training_continues_with_smaller_micro_batches_if_compiled_blocks_run_out_of_memory(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulated compiled blocks run out of memory if a micro-batch has more than four sequences."""

    def compiled(block: nn.Module, **options: object) -> None:
        def call(x: torch.Tensor, *inputs: Any, **more: Any) -> Any:
            if len(x) > 4 and torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return block.forward(x, *inputs, **more)

        block._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", compiled)
    settings = ("training.compile=on", "training.global_batch_size=8", "training.micro_batch_size=8", "training.steps=3")
    reporter = CollectingReporter()
    result = train(tiny_recipe(text_file, "modern", *settings), tmp_path / "run", device="cpu", reporter=reporter)
    assert result.step == 3
    assert any("does not fit into memory" in note for note in reporter.notes)


def test_a_resumed_run_continues_uncompiled_if_compilation_fails(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", _fail_to_compile)
    recipe, reporter = tiny_recipe(text_file, "modern", "training.compile=on"), CollectingReporter()
    with pytest.raises(WorkError, match="cannot be compiled: no compiler found"):
        _resolved(recipe, reporter)
    assert _resolved(recipe, reporter, resumed=True).training.compile is False
    assert "continues without compiling" in reporter.warnings[0]


def _call_uncompiled(module: nn.Module, **options: object) -> None:
    """Replace `nn.Module.compile`."""
    module._compiled_call_impl = module.forward


@pytest.mark.parametrize(("seconds_together", "chosen"), [(0.5, "model"), (0.99, True)])
def test_auto_compiles_all_blocks_together_if_that_is_clearly_faster(
    seconds_together: float, chosen: str | bool, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, networks = tiny_recipe(text_file, "modern"), []

    def seconds(trial: compilation.Trial, **options: object) -> float:
        [network] = networks
        return seconds_together if network.blocks._compiled_call_impl is not None else 1.0

    def build(*arguments: Any) -> Transformer:
        networks.append(Transformer(*arguments))
        return networks[0]

    monkeypatch.setattr(nn.Module, "compile", _call_uncompiled)
    monkeypatch.setattr(compilation.Trial, "seconds", seconds)
    monkeypatch.setattr(compilation, "available_compiler", lambda device: "g++")
    monkeypatch.setattr(step_time, "compilation_pays_off", lambda *_: True)
    monkeypatch.setattr(step_time, "COMPILED_TOGETHER", {"cpu": (0.04, 0.1)})
    assert _resolved(recipe, network=build).training.compile == chosen
    [network] = networks
    assert (network.blocks._compiled_call_impl is not None) == (chosen == "model")
    assert {block._compiled_call_impl is not None for block in network.blocks} == {chosen is True}


@pytest.mark.parametrize(
    ("mode", "strategy", "note"),
    [("model", "fsdp", "FSDP gathers the weights of one block at a time"), ("graph", "none", "it requires a CUDA GPU")],
)
def test_each_block_is_compiled_with_a_note_if_another_mode_is_not_supported(
    mode: str, strategy: str, note: str, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", _call_uncompiled)
    monkeypatch.setattr(auto_settings.parallel, "resolve", lambda *_: strategy)
    reporter = CollectingReporter()
    assert _resolved(tiny_recipe(text_file, "modern", f"training.compile={mode}"), reporter).training.compile is True
    assert note in str(reporter.notes)


@pytest.mark.parametrize("steps", [10, 10_000])
def test_compiling_together_is_tried_only_in_long_runs_on_a_gpu(steps: int) -> None:
    assert "cpu" not in step_time.COMPILED_TOGETHER
    assert step_time.compiling_together_may_pay_off(1.0, None, steps, "cuda") == (steps == 10_000)
    assert not step_time.compiling_together_may_pay_off(1.0, 600.0, steps, "cuda")


def test_compiled_blocks_are_kept_after_a_warning_if_they_cannot_be_compiled_together(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_blocks_only(module: nn.Module, **options: object) -> None:
        (_fail_to_compile if isinstance(module, nn.ModuleList) else _call_uncompiled)(module)

    monkeypatch.setattr(nn.Module, "compile", compile_blocks_only)
    monkeypatch.setattr(compilation, "available_compiler", lambda device: "g++")
    monkeypatch.setattr(step_time, "compilation_pays_off", lambda *_: True)
    monkeypatch.setattr(step_time, "COMPILED_TOGETHER", {"cpu": (0.04, 0.0)})
    reporter = CollectingReporter()
    assert _resolved(tiny_recipe(text_file, "modern"), reporter).training.compile is True
    assert "the blocks cannot be compiled (no compiler found); training continues without compiling them together" in str(
        reporter.warnings
    )


def test_blocks_that_are_compiled_together_compute_the_same_gradients(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchDynamo captures all blocks as one graph. The "eager" backend then runs the graph without generating code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    tokens, gradients, counters = ids(2, 13), [], torch._dynamo.utils.counters
    counters.clear()
    for together in (False, True):
        network = model("modern", value_residual=True).train()
        if together:
            network.blocks.compile(dynamic=False)
        network(tokens[:, :-1], targets=tokens[:, 1:]).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    assert counters["stats"]["unique_graphs"] == 1
    assert network.compile_stacks() == [network.blocks]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


def test_a_resumed_run_keeps_its_orthogonalization(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(text_file, "modern")
    for resume, has_bf16_units in ((False, False), (True, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_bf16_units=has_bf16_units: has_bf16_units)
        train(recipe, tmp_path / "run", device="cpu", resume=resume, stop_after=0.0)
    assert Run.open(tmp_path / "run").recipe.training.optimizer.newton_schulz_dtype == "fp32"
    assert Run.open(tmp_path / "run").recipe.training.optimizer.orthogonalization == "rational"
    assert load(tmp_path / "run" / "recipe.yaml", check_files=False).training.optimizer.newton_schulz_dtype == "fp32"
    assert groups.resolve_muon(recipe.training.optimizer, torch.device("cpu")).newton_schulz_dtype == "bf16"


def test_the_fastest_number_of_threads_is_used(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(compilation.Trial, "seconds", lambda trial: {8: 3.0, 4: 2.0, 2: 1.95, 1: 1.0}[threads[-1]])
    recipe = tiny_recipe(text_file, "modern")
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    dataset = TokenStream(prepared.train.tokens, recipe.model.context_length, recipe.seed)
    assert auto_settings.use_fastest_threads(recipe, prepared.tokenizer.vocab_size, dataset, CausalLM()) == 4
    assert threads[-1] == 4
