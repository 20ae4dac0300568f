"""Fixtures for all tests: real text, a tiny trained run, and faults to inject into training."""

from __future__ import annotations

import io
import os
import pydoc_data.topics
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import CommandResult, RunCli
from tinylm_cli.app import main

from tinylm.model.transformer import Transformer
from tinylm.pipeline import train
from tinylm.recipe import Recipe, loads
from tinylm.run import Run
from tinylm.training import gradient, precision
from tinylm.training.metrics import Observer, StepEvent
from tinylm.training.step import accumulate

TINY = """\
name: tiny
seed: 1
data: {{train: {text}, heldout: {{share: 0.1, by: tail}}}}
tokenizer: {{kind: bpe, vocab_size: 400}}
model: {{preset: {preset}, n_layer: 2, n_head: 2, n_embd: 32, context_length: 32}}
training: {{steps: 20, global_batch_size: 8, micro_batch_size: 4, precision: fp32, log_every: 1}}
evaluation: {{every: 10}}
checkpoint: {{every: 5, keep: 1}}
"""


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Run all tests and their processes with their own cache and on one thread, which is fastest for tiny models.

    The test processes of pytest-xdist share the built-in texts, because creating them takes seconds.
    """
    cache = tmp_path_factory.mktemp("cache")
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = tmp_path_factory.getbasetemp().with_name("builtin")
        shared.mkdir(exist_ok=True)
        (cache / "builtin").symlink_to(shared, target_is_directory=True)
    os.environ["TINYLM_CACHE"] = str(cache)
    os.environ.pop("TINYLM_RUN", None)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _constant_peak() -> Iterator[None]:
    """Assume a peak of 1 TFLOP/s. Otherwise, each training run would spend 0.1 s measuring it. Tests of the measurement import
    the original function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "measure_peak_flops", lambda precision: 1e12)
        yield


@pytest.fixture(scope="session")
def english() -> str:
    """460 kB of English text from Python's language reference."""
    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


@pytest.fixture(scope="session")
def text_file(english: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "english.txt"
    path.write_text(english[:60_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def short_file(english: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 kB of English text, which is short enough for a tiny run to train for more than one epoch."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(english[1000:7000], encoding="utf-8")
    return path


def tiny_recipe(text: Path, preset: str = "modern", *overrides: str) -> Recipe:
    """Return a recipe that trains in one or two seconds."""
    return loads(TINY.format(text=text, preset=preset), overrides)


@pytest.fixture(scope="session")
def tiny_run(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run folder. Tests must not modify it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_recipe(text_file), folder, device="cpu")
    return Run.open(folder)


@pytest.fixture
def run_cli(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[RunCli]:
    """`run_cli("eval", "--json")` runs `tinylm eval --json` in the test process, so that torch is imported only once."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str | Path, stdin: bytes = b"") -> CommandResult:
        monkeypatch.setattr(sys, "argv", ["tinylm", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capfdbinary.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capfdbinary.readouterr()
        return CommandResult(int(caught.value.code or 0), out.decode("utf-8", "surrogateescape"), err.decode())

    yield run
    signal.signal(signal.SIGTERM, handler)


class NoteCollector(Observer):
    """Collects the notes of a training run in a list."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class StopAt(Observer):
    """Stop training after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, event: StepEvent) -> None:
        if event.step == self._step:
            self.request_stop()


Change = Callable[[Transformer, torch.Tensor], torch.Tensor]
"""A function of the network and the loss that can change the gradients. It returns the loss to report."""
Corrupt = Callable[[Collection[int], Change], list[list[torch.Tensor]]]


@pytest.fixture
def corrupt(monkeypatch: pytest.MonkeyPatch) -> Corrupt:
    """`corrupt(calls, change)` applies `change` after each gradient computation whose number is in `calls`, counted from 1.

    It returns a list that collects the weights before each gradient computation.
    """

    def install(calls: Collection[int], change: Change) -> list[list[torch.Tensor]]:
        weights: list[list[torch.Tensor]] = []

        def accumulate_and_change(network: Transformer, *rest: Any) -> torch.Tensor:
            weights.append([parameter.detach().clone() for parameter in network.parameters()])
            loss = accumulate(network, *rest)
            return change(network, loss) if len(weights) in calls else loss

        monkeypatch.setattr(gradient, "accumulate", accumulate_and_change)
        return weights

    return install
