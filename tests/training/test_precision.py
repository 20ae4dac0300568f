"""Which numbers a training computes in, and how `auto` decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tinylm.reporting import CollectingReporter
from tinylm.training import precision
from tinylm.training.precision import Precision, resolve

CPU = torch.device("cpu")


@pytest.mark.parametrize(("gain", "expected"), [(0.01, "fp32"), (1.2, "fp32"), (3.0, "bf16")])
def test_auto_takes_bf16_on_a_cpu_only_where_it_is_faster(gain: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_bf16_speed_up", lambda device: gain)
    assert resolve("auto", CPU, CollectingReporter()).name == expected


def test_slow_bf16_is_taken_when_asked_for_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_bf16_speed_up", lambda device: 0.02)
    reporter = CollectingReporter()
    assert resolve("bf16", CPU, reporter).name == "bf16"
    assert "50 times slower" in reporter.warnings[0]


def test_the_probe_measures_a_positive_ratio() -> None:
    assert precision._bf16_speed_up(CPU) > 0


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_computes_products_in_what_the_name_says(name: str, dtype: torch.dtype) -> None:
    with Precision(name, CPU).autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(("clock", "fine"), [("thread_time", True), ("perf_counter", False)])
def test_the_peak_is_the_flops_of_a_product_by_the_best_time_it_took(
    clock: str, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that says 1/4, 1/8, 1/2, 3/8, 1/4, 1/4 of a second for products of 1024 x 1024 matrices: 2 x 1024^3 operations."""
    times = iter([0.0, 0.25, 10.0, 10.125, 20.0, 20.5, 30.0, 30.375, 40.0, 40.25, 50.0, 50.25])
    monkeypatch.setattr(precision, "_threads_are_timed_finely", lambda: fine)
    monkeypatch.setattr(precision.time, clock, lambda: next(times))
    assert precision.matmul_flops(Precision("fp32", CPU)) == 2 * 1024**3 / 0.125


def test_a_product_that_takes_long_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 2.0])
    monkeypatch.setattr(precision, "_threads_are_timed_finely", lambda: False)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(times))
    assert precision.matmul_flops(Precision("fp32", CPU)) == 2 * 1024**3 / 2.0


@pytest.mark.parametrize(("small", "large", "peak"), [(0.02, 0.05, 2 * 2048**3 / 0.05), (0.02, 0.5, 2 * 1024**3 / 0.02)])
def test_where_products_are_quick_larger_ones_may_be_faster(
    small: float, large: float, peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_product_seconds", lambda width, numbers: {1024: small, 2048: large}[width])
    assert precision.matmul_flops(Precision("bf16", CPU)) == peak


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_peak_is_measured_in_the_precision(name: str) -> None:
    multiplied = set()

    class Products(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(function, "__name__", "") in ("matmul", "__matmul__"):
                multiplied.add(args[0].dtype)
            return function(*args, **(kwargs or {}))

    with Products():
        assert precision.matmul_flops(Precision(name, CPU)) > 1e8
    assert multiplied == {{"fp32": torch.float32, "bf16": torch.bfloat16}[name]}


def test_only_fp16_scales() -> None:
    assert [Precision(name, CPU).scaler().is_enabled() for name in ("fp32", "bf16", "fp16")] == [False, False, True]
