"""benchmarks/gpu.py runs on a CPU with tiny models and produces every row that does not need a GPU. The timings are not checked."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
TINY = ("--device", "cpu", "--tiny", "--no-compile")


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    specification = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look up annotations in sys.modules
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["gpt2-124m", "small"])
def test_every_row_has_results_or_a_reason_for_failing(name: str, gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main([*TINY, "--model", name, "--json"])
    report = json.loads(capsys.readouterr().out)
    steps = report["training"]
    assert [(row["mode"], row["variant"]) for row in steps] == [
        (mode, variant) for mode in ("fp32", "tf32", "bf16", "fp16") for variant in ("plain", "checkpointing", "4 micro-batches")
    ]
    for row in steps:
        assert row["failed"] is None
        assert row["tokens_per_second"] == pytest.approx(1e3 * report["tokens_per_step"] / row["milliseconds"])
        assert row["mfu_measured"] > 0
    assert [row["speedup_over_plain"] for row in steps[::3]] == [1.0] * 4
    assert {row["name"]: row["failed"] for row in report["optimizers"]} == {"adamw": None, "muon": None}
    assert {row["method"] for row in report["decoding"] if row["failed"] is None} == {"engine", "one step, eager"}
    assert {row["failed"] for row in report["decoding"] if "CUDA graph" in row["method"]} == {"requires CUDA"}
    evaluated = {row["mode"]: row["loss"] for row in report["evaluation"]}
    assert all(row["failed"] is None for row in report["evaluation"])
    assert evaluated["bf16"] == pytest.approx(evaluated["fp32"], rel=1e-2)


def test_the_tables_show_every_row(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main([*TINY, "--parts", "optimizers", "evaluation", "decoding"])
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.startswith(("adamw", "muon"))] == ["adamw", "muon"]
    assert sum(line.startswith(("fp32", "bf16")) for line in shown.splitlines()) == 16
    assert sum(line.startswith(("final", "during training")) for line in shown.splitlines()) == 4


def test_a_variant_that_runs_out_of_memory_is_reported_and_the_others_continue(gpu: ModuleType) -> None:
    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    cpu = torch.device("cpu")
    variants = {"large": out_of_memory, "small": lambda: None}
    times, _, failed = gpu.measure_alternately(variants, rounds=2, steps=1, warmup=1, device=cpu)
    assert failed == {"large": "out of memory"}
    assert set(times) == {"small"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="requires a machine without a CUDA GPU")
def test_without_a_gpu_the_script_exits_with_an_error(gpu: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        gpu.main([])
