"""Run the command line in the test process, so that torch is imported only once."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from command import CommandResult, RunCli
from tinylm_cli.app import main


@pytest.fixture
def run_cli(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[RunCli]:
    """`run_cli("eval", "--json")` runs `tinylm eval --json`."""
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


@pytest.fixture
def recipe_file(text_file: Path, tmp_path: Path) -> Path:
    """A recipe file for a tiny model, which tests modify with --set."""
    recipe = {
        "name": "tiny",
        "data": {"train": str(text_file)},
        "tokenizer": {"kind": "bpe", "vocab_size": 400},
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 32},
        "training": {"steps": 2, "global_batch_size": 4, "precision": "fp32"},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
