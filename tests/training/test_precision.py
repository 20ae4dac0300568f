"""Autocast, loss scaling, the `auto` precision, and the measured peak FLOP/s."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tinylm.reporting import CollectingReporter
from tinylm.training import precision
from tinylm.training.precision import Precision, measure_peak_flops, resolve

CPU = torch.device("cpu")


@pytest.mark.parametrize(("speedup", "expected"), [(0.01, "fp32"), (0.7, "bf16"), (3.0, "bf16")])
def test_auto_tries_bf16_on_a_cpu_unless_it_is_much_slower(speedup: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_speedup", lambda device: speedup)
    assert resolve("auto", CPU, CollectingReporter()).name == expected


def test_slow_bf16_is_used_with_a_warning_if_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_speedup", lambda device: 0.02)
    reporter = CollectingReporter()
    assert resolve("bf16", CPU, reporter).name == "bf16"
    assert "50 times slower" in reporter.warnings[0]


def test_the_measured_speedup_is_positive() -> None:
    assert precision.bf16_speedup(CPU) > 0


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_computes_matmuls_in_its_dtype(name: str, dtype: torch.dtype) -> None:
    with Precision(name, CPU).autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(("clock", "resolution"), [("thread_time", 1e-9), ("perf_counter", 0.016)])
def test_the_peak_is_the_flops_of_a_matmul_divided_by_its_shortest_time(
    clock: str, resolution: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 1024 x 1024 matmul needs 2 x 1024^3 FLOPs. The shortest of the six simulated times is 0.125 seconds."""
    times = iter([0.0, 0.25, 10.0, 10.125, 20.0, 20.5, 30.0, 30.375, 40.0, 40.25, 50.0, 50.25])
    monkeypatch.setattr(time, "get_clock_info", lambda name: SimpleNamespace(resolution=resolution))
    monkeypatch.setattr(time, clock, lambda: next(times))
    assert measure_peak_flops(Precision("fp32", CPU)) == 2 * 1024**3 / 0.125


def test_a_slow_matmul_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 2.0])
    monkeypatch.setattr(time, "get_clock_info", lambda name: SimpleNamespace(resolution=0.016))
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    assert measure_peak_flops(Precision("fp32", CPU)) == 2 * 1024**3 / 2.0


@pytest.mark.parametrize(("small", "large", "peak"), [(0.02, 0.05, 2 * 2048**3 / 0.05), (0.02, 0.5, 2 * 1024**3 / 0.02)])
def test_the_peak_is_the_higher_rate_of_a_small_and_a_large_matmul(
    small: float, large: float, peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "matmul_seconds", lambda width, precision: {1024: small, 2048: large}[width])
    assert measure_peak_flops(Precision("bf16", CPU)) == peak


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_peak_is_measured_in_the_requested_precision(name: str) -> None:
    dtypes = set()

    class RecordMatmulDtypes(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(function, "__name__", "") in ("matmul", "__matmul__"):
                dtypes.add(args[0].dtype)
            return function(*args, **(kwargs or {}))

    with RecordMatmulDtypes():
        assert measure_peak_flops(Precision(name, CPU)) > 1e8
    assert dtypes == {{"fp32": torch.float32, "bf16": torch.bfloat16}[name]}


@pytest.mark.parametrize(
    ("device", "name", "flops", "source"),
    [
        ("NVIDIA H200", "bf16", 989.4e12, "data sheet of h200, bf16"),
        ("NVIDIA H200", "fp32", 494.7e12, "data sheet of h200, tf32"),
        ("Tesla T4", "fp32", 8.1e12, "data sheet of t4, fp32"),
        ("Tesla T4", "bf16", 1e12, "measured matmul throughput"),
        ("NVIDIA Nothing", "bf16", 1e12, "measured matmul throughput"),
    ],
)
def test_the_peak_comes_from_the_data_sheet_for_a_known_gpu_and_is_measured_otherwise(
    device: str, name: str, flops: float, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "describe", lambda device_: device)
    monkeypatch.setattr(precision, "measure_peak_flops", lambda precision: 1e12)
    on_gpu = Precision(name, torch.device("cuda"))
    assert (precision.peak_flops(on_gpu), precision.peak_source(on_gpu)) == (flops, source)


def test_the_peak_of_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "measure_peak_flops", lambda precision: 2e9)
    assert precision.peak_flops(Precision("fp32", CPU)) == 2e9
    assert precision.peak_source(Precision("fp32", CPU)) == "measured matmul throughput"


def test_only_fp16_scales_the_loss() -> None:
    assert [Precision(name, CPU).scaler().is_enabled() for name in ("fp32", "bf16", "fp16")] == [False, False, True]
