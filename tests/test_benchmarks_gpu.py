"""benchmarks/gpu.py on a CPU and at a size of no use: every row that needs no GPU comes out. No time is asserted."""

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
    sys.modules[specification.name] = module  # data classes look there for the names in their annotations
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["gpt2-124m", "small"])
def test_every_row_comes_out_or_says_why_not(name: str, gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main([*TINY, "--model", name, "--json"])
    found = json.loads(capsys.readouterr().out)
    steps = found["training"]
    assert [(row["mode"], row["side"]) for row in steps] == [
        (mode, side) for mode in ("fp32", "tf32", "bf16", "fp16") for side in ("plain", "checkpointing", "4 micro-batches")
    ]
    for row in steps:
        assert row["failed"] is None
        assert row["tokens_per_second"] == pytest.approx(1e3 * found["tokens_per_step"] / row["milliseconds"])
        assert row["mfu_measured"] > 0
    assert [row["speed_of_plain"] for row in steps[::3]] == [1.0] * 4
    assert {row["name"]: row["failed"] for row in found["optimizers"]} == {"adamw": None, "muon": None}
    assert {row["what"] for row in found["decoding"] if row["failed"] is None} == {"engine", "one step, eager"}
    assert {row["failed"] for row in found["decoding"] if row["what"] == "one step, CUDA graph"} == {"needs CUDA"}


def test_the_tables_show_every_row(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main([*TINY, "--parts", "optimizers", "decoding"])
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.startswith(("adamw", "muon"))] == ["adamw", "muon"]
    assert sum(line.startswith(("fp32", "bf16")) for line in shown.splitlines()) == 16


def test_a_side_that_runs_out_of_memory_says_so_and_the_others_go_on(gpu: ModuleType) -> None:
    def hungry() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    cpu = torch.device("cpu")
    times, _, failed = gpu.in_turn({"hungry": hungry, "modest": lambda: None}, rounds=2, steps=1, warm_up=1, device=cpu)
    assert failed == {"hungry": "out of memory"}
    assert set(times) == {"modest"}


def test_every_data_sheet_that_a_name_leads_to_exists(gpu: ModuleType) -> None:
    for sheet in gpu.SHEETS.values():
        assert gpu.find(sheet).name == sheet


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_without_a_gpu_it_says_so(gpu: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        gpu.main([])
