"""Idle OpenMP threads spin on an idle machine and sleep on a busy one. The wait policy does not change results."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from tinylm import wait_policy
from tinylm.cpu_load import available_cores, cpu_share
from tinylm.wait_policy import VARIABLES, WaitPolicy


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(2)
    yield  # type: ignore[misc]
    torch.set_num_threads(1)


def idle_teams() -> int:
    return sum(thread.name == "idle OpenMP team" for thread in threading.enumerate())


@pytest.mark.skipif(available_cores() < 2, reason="requires two CPU cores")
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("share", "expected"), [(0.99, "spin"), (0.5, "sleep")])
def test_the_policy_follows_the_load(share: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait_policy, "cpu_share", lambda threads: share)
    policy = WaitPolicy()
    before = idle_teams()
    assert policy.choose() == expected
    assert (idle_teams() > before) == (expected == "sleep")
    monkeypatch.setattr(wait_policy, "cpu_share", lambda threads: 1.0)
    assert policy.choose() == "spin"
    assert idle_teams() == before


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("variable", VARIABLES)
def test_environment_variables_take_precedence(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(wait_policy, "cpu_share", lambda threads: 0.1)
    assert WaitPolicy().choose() == "spin"


def test_a_single_thread_never_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait_policy, "cpu_share", lambda threads: 0.1)
    assert torch.get_num_threads() == 1
    assert WaitPolicy().choose() == "spin"


@pytest.mark.usefixtures("two_threads")
def test_results_are_the_same_with_both_policies() -> None:
    inputs = torch.randn(300, 300, generator=torch.Generator().manual_seed(1))
    policy = WaitPolicy()
    spinning = (inputs @ inputs).softmax(-1).sum(0)
    policy.set("sleep")
    assert torch.equal(spinning, (inputs @ inputs).softmax(-1).sum(0))
    policy.set("spin")


THREADS = """
import torch
from tinylm.cpu_load import available_cores
from tinylm.wait_policy import WaitPolicy

torch.set_num_threads(2)
torch.zeros(1 << 20).add_(1)

def threads():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))

policy, before = WaitPolicy(), threads()
policy.set("sleep")
print(threads() - before > available_cores() - 2)
policy.set("spin")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="requires /proc")
def test_libgomp_manages_more_threads_than_cores_in_sleep_mode() -> None:
    """libgomp spins for a shorter time if it manages more threads than there are cores."""
    result = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == ("True", "")


def test_the_cpu_share_is_between_zero_and_one() -> None:
    assert 0 < cpu_share(2, seconds=0.01) <= 1
    assert available_cores() >= 1
