"""Test that the time for a step on a CPU follows from the amount of work and the CPU's measured speed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tinylm.cost import cpu
from tinylm.cost.cpu import (
    AMX_SPEEDUP,
    AVX512_BF16_SPEEDUP,
    LAUNCH_SECONDS,
    MATMUL_EFFICIENCY,
    SCORE_SECONDS,
    STATE_EFFICIENCY,
    TABLE_KERNELS,
    Processor,
    Work,
    kernels,
    measure,
    newton_schulz_flops,
    step_seconds,
)

MACHINE = Processor(100e9, 20e9, 10e9, cores=2, has_amx=True)
WORK = Work("fp32", 1e9, 1e8, 1e6, 1000, state_bytes=1e8, update_kernels=200, newton_schulz_flops=1e9)


def test_the_step_time_matches_a_hand_calculation() -> None:
    seconds = step_seconds(MACHINE, WORK)
    assert seconds.matmul == pytest.approx(1e9 / 100e9 / MATMUL_EFFICIENCY)
    assert seconds.attention == pytest.approx(1e6 * SCORE_SECONDS / 2)
    assert seconds.launches == pytest.approx(1000 * LAUNCH_SECONDS)
    assert seconds.optimizer == pytest.approx(0.01 / MATMUL_EFFICIENCY + 1e8 / (2 * STATE_EFFICIENCY * 10e9) + 200 * LAUNCH_SECONDS)
    assert seconds.total == pytest.approx(seconds.passes + seconds.optimizer)


def test_matrix_products_in_bf16_are_faster_with_amx_or_avx512_bf16() -> None:
    fp32, bf16 = (step_seconds(MACHINE, replace(WORK, precision=precision)) for precision in ("fp32", "bf16"))
    assert bf16.matmul == pytest.approx(fp32.matmul / AMX_SPEEDUP)
    assert MACHINE.peak_flops("fp32") == MACHINE.matmul_flops_in("fp32")
    assert MACHINE.matmul_flops_in("fp32") < MACHINE.matmul_flops_in("bf16") < MACHINE.peak_flops("bf16")
    without_amx, in_bf16 = replace(MACHINE, has_amx=False), replace(WORK, precision="bf16")
    assert step_seconds(without_amx, in_bf16).matmul > 50 * fp32.matmul
    assert step_seconds(replace(without_amx, has_avx512_bf16=True), in_bf16).matmul == pytest.approx(
        fp32.matmul / AVX512_BF16_SPEEDUP
    )


@pytest.mark.parametrize("count", ["matmul_flops", "elementwise_bytes", "scores", "kernels", "state_bytes", "update_kernels"])
def test_doubling_a_count_multiplies_the_time_by_one_to_two(count: str) -> None:
    once, twice = step_seconds(MACHINE, WORK).total, step_seconds(MACHINE, replace(WORK, **{count: 2 * getattr(WORK, count)})).total
    assert once < twice <= 2 * once


def test_compilation_reduces_the_number_of_kernels_and_autocast_increases_it() -> None:
    assert kernels(4, 0, "fp32", compiled=True) < kernels(4, 0, "fp32", compiled=False) < kernels(4, 0, "bf16", compiled=False)


def test_every_ngram_table_adds_kernels() -> None:
    assert kernels(4, 2, "fp32", compiled=True) - kernels(4, 0, "fp32", compiled=True) == 2 * TABLE_KERNELS


def test_newton_schulz_flops_match_a_hand_calculation() -> None:
    assert newton_schulz_flops(64, 16, 3) == newton_schulz_flops(16, 64, 3) == 3 * (4 * 16 * 16 * 64 + 2 * 16**3)
    assert newton_schulz_flops(32, 32, 1) == 6 * 32**3


def test_the_speed_of_this_machine_is_measured() -> None:
    machine = measure(1 << 20, 1 << 22)
    assert machine.matmul_flops > 1e8
    assert machine.bandwidth > 1e7
    assert machine.state_bandwidth > 1e7
    assert machine.cores >= 1
    assert 0 < machine.cpu_share <= 1


def test_a_measurement_is_reused_for_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(cpu, "_best", lambda work, **limits: measured.append(work) or 0.5)
    for now in (-10_009.0, -10_000.0, -9_990.0):  # times that no other test has
        monkeypatch.setattr(cpu, "time", SimpleNamespace(monotonic=lambda now=now: now))
        measure(1 << 20, 1 << 22)
    assert len(measured) == 2 * 3, "matrix multiplication and two bandwidths, twice"


def test_the_cost_modules_import_without_torch() -> None:
    code = "import sys, tinylm.cost.cpu, tinylm.cost.memory, tinylm.cost.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
