"""Show the progress of a training run: a live panel on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tinylm.evaluation.metrics import LOSS, Metric
from tinylm.training.metrics import EvaluationEvent, GuardEvent, Observer, SampleEvent, StepEvent

from . import styles
from .console import format_count, format_duration, no_echo_of_control_keys
from .curves import LABEL_WIDTH, Axes, Curve, draw_curves, legend
from .smoothing import smoothed

_SECONDS_BETWEEN_LINES = 5.0
_STOPPING = "stopping after this step; a second Ctrl-C or SIGTERM exits immediately"
_CURVE_HEIGHT = 8
_MAX_SAMPLE_LINES = 6
_NARROW = 60
"""Below this width, the progress line is split into two lines."""
_PHASE_OF_FIRST_STEP = "first step"


class PlainView(Observer):
    """Prints a line for every evaluation and, every few seconds, a line for the current step."""

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
            f"step {event.step:>6}  {event.fraction_done:4.0%}  loss {event.loss:.4f}  "
            f"{format_count(event.tokens_per_second)} tokens/s{'' if event.mfu is None else f'  MFU {event.mfu:.0%}'}{left}",
            markup=False,
        )

    def evaluation(self, event: EvaluationEvent) -> None:
        scores = "  ".join(metric.described(value) for metric, value in event.metrics.items())
        best = "  best so far" if event.best else ""
        self._console.print(f"step {event.step:>6}  held-out {scores}{best}", markup=False)
        for name, metrics in event.metrics.by_source.items():
            scores = "  ".join(metric.described(value) for metric, value in metrics.items())
            self._console.print(f"{'':>11}  {name}: {scores}", markup=False, style="dim")

    def note(self, text: str) -> None:
        self._console.print(text, style=styles.WARNING, markup=False, soft_wrap=not self._console.is_terminal)

    def stopping(self) -> None:
        self._console.print(_STOPPING)


class TerminalView(Observer):
    """A live panel that appears when the first phase begins. Use it as a context manager. `render` returns the current content."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._steps: list[StepEvent] = []
        self._evaluations: list[EvaluationEvent] = []
        self._sample: SampleEvent | None = None
        self._phase = _PHASE_OF_FIRST_STEP
        self._stopping = False
        self._end_time: float | None = None
        self._zero_time: float | None = None
        """The start time of the run on the monotonic clock, as if the run had never been interrupted."""
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=False)
        self._last_step_time = time.monotonic()
        self._no_echo = no_echo_of_control_keys()

    def __enter__(self) -> TerminalView:
        self._no_echo.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._phase = "stopped" if error[0] or self._stopping or self._unfinished() else "done"
        self._stopping = False
        self._end_time = time.monotonic()
        self._live.stop()
        self._no_echo.__exit__(None, None, None)

    def _unfinished(self) -> bool:
        """Whether training has stopped early, for example because of --stop-after."""
        return bool(self._steps) and self._steps[-1].fraction_done < 1

    def step(self, event: StepEvent) -> None:
        if self._zero_time is None and self._live.is_started:
            self._zero_time = time.monotonic() - event.seconds
        self._add_step(event)
        if self._phase == _PHASE_OF_FIRST_STEP:
            self._phase = "training"

    def _add_step(self, event: StepEvent) -> None:
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
            self._steps, self._evaluations = [], []
            self.resumed(kept, evaluations)

    def resumed(self, steps: Sequence[StepEvent], evaluations: Sequence[EvaluationEvent]) -> None:
        for step in steps:
            self._add_step(step)
        self._evaluations += evaluations

    def phase(self, name: str) -> None:
        self._phase = name
        self._live.start()

    def note(self, text: str) -> None:
        self._console.print(text, style=styles.WARNING, markup=False)

    def stopping(self) -> None:
        self._stopping = True

    def render(self) -> RenderableType:
        if not self._steps:
            return self._panel(Text(self._phase, style="dim"))
        parts: list[RenderableType] = [self._progress(), self._numbers(), self._curve()]
        if self._sample is not None:
            parts += [Text(f"sample at step {self._sample.step:,}", style="dim"), *self._sample_lines(self._sample)]
        return self._panel(Group(*parts))

    def _sample_lines(self, sample: SampleEvent) -> list[Text]:
        """Return the first lines of a sample, wrapped to the width of the panel and without blank lines."""
        text = Text(sample.prompt, style="bold") + Text(sample.text[:1000], style="italic")
        text.expand_tabs(4)
        lines = [line for line in text.wrap(self._console, self._width()) if line.plain.strip()]
        if len(lines) > _MAX_SAMPLE_LINES:
            lines = lines[:_MAX_SAMPLE_LINES]
            lines[-1].append(" ...", style="dim")
            lines[-1].truncate(self._width(), overflow="ellipsis")
        return lines

    def _panel(self, content: RenderableType) -> RenderableType:
        subtitle = _STOPPING if self._stopping else "Ctrl-C saves and stops" if self._end_time is None else None
        if subtitle is _STOPPING and len(_STOPPING) > self._width():
            subtitle = "stopping after this step"
        return Panel(
            content,
            title=self._title,
            title_align="left",
            subtitle=None if subtitle is None else Text(subtitle, style=styles.WARNING if self._stopping else "dim"),
            subtitle_align="right",
            border_style=styles.FRAME,
            padding=(0, 1),
        )

    def _width(self) -> int:
        return self._console.width - 6

    def _progress(self) -> RenderableType:
        last, since_last = self._steps[-1], self._seconds_since_last_step()
        times = [f"{format_duration(self._elapsed_seconds())} elapsed"] if self._width() >= _NARROW else []
        if len(self._steps) > 1 and last.fraction_done < 1:
            left = _seconds_left(self._steps[0], last)
            times.append(f"{format_duration(max(0.0, left - since_last) if self._end_time is None else left)} left")
        bar = ProgressBar(
            total=1.0, completed=last.fraction_done, complete_style=styles.TRAINING, finished_style=styles.TRAINING, style="dim"
        )
        step, percent, time_text = Text(f"step {last.step:,}", style="bold"), f"{last.fraction_done:.0%}", ", ".join(times)
        if self._width() < _NARROW:
            rows = Table.grid(expand=True)
            rows.add_row(Text("  ").join(part for part in (step, Text(percent), Text(time_text), Text(self._phase)) if part))
            rows.add_row(bar)
            return rows
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column()
        row.add_column(ratio=1)
        row.add_column(justify="right")
        row.add_row(step, bar, Text("  ".join(part for part in (percent, time_text, self._phase) if part)))
        return row

    def _elapsed_seconds(self) -> float:
        """Return the training time in seconds. It never decreases, even though events arrive later than the time they report."""
        if self._zero_time is None:
            return self._steps[-1].seconds
        return max(self._steps[-1].seconds, (self._end_time or time.monotonic()) - self._zero_time)

    def _seconds_since_last_step(self) -> float:
        """Return the seconds between the last logged step and now or the end of training, or 0 before the panel appears."""
        if self._end_time is not None:
            return self._end_time - self._last_step_time
        return time.monotonic() - self._last_step_time if self._live.is_started else 0.0

    def _numbers(self) -> RenderableType:
        last = self._steps[-1]
        cells = [
            ("loss", f"{last.loss:.3f}", styles.TRAINING),
            ("tokens/s", format_count(last.tokens_per_second), ""),
            ("MFU", "-" if last.mfu is None else f"{last.mfu:.0%}", ""),
            ("lr", f"{last.lr:.2g}", ""),
        ]
        newest = self._evaluations[-1].metrics.items() if self._evaluations else []
        scores = [(_column_label(metric), metric.formatted(value), styles.HELDOUT) for metric, value in newest]
        cells[1:1] = scores
        best = next((event for event in reversed(self._evaluations) if event.best), None)
        if best is not None:
            value = best.metrics.metric.formatted(best.metrics.value)
            cells.insert(1 + len(scores), ("best", f"{value} at step {best.step:,}", styles.HELDOUT))
        extra_scores = [label for label, _, _ in scores[2:]]
        for optional in ("lr", "MFU", "tokens/s", "best", *reversed(extra_scores)):  # drop columns until they fit
            if sum(max(len(label), len(value)) + 3 for label, value, _ in cells) - 3 > self._width():
                cells = [cell for cell in cells if cell[0] != optional]
        row = Table.grid(padding=(0, 3))
        row.add_row(*(Text(label, style="dim") for label, _, _ in cells))
        row.add_row(*(Text(value, style=style) for _, value, style in cells))
        return row

    def _curve(self) -> RenderableType:
        width = max(20, min(self._width() - LABEL_WIDTH - 1, 100))
        end = max(self._steps[-1].step / max(self._steps[-1].fraction_done, 1e-9), 1.0)
        metric = self._evaluations[-1].metrics.metric if self._evaluations else LOSS
        narrow = self._width() < _NARROW
        losses = smoothed([event.loss for event in self._steps], self._steps[-1].fraction_done)
        line = [(event.step / end, loss) for event, loss in zip(self._steps, losses, strict=True)]
        training = Curve(line, styles.TRAINING, "training" if narrow else "training loss")
        points = [(event.step / end, event.metrics.value) for event in self._evaluations]
        name = "held-out" if narrow else f"held-out {metric.label}"
        heldout = Curve(points, styles.HELDOUT, name, marker="●")
        axes = Axes(x_start="step 0", x_end=f"{round(end):,}")
        if metric is LOSS:
            curves = [training, heldout] if points else [training]
            return Group(
                legend(curves, "nats/token", indent=0 if narrow else LABEL_WIDTH), draw_curves(curves, width, _CURVE_HEIGHT, axes)
            )
        half = _CURVE_HEIGHT // 2
        return Group(  # two charts, because the two metrics are not comparable
            legend([training], "nats/token"),
            draw_curves([training], width, half),
            legend([heldout], ""),
            draw_curves([heldout], width, half, Axes(metric.format, axes.x_start, axes.x_end)),
        )


def _seconds_left(first: StepEvent, last: StepEvent) -> float:
    """Estimate the remaining seconds from the speed since the first logged step, which excludes compilation."""
    seconds, done = last.seconds - first.seconds, last.fraction_done - first.fraction_done
    if done <= 0:
        seconds, done = last.seconds, max(last.fraction_done, 1e-9)
    return seconds / done * (1 - last.fraction_done)


def _column_label(metric: Metric) -> str:
    return "held-out" if metric is LOSS else metric.label.replace(" per ", "/")  # the `loss` column is the training loss
