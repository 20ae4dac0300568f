"""What only a CUDA GPU can show: half precision near fp32, resuming to the same bits, steps that never wait for the device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe
from tiny import model

from tinylm.evaluation.measure import measure
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.optim.muon import orthogonalise
from tinylm.pipeline import train
from tinylm.recipe import Recipe
from tinylm.run import Run
from tinylm.training import trainer as room
from tinylm.training.metrics import Observer, StepEvent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CUDA = torch.device("cuda")


@pytest.fixture
def _exact() -> Iterator[None]:
    """Float32 products without TF32's shorter mantissa."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def _recipe(text: Path, *overrides: str) -> Recipe:
    return tiny_recipe(text, "modern", "training.steps=30", *overrides)


def _losses(folder: Path) -> list[float]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.mark.usefixtures("_exact")
@pytest.mark.parametrize("preset", ["modern", "gpt2", "llama"])
def test_logits_on_the_gpu_are_those_on_the_cpu(preset: str) -> None:
    tokens = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
    network = model(preset)
    expected = network(tokens)
    torch.testing.assert_close(network.to(CUDA)(tokens.to(CUDA)).cpu(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_as_fp32_does(precision: str, text_file: Path, tmp_path: Path) -> None:
    for name in ("fp32", precision):
        train(_recipe(text_file, f"training.precision={name}"), tmp_path / name, device="cuda")
    assert _losses(tmp_path / precision) == pytest.approx(_losses(tmp_path / "fp32"), rel=0.03)


def test_the_gpu_learns_as_the_cpu_does(text_file: Path, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        train(_recipe(text_file), tmp_path / device, device=device)
    assert _losses(tmp_path / "cuda") == pytest.approx(_losses(tmp_path / "cpu"), rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stopping_and_resuming_continues_the_training(precision: str, text_file: Path, tmp_path: Path) -> None:
    """Near, not to the bit: some CUDA kernels add in an order of their own."""
    recipe = _recipe(text_file, f"training.precision={precision}", "model.dropout=0.1")
    train(recipe, tmp_path / "whole", device="cuda")
    result = train(recipe, tmp_path / "run", device="cuda", stop_after=0.0)
    while result.stopped != "done":
        result = train(recipe, tmp_path / "run", device="cuda", resume=True, stop_after=0.0)
    assert _losses(tmp_path / "run") == pytest.approx(_losses(tmp_path / "whole"), rel=1e-3)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_is_not_logged_never_waits_for_the_device(
    precision: str, optimizer: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA itself raises when something synchronises. The first two steps may: they allocate and choose kernels."""
    step, taken = room.Trainer._step, []

    def strictly(trainer: room.Trainer) -> tuple[torch.Tensor, torch.Tensor]:
        taken.append(trainer.progress.step)
        torch.cuda.set_sync_debug_mode("error" if len(taken) > 2 else "default")
        try:
            return step(trainer)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(room.Trainer, "_step", strictly)
    logged: list[int] = []

    class Ear(Observer):
        def step(self, event: StepEvent) -> None:
            logged.append(event.step)

    options = ("training.log_every=10", f"training.precision={precision}", f"training.optimizer={optimizer}", "model.dropout=0.1")
    train(
        _recipe(text_file, *options, "checkpoint.every=30", "evaluation.every=30"), tmp_path / "run", device="cuda", observer=Ear()
    )
    assert logged == [1, 10, 20, 30]
    assert taken == list(range(30))


def test_muon_in_bfloat16_is_near_muon_in_float32() -> None:
    matrices = torch.randn(3, 48, 96, generator=torch.Generator().manual_seed(0))
    rough = orthogonalise(matrices.to(CUDA).bfloat16(), 5).float().cpu()
    exact = orthogonalise(matrices, 5)
    assert (rough - exact).norm() < 0.05 * exact.norm()


def test_a_run_trained_here_samples_and_measures_on_either_device(text_file: Path, tmp_path: Path) -> None:
    train(_recipe(text_file), tmp_path / "run", device="cuda")
    run = Run.open(tmp_path / "run")
    on = {device: measure(run, device=device).perplexity for device in ("cpu", "cuda")}
    assert on["cuda"].loss == pytest.approx(on["cpu"].loss, rel=1e-3)
    network = run.network(run.checkpoint(), CUDA)
    samples = generate(network, run.tokenizer, "The", SamplingOptions(max_new_tokens=80), count=3)
    assert all(len(sample.token_ids) <= 80 for sample in samples)


def test_auto_decides_a_precision_and_a_micro_batch_for_the_gpu(text_file: Path, tmp_path: Path) -> None:
    recipe = _recipe(text_file, "training.precision=auto", "training.micro_batch_size=auto")
    result = train(recipe, tmp_path / "run", device="auto")
    assert result.device.startswith("cuda")
    assert result.precision in ("bf16", "fp16")
    assert Run.open(tmp_path / "run").recipe.training.micro_batch_size == 8
