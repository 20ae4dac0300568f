"""Make the pictures of the README from a real run: python docs/make_pictures.py runs/quickstart

docs/training.svg   the terminal view as it stood at the end of the training, exported by rich
docs/curve.svg      the loss curve, as `tinylm plot` draws it
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from tinylm_cli.live import TerminalView

from tinylm.run import Run
from tinylm.training.metrics import EvaluationEvent, SampleEvent, StepEvent

DOCS = Path(__file__).parent
WIDTH = 100


def replayed(run: Run, console: Console) -> TerminalView:
    """The view after hearing everything that the run's files tell."""
    view = TerminalView(console, f"tinylm train {run.recipe.name}")
    for line in run.metrics():
        event = StepEvent if line["kind"] == "step" else EvaluationEvent
        known = {field.name: line[field.name] for field in fields(event)}
        heard = event(**known)
        view.step(heard) if isinstance(heard, StepEvent) else view.evaluation(heard)
    samples = (run.path / "samples.md").read_text(encoding="utf-8")
    step, text = re.findall(r"## Step (\d+)\n\n((?:    .*\n|\n)+)", samples)[-1]
    prompt = run.recipe.sampling.prompts[-1]
    written = "\n".join(line.removeprefix("    ") for line in text.splitlines())
    view.sample(SampleEvent(int(step), prompt, written.removeprefix(prompt)))
    view.__exit__(None, None, None)
    return view


def main() -> None:
    run = Run.open(sys.argv[1])
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(replayed(run, console).render())
    console.save_svg(str(DOCS / "training.svg"), title=f"tinylm train {run.recipe.name}")
    subprocess.run([sys.executable, "-m", "tinylm", "plot", str(run.path), "--out", str(DOCS / "curve.svg")], check=True)


if __name__ == "__main__":
    main()
