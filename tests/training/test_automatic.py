"""What `auto` comes to, and that a resumed training keeps what was decided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from torch import nn

from tinylm.data.batches import Batches
from tinylm.data.prepare import prepare
from tinylm.errors import WorkError
from tinylm.model.transformer import Transformer
from tinylm.optim import groups
from tinylm.pipeline import train
from tinylm.recipe import Recipe, load
from tinylm.reporting import SILENT, CollectingReporter
from tinylm.run import Run
from tinylm.training import automatic, compilation


def _decided(recipe: Recipe, reporter: Any = SILENT, **options: bool) -> Recipe:
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    network = Transformer(recipe.model, prepared.tokenizer.vocab_size)
    batches = Batches(prepared.train.tokens, recipe.model.context_length, recipe.seed)
    return automatic.decide(recipe, network, batches, 10, reporter, **options).recipe


def _broken(block: nn.Module, **options: object) -> None:
    def fail(*inputs: object) -> None:
        raise RuntimeError("no compiler here")

    block._compiled_call_impl = fail


def test_nothing_is_left_to_auto(text_file: Path) -> None:
    recipe = _decided(tiny_recipe(text_file, "modern", "training.precision=auto", "training.micro_batch_size=auto"))
    training = recipe.training
    assert "auto" not in (training.precision, training.micro_batch_size, training.compile)
    assert training.optimizer.newton_schulz_dtype in ("fp32", "bf16")


@pytest.mark.parametrize(("fp32", "bf16", "chosen"), [(1.0, 0.5, "bf16"), (1.0, 0.97, "fp32"), (0.5, 1.0, "fp32")])
def test_a_cpu_with_fast_bfloat16_takes_what_is_clearly_faster_for_this_model(
    fp32: float, bf16: float, chosen: str, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic.precisions, "_bf16_speed_up", lambda device: 3.0)
    times = {"fp32": fp32, "bf16": bf16}
    monkeypatch.setattr(compilation.Trial, "seconds", lambda trial, repeat=2: times[trial._precision.name])
    recipe = tiny_recipe(text_file, "modern", "training.precision=auto")
    assert _decided(recipe).training.precision == chosen


def test_memory_that_runs_out_in_compiled_blocks_is_left_to_the_trainer(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that are compiled train four sequences at most."""

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


def test_a_resumed_training_goes_on_uncompiled_where_compiling_fails_now(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", _broken)
    recipe, reporter = tiny_recipe(text_file, "modern", "training.compile=on"), CollectingReporter()
    with pytest.raises(WorkError, match="cannot be compiled here: no compiler here"):
        _decided(recipe, reporter)
    assert _decided(recipe, reporter, resumed=True).training.compile is False
    assert "going on without" in reporter.warnings[0]


def test_a_resumed_training_orthogonalises_as_it_began(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(text_file, "modern")
    for units, folder in ((False, "first"), (True, "first")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda units=units: units)
        train(recipe, tmp_path / folder, device="cpu", resume=(tmp_path / folder).exists(), stop_after=0.0)
    assert Run.open(tmp_path / "first").recipe.training.optimizer.newton_schulz_dtype == "fp32"
    assert load(tmp_path / "first" / "recipe.yaml", check_files=False).training.optimizer.newton_schulz_dtype == "fp32"
    assert groups.orthogonalisation_type(recipe.training.optimizer, torch.device("cpu")) == "bf16"


def test_as_many_threads_as_are_fastest_are_used(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(compilation.Trial, "seconds", lambda trial: {8: 3.0, 4: 2.0, 2: 1.95, 1: 1.0}[used[-1]])
    recipe = tiny_recipe(text_file, "modern")
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    batches = Batches(prepared.train.tokens, recipe.model.context_length, recipe.seed)
    assert automatic.use_fastest_threads(recipe, prepared.tokenizer.vocab_size, batches) == 4
    assert used[-1] == 4
