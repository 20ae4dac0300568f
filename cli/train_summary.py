"""Print a summary at the end of a training run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text

from . import styles
from .app import COMMANDS
from .console import StderrConsole, format_count, format_duration, format_size, print_fields

if TYPE_CHECKING:
    from tinylm.pipeline import TrainResult
    from tinylm.training_summary import SavedSample, TrainingSummary

_COMMANDS_BY_TASK = {
    "chat": [
        ("chat", "tinylm chat --run {run}", "talk to the model"),
        ("serve", "tinylm serve --run {run}", "talk to the model in a browser or with an OpenAI client"),
        ("eval", "tinylm eval --run {run}", "measure how often its answers are correct and complete"),
        ("plot", "tinylm plot {run} --out loss.png", "draw the loss curves"),
    ],
    "dpo": [
        ("chat", "tinylm chat --run {run}", "talk to the model"),
        ("serve", "tinylm serve --run {run}", "talk to the model in a browser or with an OpenAI client"),
        ("plot", "tinylm plot {run} --out loss.png", "draw the loss curves"),
    ],
    "masked_lm": [
        ("fill", 'tinylm fill "... [MASK] ..." --run {run}', "predict masked tokens"),
        ("eval", "tinylm eval --run {run} --pseudo", "compute the pseudo-perplexity"),
        ("plot", "tinylm plot {run} --out loss.png", "draw the loss curves"),
    ],
    "classification": [
        ("classify", 'tinylm classify "..." --run {run}', "classify a text"),
        ("eval", "tinylm eval --run {run}", "see the model's mistakes and compare its accuracy with that of simple baselines"),
        ("plot", "tinylm plot {run} --out accuracy.png", "draw the curves"),
    ],
    "translation": [
        ("translate", 'tinylm translate "..." --run {run}', "translate a sentence"),
        ("serve", "tinylm serve --run {run}", "try it in a browser"),
        ("eval", "tinylm eval --run {run}", "compute BLEU and compare it with that of simple baselines"),
        ("inspect", 'tinylm inspect --run {run} --text "..."', "see which source tokens each word depends on"),
    ],
}
"""Suggested next commands for all tasks except language models on text. Each entry is (name, command, purpose)."""
_MODULES_OF_EXTRAS = {"plot": ("matplotlib",), "serve": ("prometheus_client", "starlette", "uvicorn")}
"""The modules that suggested commands import from the extra of the same name."""
_SAMPLE_CHARACTERS = 240
_SIDE_BY_SIDE = 76
"""Minimum width of the terminal for two samples side by side."""


def show_summary(result: TrainResult, summary: TrainingSummary, console: StderrConsole) -> None:
    """Print the run's results, its first and last sample, and suggested next commands."""
    print_fields(console, [*_quality_rows(result, summary), *_effort_rows(result)])
    if summary.samples:
        _show_samples(summary.samples, console)
    run = shlex.quote(result.run)
    if result.stopped == "patience":
        console.print_line("stopped early, because evaluations no longer improved (evaluation.patience)", styles.WARNING)
    elif result.stopped != "done":
        if _is_complete(result):
            text = f"training is complete, but the final evaluation is missing. Run it with: tinylm train {run} --resume"
        else:
            text = f"stopped early; the last step is saved. Continue with: tinylm train {run} --resume"
        console.print_line(text, styles.WARNING)
        return
    console.print_line("next:", "dim")
    for command, purpose in _next_commands(run, summary):
        console.print_line(f"  {command}   {purpose}", "dim")


def _is_complete(result: TrainResult) -> bool:
    """Whether all steps were trained. A signal can still have interrupted the final evaluation."""
    return result.stopped == "done" or result.fraction_done >= 1


def _quality_rows(result: TrainResult, summary: TrainingSummary) -> list[tuple[str, str]]:
    from tinylm.evaluation.metrics import METRICS

    rows = []
    scores = [METRICS[name].described(value, unit=True) for name, value in result.metrics.items() if value is not None]
    if scores:
        rows.append(("held-out", f"{', '.join(scores)} (best at step {result.best_step:,})"))
    elif result.stopped != "done":
        rows.append(("held-out", "not evaluated yet"))
    loss, choices = summary.heldout_loss, summary.equally_likely_tokens
    if loss is not None and choices is not None:
        first = "" if summary.first_loss is None else f"{summary.first_loss:.2f} at the first step -> "
        guess = f"uniform guessing: {summary.uniform_loss:.2f}, {round(result.vocab_size):,} tokens"
        rows.append(
            ("loss", f"{first}{loss:.2f} on held-out text, like a choice among {choices:,.0f} equally likely tokens ({guess})")
        )
    if summary.baselines and summary.bits_per_byte is not None:
        models = {**summary.baselines, "this model": summary.bits_per_byte}
        ranked = sorted(models.items(), key=lambda item: item[1], reverse=True)
        shown = [f"{name} {bits:.2f}" for name, bits in ranked if not name.startswith(("1-", "4-"))]
        rows.append(("compared", f"{', '.join(shown)} bits per byte; lower is better"))
    return rows


