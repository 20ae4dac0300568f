"""A step's seconds on a CPU follow from its counts and from what was measured."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from tinylm.cost import cpu
from tinylm.cost.cpu import (
    AMX_SPEED_UP,
    HALF_BLOCK_SECONDS,
    LAUNCH_SECONDS,
    MATMUL_SHARE,
    SCORE_SECONDS,
    STATE_SHARE,
    TABLE_KERNELS,
    Processor,
    Work,
    kernels,
    measure,
    newton_schulz_flops,
    query_blocks,
    step_seconds,
)

MACHINE = Processor(100e9, 20e9, 10e9, cores=2, has_amx=True)
WORK = Work("fp32", 1e9, 1e8, 1e6, 100, 1000, state_bytes=1e8, update_kernels=200, newton_schulz_flops=1e9)


def test_a_step_computed_by_hand() -> None:
    seconds = step_seconds(MACHINE, WORK)
    assert seconds.matmul == pytest.approx(1e9 / 100e9 / MATMUL_SHARE)
    assert seconds.attention == pytest.approx(1e6 * SCORE_SECONDS / 2)
    assert seconds.launches == pytest.approx(1000 * LAUNCH_SECONDS)
    assert seconds.optimizer == pytest.approx(0.01 / MATMUL_SHARE + 1e8 / (2 * STATE_SHARE * 10e9) + 200 * LAUNCH_SECONDS)
    assert seconds.total == pytest.approx(seconds.passes + seconds.optimizer)


def test_halves_multiply_faster_with_tiles_and_pay_for_small_products() -> None:
    half = step_seconds(MACHINE, replace(WORK, numbers="bf16"))
    assert half.matmul == pytest.approx(step_seconds(MACHINE, WORK).matmul / AMX_SPEED_UP)
    assert MACHINE.peak("fp32") == MACHINE.product_flops("fp32") < MACHINE.product_flops("bf16") < MACHINE.peak("bf16")
    assert half.attention - step_seconds(MACHINE, WORK).attention == pytest.approx(100 * HALF_BLOCK_SECONDS / 2)
    assert step_seconds(replace(MACHINE, has_amx=False), replace(WORK, numbers="bf16")).matmul > 50 * half.matmul


@pytest.mark.parametrize("count", ["matmul_flops", "elementwise_bytes", "scores", "kernels", "state_bytes", "update_kernels"])
def test_doubling_a_count_is_slower_and_never_more_than_twice_as_slow(count: str) -> None:
    once, twice = step_seconds(MACHINE, WORK).total, step_seconds(MACHINE, replace(WORK, **{count: 2 * getattr(WORK, count)})).total
    assert once < twice <= 2 * once


def test_compiling_starts_fewer_kernels_and_halves_start_more() -> None:
    assert kernels(4, 0, "fp32", compiled=True) < kernels(4, 0, "fp32", compiled=False) < kernels(4, 0, "bf16", compiled=False)


def test_each_order_of_ngrams_starts_as_many_more() -> None:
    assert kernels(4, 2, "fp32", compiled=True) - kernels(4, 0, "fp32", compiled=True) == 2 * TABLE_KERNELS


def test_newton_schulz_is_the_same_for_a_matrix_and_its_transpose_and_that_of_a_square_is_six_cubes() -> None:
    assert newton_schulz_flops(64, 16, 3) == newton_schulz_flops(16, 64, 3) == 3 * (4 * 16 * 16 * 64 + 2 * 16**3)
    assert newton_schulz_flops(32, 32, 1) == 6 * 32**3


def test_longer_sequences_go_back_in_larger_blocks() -> None:
    assert [query_blocks(2, 3, length) for length in (1, 64, 191, 192, 256, 768, 1024)] == [6, 12, 36, 18, 24, 18, 24]


def test_this_machine_is_measured() -> None:
    machine = measure(1 << 20, 1 << 22)
    assert machine.matmul_flops > 1e8
    assert machine.bandwidth > 1e7
    assert machine.state_bandwidth > 1e7
    assert machine.cores >= 1
    assert 0 < machine.undisturbed <= 1


def test_what_else_the_machine_does_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread's clock that goes half as fast as the wall's: it had a core for half of the time."""
    monkeypatch.setattr(cpu.time, "thread_time", lambda: time.perf_counter() / 2)
    assert measure(1 << 18, 1 << 18).undisturbed == pytest.approx(0.5, abs=0.01)


def test_it_imports_without_torch() -> None:
    code = "import sys, tinylm.cost.cpu, tinylm.cost.memory, tinylm.cost.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
