"""Show the progress of a training run: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from itertools import pairwise

from rich.align import Align
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tinylm.evaluation.metrics import LOSS, Metric
from tinylm.training.metrics import EvaluationEvent, GuardEvent, Observer, SampleEvent, StepEvent

from .console import format_count, format_duration

_SECONDS_BETWEEN_LINES = 5.0
_STOPPING = "stopping after this step; press Ctrl-C again to exit immediately"
_SMOOTHING = 0.95
"""Decay per step of the moving average of the loss."""
_CURVE_HEIGHT = 8
_BRAILLE_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot in a Braille character, by row (of 4) and column (of 2)."""


class PlainView(Observer):
    """Prints a line for every evaluation, and a line for the current step at most every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_printed = -_SECONDS_BETWEEN_LINES
        self._first_step: StepEvent | None = None

    def step(self, event: StepEvent) -> None:
        self._first_step = self._first_step or event
        if event.seconds - self._last_printed < _SECONDS_BETWEEN_LINES and event.step > 1:
            return
        self._last_printed = event.seconds
        left = "" if event.step == 1 else f"  {format_duration(_seconds_left(self._first_step, event))} left"
        self._console.print(
            f"step {event.step:>6}  {event.done:4.0%}  loss {event.loss:.4f}  {format_count(event.tokens_per_second)} tokens/s"
            f"{'' if event.mfu is None else f'  MFU {event.mfu:.0%}'}{left}",
            markup=False,
        )

    def evaluation(self, event: EvaluationEvent) -> None:
        scores = "  ".join(metric.described(value) for metric, value in event.metrics.items())
        best = "  best so far" if event.best else ""
        self._console.print(f"step {event.step:>6}  held-out {scores}{best}", markup=False)

    def note(self, text: str) -> None:
        self._console.print(text, style="yellow", markup=False)

    def stopping(self) -> None:
        self._console.print(_STOPPING)


class TerminalView(Observer):
    """The live panel. It appears when the first phase begins. Use it as a context manager; `render` returns its current content."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._steps: list[StepEvent] = []
        self._evaluations: list[EvaluationEvent] = []
        self._smoothed: list[float] = []
        self._sample: SampleEvent | None = None
        self._phase = "first step"
        self._stopping = False
        self._end_time: float | None = None
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=False)
        self._last_step_time = time.monotonic()

    def __enter__(self) -> TerminalView:
        return self

    def __exit__(self, *error: object) -> None:
        self._phase = "stopped" if error[0] or self._stopping else "done"
        self._stopping = False
        self._end_time = time.monotonic()
        self._live.stop()

    def step(self, event: StepEvent) -> None:
        decay = _SMOOTHING ** (event.step - self._steps[-1].step) if self._steps else 0.0
        previous = self._smoothed[-1] if self._smoothed else event.loss
        self._smoothed.append(decay * previous + (1 - decay) * event.loss)
        self._steps.append(event)
        self._last_step_time = time.monotonic()

    def evaluation(self, event: EvaluationEvent) -> None:
        self._evaluations.append(event)

    def sample(self, event: SampleEvent) -> None:
        self._sample = event

    def guard(self, event: GuardEvent) -> None:
        if event.kind == "rollback":
            kept = [step for step in self._steps if step.step <= event.step]
            evaluations = [evaluation for evaluation in self._evaluations if evaluation.step < event.step]
            self._steps, self._smoothed, self._evaluations = [], [], []
            self.resumed(kept, evaluations)

    def resumed(self, steps: Sequence[StepEvent], evaluations: Sequence[EvaluationEvent]) -> None:
        for step in steps:
            self.step(step)
        self._evaluations += evaluations

    def phase(self, name: str) -> None:
        self._phase = name
        self._live.start()

    def note(self, text: str) -> None:
        self._console.print(text, style="yellow", markup=False)

    def stopping(self) -> None:
        self._stopping = True

    def render(self) -> RenderableType:
        if not self._steps:
            return self._panel(Text(self._phase, style="dim"))
        parts: list[RenderableType] = [self._progress(), self._numbers(), self._curve()]
        if self._sample is not None:
            generated = re.sub(r"\s+", " ", self._sample.text[:1000])
            text = Text(self._sample.prompt, style="bold") + Text(generated, style="italic")
            text.truncate(2 * max(20, self._width()), overflow="ellipsis")
            parts += [Text(f"sample at step {self._sample.step}", style="dim"), text]
        return self._panel(Group(*parts))

    def _panel(self, content: RenderableType) -> RenderableType:
        subtitle = _STOPPING if self._stopping else "Ctrl-C saves and stops" if self._end_time is None else None
        return Panel(
            content,
            title=self._title,
            title_align="left",
            subtitle=None if subtitle is None else Text(subtitle, style="yellow" if self._stopping else "dim"),
            subtitle_align="right",
            border_style="cyan",
            padding=(0, 1),
        )

    def _width(self) -> int:
        return self._console.width - 6

    def _progress(self) -> RenderableType:
        last, since_last = self._steps[-1], self._seconds_since_last_step()
        times = []
        if self._width() >= 70:
            times.append(f"{format_duration(last.seconds + since_last)} elapsed")
        if len(self._steps) > 1:
            left = _seconds_left(self._steps[0], last)
            times.append(f"{format_duration(max(0.0, left - since_last) if self._end_time is None else left)} left")
        status = [f"{last.done:.0%}", ", ".join(times), self._phase]
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column()
        row.add_column(ratio=1)
        row.add_column(justify="right")
        row.add_row(
            Text(f"step {last.step:,}", style="bold"),
            ProgressBar(total=1.0, completed=last.done),
            Text("  ".join(part for part in status if part)),
        )
        return row

    def _seconds_since_last_step(self) -> float:
        """Return the seconds from the last logged step until now or the end of training. Return 0 before the panel appears."""
        if self._end_time is not None:
            return self._end_time - self._last_step_time
        return time.monotonic() - self._last_step_time if self._live.is_started else 0.0

    def _numbers(self) -> RenderableType:
        last = self._steps[-1]
        cells = [
            ("loss", f"{last.loss:.3f}", "bright_cyan"),
            ("smoothed", f"{self._smoothed[-1]:.3f}", "cyan"),
            ("tokens/s", format_count(last.tokens_per_second), "white"),
            ("MFU", "-" if last.mfu is None else f"{last.mfu:.0%}", "white"),
            ("lr", f"{last.lr:.2g}", "white"),
        ]
        newest = self._evaluations[-1].metrics.items() if self._evaluations else []
        scores = [(_column_label(metric), metric.formatted(value), "bright_yellow") for metric, value in newest]
        cells[2:2] = scores
        best = next((event for event in reversed(self._evaluations) if event.best), None)
        if best is not None:
            value = best.metrics.metric.formatted(best.metrics.value)
            cells.insert(2 + len(scores), ("best", f"{value} at step {best.step:,}", "yellow"))
        extra_scores = [label for label, _, _ in scores[2:]]
        for optional in ("lr", "MFU", "smoothed", "tokens/s", "best", *reversed(extra_scores)):  # drop columns until they fit
            if sum(max(len(label), len(value)) + 3 for label, value, _ in cells) - 3 > self._width():
                cells = [cell for cell in cells if cell[0] != optional]
        row = Table.grid(padding=(0, 3))
        row.add_row(*(Text(label, style="dim") for label, _, _ in cells))
        row.add_row(*(Text(value, style=style) for _, value, style in cells))
        return row

    def _curve(self) -> RenderableType:
        width = max(20, min(self._width() - 9, 100))
        end = max(self._steps[-1].step / max(self._steps[-1].done, 1e-9), 1.0)
        training = [(event.step / end, value) for event, value in zip(self._steps, self._smoothed, strict=True)]
        heldout = [(event.step / end, event.metrics.value) for event in self._evaluations]
        metric = self._evaluations[-1].metrics.metric if self._evaluations else LOSS
        if metric is LOSS:
            return draw_curves([(training, "cyan"), (heldout, "bright_yellow")], width, _CURVE_HEIGHT)
        return Group(  # two charts, because the two metrics are not comparable
            draw_curves([(training, "cyan")], width, _CURVE_HEIGHT // 2),
            Text(metric.heading, style="dim"),
            draw_curves([(heldout, "bright_yellow")], width, _CURVE_HEIGHT // 2, metric.format),
        )


def _seconds_left(first: StepEvent, last: StepEvent) -> float:
    """Estimate the remaining seconds from the speed since the first logged step, which excludes compilation."""
    seconds, done = last.seconds - first.seconds, last.done - first.done
    if done <= 0:
        seconds, done = last.seconds, max(last.done, 1e-9)
    return seconds / done * (1 - last.done)


def _column_label(metric: Metric) -> str:
    return "held-out" if metric is LOSS else metric.label.replace(" per ", "/")  # the column `loss` is the training loss


def draw_curves(
    curves: Sequence[tuple[Sequence[tuple[float, float]], str]], width: int, height: int, y_format: str = ".3f"
) -> RenderableType:
    """Draw curves with Braille dots and a labeled y axis. A curve is (points, color), with x in [0, 1]. Later curves are on top."""
    values = [y for points, _ in curves for _, y in points if math.isfinite(y)] or [0.0]
    low, high = min(values), max(values)
    span = max(high - low, 1e-9)
    cells = [[(0, "")] * width for _ in range(height)]
    for points, style in curves:
        for x, y in _interpolate(points, 2 * width):
            row = round((high - y) / span * (4 * height - 1))
            column = min(int(x * 2 * width), 2 * width - 1)
            dots, _ = cells[row // 4][column // 2]
            cells[row // 4][column // 2] = (dots | _BRAILLE_DOTS[row % 4][column % 2], style)
    lines = []
    for index, line in enumerate(cells):
        label = {0: f"{high:{y_format}} ", height - 1: f"{low:{y_format}} "}.get(index, "").rjust(8)
        text = Text().append(label, style="dim")
        for dots, style in line:
            text.append(chr(0x2800 + dots) if dots else " ", style=style)
        lines.append(text)
    return Align.left(Group(*lines))


def _interpolate(points: Sequence[tuple[float, float]], columns: int) -> list[tuple[float, float]]:
    """Connect the points with straight lines, with one point per column. Drop non-finite points."""
    interpolated = list(points[:1])
    for (x0, y0), (x1, y1) in pairwise(points):
        steps = max(1, int((x1 - x0) * columns))
        interpolated += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(1, steps + 1)]
    return [(x, y) for x, y in interpolated if math.isfinite(y)]
