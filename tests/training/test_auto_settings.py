"""`auto` settings are chosen by measurement, and a resumed run keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from torch import nn

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


def _resolved(recipe: Recipe, reporter: Any = SILENT, **options: bool) -> Recipe:
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    network = Transformer(recipe.model, prepared.tokenizer.vocab_size)
    dataset = TokenStream(prepared.train.tokens, recipe.model.context_length, recipe.seed)
    budget = auto_settings.Budget(steps=10)
    return auto_settings.resolve(recipe, network, dataset, CausalLM(), budget, reporter, **options).recipe


def _fail_to_compile(block: nn.Module, **options: object) -> None:
    def fail(*inputs: object) -> None:
        raise RuntimeError("no compiler found")

    block._compiled_call_impl = fail


def test_every_auto_setting_is_resolved(text_file: Path) -> None:
    recipe = _resolved(tiny_recipe(text_file, "modern", "training.precision=auto", "training.micro_batch_size=auto"))
    training = recipe.training
    assert "auto" not in (training.precision, training.micro_batch_size, training.compile)
    assert training.optimizer.newton_schulz_dtype in ("fp32", "bf16")


@pytest.mark.parametrize(("fp32", "bf16", "chosen"), [(1.0, 0.5, "bf16"), (1.0, 0.97, "fp32"), (0.5, 1.0, "fp32")])
def test_bf16_is_chosen_only_if_it_is_clearly_faster_for_this_model(
    fp32: float, bf16: float, chosen: str, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_settings.precisions, "bf16_speedup", lambda device: 3.0)
    times = {"fp32": fp32, "bf16": bf16}
    monkeypatch.setattr(compilation.Trial, "seconds", lambda trial, **options: times[trial.settings.precision.name])
    recipe = tiny_recipe(text_file, "modern", "training.precision=auto")
    assert _resolved(recipe).training.precision == chosen


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


def test_a_resumed_run_keeps_its_orthogonalization(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(text_file, "modern")
    for resume, has_bf16_units in ((False, False), (True, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_bf16_units=has_bf16_units: has_bf16_units)
        train(recipe, tmp_path / "run", device="cpu", resume=resume, stop_after=0.0)
    assert Run.open(tmp_path / "run").recipe.training.optimizer.newton_schulz_dtype == "fp32"
    assert Run.open(tmp_path / "run").recipe.training.optimizer.orthogonalization == "zolotarev"
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
