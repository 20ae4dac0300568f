"""The Python example in the guide runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tinylm.run import Run

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "look-inside.md"


def test_the_example_in_the_guide_runs(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    match = re.search(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    exec(match[1].replace("runs/quickstart", tiny_run.path.as_posix()), {})
    printed = capsys.readouterr().out
    summed = re.search(r"sum (-?[\d.]+), logit (-?[\d.]+)", printed)
    assert summed is not None
    assert float(summed[1]) == pytest.approx(float(summed[2]), abs=2e-3)
    starts = ("logit lens: [", "L", "largest contribution: ", "sum ", "most important layer: ", "patching: (2, ", "neuron 7: [")
    lines = printed.splitlines()
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
