"""The view of vectors as they form: a panel with the loss and the probes' neighbours, plain lines off a terminal."""

from __future__ import annotations

import math
import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tinylm.embedding_pipeline import EmbeddingObserver, NeighboursEvent, ProgressEvent

from .console import count, duration
from .live import draw_curves

_PLAIN_EVERY_SECONDS = 5.0
_STOPPING = "stopping after this step; once more stops at once"
_CURVE_HEIGHT = 6


class QuietEmbeddingView(EmbeddingObserver):
    """Says nothing."""


def _left(event: ProgressEvent) -> float:
    return event.seconds * (event.steps - event.step) / max(event.step, 1)


class PlainEmbeddingView(EmbeddingObserver):
    """A line every few seconds, and what is near the probes when that is looked at."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said = -math.inf

    def begin(self, unit: str) -> None:
        self.unit = unit

    def progress(self, event: ProgressEvent) -> None:
        if time.monotonic() - self._said < _PLAIN_EVERY_SECONDS and event.step < event.steps:
            return
        self._said = time.monotonic()
        self._console.print(
            f"{event.step / event.steps:4.0%}  epoch {event.epoch:.2f}  loss {event.loss:.4f}  "
            f"{count(event.tokens_per_second)} {self.unit}/s  {duration(_left(event))} left",
            markup=False,
        )

    def neighbours(self, event: NeighboursEvent) -> None:
        for probe, near in event.neighbours.items():
            self._console.print(f"      {probe}: {', '.join(near)}", markup=False, style="dim", soft_wrap=True)

    def stopping(self) -> None:
        self._console.print(_STOPPING)


class TerminalEmbeddingView(EmbeddingObserver):
    """The live panel. Use it as a context manager; `render` gives it as it stands."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._events: list[ProgressEvent] = []
        self._near: NeighboursEvent | None = None
        self._below: str | None = "Ctrl-C saves and stops"
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=False)

    def __enter__(self) -> TerminalEmbeddingView:
        return self

    def __exit__(self, *_: object) -> None:
        self._below = None
        self._live.stop()

    def begin(self, unit: str) -> None:
        self.unit = unit
        self._live.start()

    def progress(self, event: ProgressEvent) -> None:
        self._events.append(event)

    def neighbours(self, event: NeighboursEvent) -> None:
        self._near = event

    def stopping(self) -> None:
        self._below = _STOPPING

    def render(self) -> RenderableType:
        if not self._events:
            return self._panel(Text("first steps", style="dim"))
        parts = [self._progress(), self._curve()]
        if self._near is not None:
            table = Table.grid(padding=(0, 2))
            for probe, near in self._near.neighbours.items():
                table.add_row(Text(probe, style="bold"), Text(", ".join(near), style="italic", overflow="ellipsis", no_wrap=True))
            parts.append(table)
        return self._panel(Group(*parts))

    def _panel(self, content: RenderableType) -> RenderableType:
        below = None if self._below is None else Text(self._below, style="dim")
        return Panel(
            content,
            title=self._title,
            title_align="left",
            subtitle=below,
            subtitle_align="right",
            border_style="cyan",
            padding=(0, 1),
        )

    def _progress(self) -> RenderableType:
        last = self._events[-1]
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column()
        row.add_column(ratio=1)
        row.add_column(justify="right")
        row.add_row(
            Text(f"epoch {last.epoch:.1f}", style="bold"),
            ProgressBar(total=1.0, completed=last.step / last.steps),
            Text(f"loss {last.loss:.3f}  {count(last.tokens_per_second)} {self.unit}/s  {duration(_left(last))} left"),
        )
        return row

    def _curve(self) -> RenderableType:
        width = max(20, min(self._console.width - 15, 100))
        points = [(event.step / event.steps, event.loss) for event in self._events]
        return draw_curves([(points, "cyan")], width, _CURVE_HEIGHT)
