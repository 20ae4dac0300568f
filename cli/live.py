"""The view of a running training: a panel that redraws itself on a terminal, plain lines elsewhere."""

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

from tinylm.training.metrics import EvaluationEvent, GuardEvent, Observer, SampleEvent, StepEvent

from .console import count, duration

_PLAIN_EVERY_SECONDS = 5.0
_STOPPING = "stopping after this step; once more stops at once"
_SMOOTHING = 0.95  # per step
_CURVE_HEIGHT = 8
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


class PlainView(Observer):
    """One line per evaluation, and one per logged step but not more often than every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said = -_PLAIN_EVERY_SECONDS
        self._first: StepEvent | None = None

    def step(self, event: StepEvent) -> None:
        self._first = self._first or event
        if event.seconds - self._said < _PLAIN_EVERY_SECONDS and event.step > 1:
            return
        self._said = event.seconds
        left = "" if event.step == 1 else f"  {duration(_left(self._first, event))} left"
        self._console.print(
            f"step {event.step:>6}  {event.done:4.0%}  loss {event.loss:.4f}  {count(event.tokens_per_second)} tokens/s"
            f"  MFU {event.mfu:.0%}{left}",
            markup=False,
        )

    def evaluation(self, event: EvaluationEvent) -> None:
        best = "  best so far" if event.best else ""
        self._console.print(
            f"step {event.step:>6}  held-out loss {event.val_loss:.4f}  {event.val_bits_per_byte:.4f} bits per byte{best}",
            markup=False,
        )

    def note(self, text: str) -> None:
        self._console.print(text, style="yellow", markup=False)

    def stopping(self) -> None:
        self._console.print(_STOPPING)


class TerminalView(Observer):
    """The live panel, shown from the first phase on. Use it as a context manager; `render` gives it as it stands."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._steps: list[StepEvent] = []
        self._evaluations: list[EvaluationEvent] = []
        self._smoothed: list[float] = []
        self._sample: SampleEvent | None = None
        self._phase = "first step"
        self._stopping = self._ended = False
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=False)
        self._heard = time.monotonic()

    def __enter__(self) -> TerminalView:
        return self

    def __exit__(self, *error: object) -> None:
        self._phase = "stopped" if error[0] or self._stopping else "done"
        self._stopping = False
        self._ended = True
        self._live.stop()

    def step(self, event: StepEvent) -> None:
        kept = _SMOOTHING ** (event.step - self._steps[-1].step) if self._steps else 0.0
        before = self._smoothed[-1] if self._smoothed else event.loss
        self._smoothed.append(kept * before + (1 - kept) * event.loss)
        self._steps.append(event)
        self._heard = time.monotonic()

    def evaluation(self, event: EvaluationEvent) -> None:
        self._evaluations.append(event)

    def sample(self, event: SampleEvent) -> None:
        self._sample = event

    def guard(self, event: GuardEvent) -> None:
        if event.kind == "rollback":
            kept = [step for step in self._steps if step.step <= event.step]
            evaluations = [evaluation for evaluation in self._evaluations if evaluation.step < event.step]
            self._steps, self._smoothed, self._evaluations = [], [], []
            self.earlier(kept, evaluations)

    def earlier(self, steps: Sequence[StepEvent], evaluations: Sequence[EvaluationEvent]) -> None:
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
            written = re.sub(r"\s+", " ", self._sample.text[:1000])
            text = Text(self._sample.prompt, style="bold") + Text(written, style="italic")
            text.truncate(2 * max(20, self._width()), overflow="ellipsis")
            parts += [Text(f"at step {self._sample.step} it writes", style="dim"), text]
        return self._panel(Group(*parts))

    def _panel(self, content: RenderableType) -> RenderableType:
        below = _STOPPING if self._stopping else None if self._ended else "Ctrl-C saves and stops"
        return Panel(
            content,
            title=self._title,
            title_align="left",
            subtitle=None if below is None else Text(below, style="yellow" if self._stopping else "dim"),
            subtitle_align="right",
            border_style="cyan",
            padding=(0, 1),
        )

    def _width(self) -> int:
        return self._console.width - 6

    def _progress(self) -> RenderableType:
        last = self._steps[-1]
        waited = time.monotonic() - self._heard if self._live.is_started and not self._ended else 0.0
        left = f"{duration(max(0.0, _left(self._steps[0], last) - waited))} left  " if len(self._steps) > 1 else ""
        gone = f"{duration(last.seconds + waited)} gone, " if self._width() >= 70 else ""
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column()
        row.add_column(ratio=1)
        row.add_column(justify="right")
        row.add_row(
            Text(f"step {last.step:,}", style="bold"),
            ProgressBar(total=1.0, completed=last.done),
            Text(f"{last.done:.0%}  {gone}{left}{self._phase}"),
        )
        return row

    def _numbers(self) -> RenderableType:
        last = self._steps[-1]
        cells = [
            ("loss", f"{last.loss:.3f}", "bright_cyan"),
            ("smoothed", f"{self._smoothed[-1]:.3f}", "cyan"),
            ("tokens/s", count(last.tokens_per_second), "white"),
            ("MFU", f"{last.mfu:.0%}", "white"),
            ("rate", f"{last.lr:.2g}", "white"),
        ]
        if self._evaluations:
            newest = self._evaluations[-1]
            cells[2:2] = [
                ("held-out", f"{newest.val_loss:.3f}", "bright_yellow"),
                ("bits/byte", f"{newest.val_bits_per_byte:.3f}", "bright_yellow"),
            ]
        best = next((event for event in reversed(self._evaluations) if event.best), None)
        if best is not None:
            cells.insert(4, ("best", f"{best.val_bits_per_byte:.3f} at {best.step:,}", "yellow"))
        for dispensable in ("rate", "MFU", "smoothed", "tokens/s", "best"):
            if sum(max(len(label), len(value)) + 3 for label, value, _ in cells) - 3 > self._width():
                cells = [cell for cell in cells if cell[0] != dispensable]
        row = Table.grid(padding=(0, 3))
        row.add_row(*(Text(label, style="dim") for label, _, _ in cells))
        row.add_row(*(Text(value, style=style) for _, value, style in cells))
        return row

    def _curve(self) -> RenderableType:
        width = max(20, min(self._width() - 9, 100))
        end = max(self._steps[-1].step / max(self._steps[-1].done, 1e-9), 1.0)
        training = [(event.step / end, value) for event, value in zip(self._steps, self._smoothed, strict=True)]
        heldout = [(event.step / end, event.val_loss) for event in self._evaluations]
        return draw_curves([(training, "cyan"), (heldout, "bright_yellow")], width, _CURVE_HEIGHT)


