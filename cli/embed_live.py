"""Show the progress of embedding training: a live panel with the loss and neighbors on a terminal, plain lines otherwise."""

from __future__ import annotations

import math
import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tinylm.embedding_pipeline import EmbeddingObserver, NeighborsEvent, ProgressEvent

from . import styles
from .console import format_count, format_duration
from .curves import Curve, draw_curves

_SECONDS_BETWEEN_LINES = 5.0
_STOPPING = "stopping after this step; a second Ctrl-C or SIGTERM exits immediately"
_CURVE_HEIGHT = 6


class QuietEmbeddingView(EmbeddingObserver):
    """A view that prints nothing."""


def _remaining_seconds(event: ProgressEvent) -> float:
    return event.seconds * (event.steps - event.step) / max(event.step, 1)


class PlainEmbeddingView(EmbeddingObserver):
    """Prints a progress line every few seconds, and the neighbors of the probe words."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_printed = -math.inf

    def begin(self, unit: str) -> None:
        self.unit = unit

    def progress(self, event: ProgressEvent) -> None:
        if time.monotonic() - self._last_printed < _SECONDS_BETWEEN_LINES and event.step < event.steps:
            return
        self._last_printed = time.monotonic()
        self._console.print(
            f"{event.step / event.steps:4.0%}  epoch {event.epoch:.2f}  loss {event.loss:.4f}  "
            f"{format_count(event.tokens_per_second)} {self.unit}/s  {format_duration(_remaining_seconds(event))} left",
            markup=False,
        )

    def neighbors(self, event: NeighborsEvent) -> None:
        self._console.print(f"      nearest neighbors after step {event.step:,}:", markup=False, style="dim")
        for probe, names in event.neighbors.items():
            self._console.print(f"      {probe}: {', '.join(names)}", markup=False, style="dim", soft_wrap=True)

    def stopping(self) -> None:
        self._console.print(_STOPPING)


class TerminalEmbeddingView(EmbeddingObserver):
    """A live panel, used as a context manager. `render` returns the current content."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._events: list[ProgressEvent] = []
        self._neighbors: NeighborsEvent | None = None
        self._subtitle: str | None = "press Ctrl-C to save and stop"
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=False)

    def __enter__(self) -> TerminalEmbeddingView:
        return self

    def __exit__(self, *_: object) -> None:
        self._subtitle = None
        self._live.stop()

    def begin(self, unit: str) -> None:
        self.unit = unit
        self._live.start()

    def progress(self, event: ProgressEvent) -> None:
        self._events.append(event)

    def neighbors(self, event: NeighborsEvent) -> None:
        self._neighbors = event

    def stopping(self) -> None:
        self._subtitle = _STOPPING

    def render(self) -> RenderableType:
        if not self._events:
            return self._panel(Text("running the first steps", style="dim"))
        parts = [self._progress(), self._curve()]
        if self._neighbors is not None:
            table = Table.grid(padding=(0, 2))
            for probe, names in self._neighbors.neighbors.items():
                table.add_row(Text(probe, style="bold"), Text(", ".join(names), style="italic", overflow="ellipsis", no_wrap=True))
            parts.append(table)
        return self._panel(Group(*parts))

    def _panel(self, content: RenderableType) -> RenderableType:
        subtitle = None if self._subtitle is None else Text(self._subtitle, style="dim")
        return Panel(
            content,
            title=self._title,
            title_align="left",
            subtitle=subtitle,
            subtitle_align="right",
            border_style=styles.FRAME,
            padding=(0, 1),
        )

    def _progress(self) -> RenderableType:
        last = self._events[-1]
        throughput, remaining = f"{format_count(last.tokens_per_second)} {self.unit}/s", format_duration(_remaining_seconds(last))
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column()
        row.add_column(ratio=1)
        row.add_column(justify="right")
        row.add_row(
            Text(f"epoch {last.epoch:.1f}", style="bold"),
            ProgressBar(total=1.0, completed=last.step / last.steps),
            Text(f"loss {last.loss:.3f}  {throughput}  {remaining} left"),
        )
        return row

    def _curve(self) -> RenderableType:
        width = max(20, min(self._console.width - 15, 100))
        points = [(event.step / event.steps, event.loss) for event in self._events]
        return draw_curves([Curve(points, styles.TRAINING)], width, _CURVE_HEIGHT)