def _effort_rows(result: TrainResult) -> list[tuple[str, str]]:
    tokens, parameters = format_count(result.tokens), format_count(result.parameters)
    if _is_complete(result):
        steps = f"{result.step:,} of {result.steps:,} steps"
    else:
        about = "about " if result.limited_by_time else ""
        steps = f"{result.fraction_done:.0%}: {result.step:,} of {about}{result.steps:,} steps"
    speed = f"{format_count(result.tokens_per_second)} tokens/s in {result.precision} on {result.device}"
    memory = "" if result.peak_memory_bytes is None else f", peak memory {format_size(result.peak_memory_bytes)}"
    in_steps, total = format_duration(result.train_seconds), format_duration(result.seconds)
    return [
        ("trained", f"{steps}, {tokens} tokens, {parameters} parameters"),
        ("time", f"{in_steps} in optimizer steps at {speed}, {total} in total{memory}"),
    ]


def _show_samples(samples: Sequence[SavedSample], console: StderrConsole) -> None:
    if console.is_terminal and len(samples) == 2 and console.width >= _SIDE_BY_SIDE:
        width = min(console.width, 120) // 2
        panels = [
            Panel(Text(_shortened(sample.text)), title=f"sample at step {sample.step:,}", title_align="left", width=width)
            for sample in samples
        ]
        console.print(Columns(panels, padding=0, equal=True))
        return
    for sample in samples:
        console.print_line(f"sample at step {sample.step:,}", "dim")
        for line in _shortened(sample.text).split("\n"):
            console.print_line(f"  {line}", "")


def _shortened(text: str) -> str:
    """Return the beginning of a text, without blank lines."""
    lines = [line.rstrip() for line in text[:_SAMPLE_CHARACTERS].split("\n") if line.strip()]
    return "\n".join(lines) + (" ..." if len(text) > _SAMPLE_CHARACTERS else "")


def first_command(run: str, task: str) -> str:
    """Return the command that uses a model for what it was trained for. `task` is the value of `TrainingSummary.task`."""
    return (
        _COMMANDS_BY_TASK[task][0][1].format(run=run) if task in _COMMANDS_BY_TASK else f'tinylm sample --run {run} --prompt "..."'
    )


def _next_commands(run: str, summary: TrainingSummary) -> list[tuple[str, str]]:
    """Return suggested next commands, each with its purpose."""
    commands = _COMMANDS_BY_TASK.get(summary.task, [])
    commands = [(name, text.format(run=run), purpose) for name, text, purpose in commands] or [
        ("sample", first_command(run, summary.task), "generate text"),
        ("serve", f"tinylm serve --run {run}", "try it in a browser"),
        ("eval", f"tinylm eval --run {run} --html report.html", "see which words are hard to predict"),
        ("plot", f"tinylm plot {run} --out loss.png", "draw the loss curves"),
        ("inspect", f'tinylm inspect --run {run} --text "..."', "look inside the model"),
    ]
    if not summary.baselines and summary.task not in _COMMANDS_BY_TASK:
        commands.insert(3, ("eval", f"tinylm eval --run {run} --baselines", "compare it with n-gram models and compressors"))
    if not summary.inspectable:
        commands = [each for each in commands if each[0] != "inspect"]
    shown = [(command, purpose + _missing_extra(name)) for name, command, purpose in commands if name in COMMANDS]
    width = max(len(command) for command, _ in shown)
    return [(f"{command:<{width}}", purpose) for command, purpose in shown]


def _missing_extra(command: str) -> str:
    """Return a note about the extra that a command needs, or an empty string if it needs none or the extra is installed."""
    installed = all(find_spec(module) is not None for module in _MODULES_OF_EXTRAS.get(command, ()))
    return "" if installed else f' (needs an extra: pip install "tinylm[{command}]")'