def _left(first: StepEvent, last: StepEvent) -> float:
    """Seconds, at the pace since the first step that was heard of: compiling came before it, and comes once."""
    seconds, done = last.seconds - first.seconds, last.done - first.done
    if done <= 0:
        seconds, done = last.seconds, max(last.done, 1e-9)
    return seconds / done * (1 - last.done)


def draw_curves(curves: Sequence[tuple[Sequence[tuple[float, float]], str]], width: int, height: int) -> RenderableType:
    """Curves of (x in [0, 1], y) with their colours, in Braille dots, the y axis labelled; later curves lie on top."""
    values = [y for points, _ in curves for _, y in points if math.isfinite(y)] or [0.0]
    low, high = min(values), max(values)
    span = max(high - low, 1e-9)
    cells = [[(0, "")] * width for _ in range(height)]
    for points, style in curves:
        for x, y in _joined(points, 2 * width):
            row = round((high - y) / span * (4 * height - 1))
            column = min(int(x * 2 * width), 2 * width - 1)
            dots, _ = cells[row // 4][column // 2]
            cells[row // 4][column // 2] = (dots | _DOTS[row % 4][column % 2], style)
    lines = []
    for index, line in enumerate(cells):
        label = {0: f"{high:7.3f} ", height - 1: f"{low:7.3f} "}.get(index, " " * 8)
        text = Text().append(label, style="dim")
        for dots, style in line:
            text.append(chr(0x2800 + dots) if dots else " ", style=style)
        lines.append(text)
    return Align.left(Group(*lines))


def _joined(points: Sequence[tuple[float, float]], columns: int) -> list[tuple[float, float]]:
    """The points with straight lines between them, a point per column."""
    joined = list(points[:1])
    for (x0, y0), (x1, y1) in pairwise(points):
        steps = max(1, int((x1 - x0) * columns))
        joined += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(1, steps + 1)]
    return [(x, y) for x, y in joined if math.isfinite(y)]
