"""Create the README's pictures from a real run.

    python docs/scripts/make_pictures.py runs/quickstart

docs/images/training.svg   the terminal view at the end of training, exported by rich
docs/images/curve.svg      the loss curve, drawn by `tinylm plot`
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from tinylm_cli.live import TerminalView

from tinylm.run import Run
from tinylm.training.metrics import EvaluationEvent, SampleEvent, StepEvent

IMAGES = Path(__file__).resolve().parents[1] / "images"
WIDTH = 100


def replay(run: Run, console: Console) -> TerminalView:
    """Replay the logged events of a run and return the final terminal view."""
    view = TerminalView(console, f"tinylm train {run.recipe.name}")
    for line in run.metrics():
        values = {key: value for key, value in line.items() if key != "kind"}
        if line["kind"] == "step":
            view.step(StepEvent(**values))
        else:
            view.evaluation(EvaluationEvent.from_line(values))
    samples = (run.path / "samples.md").read_text(encoding="utf-8")
    step, text = re.findall(r"## Step (\d+)\n\n((?:    .*\n|\n)+)", samples)[-1]
    prompt = run.recipe.sampling.prompts[-1]
    sample = "\n".join(line.removeprefix("    ") for line in text.splitlines())
    view.sample(SampleEvent(int(step), prompt, sample.removeprefix(prompt)))
    view.__exit__(None, None, None)
    return view


def main() -> None:
    run = Run.open(sys.argv[1])
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(replay(run, console).render())
    console.save_svg(str(IMAGES / "training.svg"), title=f"tinylm train {run.recipe.name}")
    subprocess.run([sys.executable, "-m", "tinylm", "plot", str(run.path), "--out", str(IMAGES / "curve.svg")], check=True)


if __name__ == "__main__":
    main()
