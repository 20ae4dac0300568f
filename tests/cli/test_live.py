"""Test that the views of a training run show the numbers in the events that they receive."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console
from tinylm_cli.curves import Axes, Curve, draw_curves, legend
from tinylm_cli.live import PlainView, TerminalView

from tinylm.evaluation.metrics import Metrics
from tinylm.training.metrics import EvaluationEvent, GuardEvent, Observer, SampleEvent, StepEvent

LOSSES = [6.0, 5.0, 4.5, 4.25]


def console(width: int = 110, *, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, highlight=False)


def written(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def step(number: int, loss: float, *, seconds: float | None = None, steps: int = 8) -> StepEvent:
    spent = 10.0 * number if seconds is None else seconds
    return StepEvent(number, 100 * number, loss, 3e-3, 1.0, 12_345.0, 0.37, spent, number / steps)


def send_events(view: Observer) -> None:
    """Send four of eight steps, one sample, and an evaluation after the second step (the best one) and after the fourth."""
    view.phase("first step")
    for number, loss in enumerate(LOSSES, 1):
        view.step(step(number, loss))
        if number in (2, 4):
            seconds = 10.0 * number
            metrics = Metrics("loss", {"loss": 5.5 + number, "bits_per_byte": 2.25 + number})
            view.evaluation(EvaluationEvent(number, 100 * number, metrics, 0.9 * seconds, seconds, number == 2))
    view.sample(SampleEvent(4, "The for", " statement\nis  used"))
    view.phase("training")


def rendered_panel(width: int = 110) -> str:
    target = console(width)
    view = TerminalView(target, "tinylm train tiny")
    send_events(view)
    target.print(view.render())
    return written(target)


def test_plain_lines_show_the_numbers() -> None:
    target = console()
    send_events(PlainView(target))
    lines = [re.sub(" +", " ", line) for line in written(target).splitlines()]
    assert lines[0] == "step 1 12% loss 6.0000 12.3k tokens/s MFU 37%"
    assert lines[1] == "step 2 25% loss 5.0000 12.3k tokens/s MFU 37% 1:00 left"
    assert lines[2] == "step 2 held-out loss 7.5000 4.2500 bits per byte best so far"
    assert lines[-1] == "step 4 held-out loss 9.5000 6.2500 bits per byte"


def test_plain_lines_are_printed_at_most_every_few_seconds() -> None:
    target = console()
    view = PlainView(target)
    for number in range(1, 101):
        view.step(step(number, 1.0, seconds=number * 0.1, steps=100))
    assert len(written(target).splitlines()) == 2


def test_the_time_left_does_not_include_compilation() -> None:
    """The first step includes a minute of compilation. Every later step takes a second."""
    target, panel = console(), console(width=110)
    plain, live = PlainView(target), TerminalView(panel, "tinylm train tiny")
    for number in range(1, 12):
        event = step(number, 1.0, seconds=60.0 + number, steps=100)
        plain.step(event)
        live.step(event)
    panel.print(live.render())
    assert "1:29 left" in written(panel)
    assert written(target).splitlines()[-1].endswith("1:29 left")


def test_the_panel_shows_the_numbers() -> None:
    panel = rendered_panel()
    numbers = (
        "step 4",
        "50%",
        "0:40 elapsed, 0:40 left",
        "4.250",
        "9.500",
        "6.250",
        "7.5000 at step 2",
        "12.3k",
        "37%",
        "0.003",
        "training",
    )
    for number in numbers:
        assert number in panel, number
    assert "sample at step 4" in panel
    lines = [line.strip("│ ") for line in panel.splitlines()]
    assert lines[lines.index("The for statement") + 1] == "is  used", "the lines of a sample are kept"


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_the_panel_fits_the_width_and_keeps_the_important_numbers(width: int) -> None:
    panel = rendered_panel(width)
    assert all(len(line) <= width for line in panel.splitlines())
    for text in ("step 4", "50%", "loss", "held-out", "bits/byte", "4.250", "9.500", "6.250"):
        assert text in panel, text


def test_a_resumed_run_shows_the_curve_of_the_previous_steps() -> None:
    views = [TerminalView(console(), "tinylm train tiny") for _ in range(2)]
    steps = [step(number, loss) for number, loss in enumerate(LOSSES, 1)]
    evaluations = [EvaluationEvent(2, 200, Metrics("loss", {"loss": 5.0, "bits_per_byte": 4.25}), 18.0, 20.0, True)]
    views[0].resumed(steps[:3], evaluations)
    views[0].step(steps[3])
    for event in steps[:2]:
        views[1].step(event)
    views[1].evaluation(evaluations[0])
    for event in steps[2:]:
        views[1].step(event)
    panels = []
    for view in views:
        target = console()
        target.print(view.render())
        panels.append(written(target))
    assert panels[0] == panels[1]
    assert "5.0000 at step 2" in panels[0]


def test_a_rollback_removes_the_later_part_of_the_curve() -> None:
    target, view = console(), TerminalView(console(), "tinylm train tiny")
    send_events(view)
    view.guard(GuardEvent("rollback", 2, 32, "the loss is nan"))
    target.print(view.render())
    assert "step 2" in written(target)
    assert "step 4" not in written(target).split("sample at step")[0]


def test_the_panel_shows_the_phase_before_the_first_step() -> None:
    target = console()
    view = TerminalView(target, "tinylm train tiny")
    target.print(view.render())
    assert "first step" in written(target)


def test_a_note_is_shown_without_markup() -> None:
    for view in (PlainView(plain := console()), TerminalView(panel := console(), "tinylm train tiny")):
        view.note("out of memory: continuing with [2] micro-batches")
    for target in (plain, panel):
        assert "out of memory: continuing with [2] micro-batches" in written(target)


def test_the_panel_shows_that_training_will_stop() -> None:
    target = console(terminal=True)
    with TerminalView(target, "tinylm train tiny") as view:
        send_events(view)
        view.stopping()
        target.print(view.render())
    assert "stopping after this step" in written(target)
    assert "0:40 left  stopped" in written(target)


def test_the_panel_shows_a_nan_loss() -> None:
    target = console()
    view = TerminalView(target, "tinylm train tiny")
    view.step(step(1, math.nan))
    target.print(view.render())
    assert "nan" in written(target)


def braille(points: set[tuple[int, int]], width: int, height: int) -> list[str]:
    """Return lines of braille characters with dots at the given (column, row) points.

    Unicode numbers the dots of a character 1 2 3 (left column), 4 5 6 (right column) and 7 8 (bottom row).
    """
    numbers = {(0, 0): 1, (0, 1): 2, (0, 2): 3, (1, 0): 4, (1, 1): 5, (1, 2): 6, (0, 3): 7, (1, 3): 8}
    lines = []
    for y in range(height):
        line = ""
        for x in range(width):
            bits = sum(1 << (n - 1) for (dx, dy), n in numbers.items() if (2 * x + dx, 4 * y + dy) in points)
            line += chr(0x2800 + bits) if bits else " "
        lines.append(line)
    return lines


def drawn(points: list[tuple[float, float]], width: int, height: int) -> list[str]:
    target = console(width + 20)
    target.print(draw_curves([Curve(points, "blue")], width, height))
    return [line[8:].rstrip() for line in written(target).splitlines()]


def test_curves_match_dots_computed_independently() -> None:
    width, height = 6, 3
    falling = [(x / 12, 11.0 - x) for x in range(12)]
    assert drawn(falling, width, height) == [line.rstrip() for line in braille({(x, x) for x in range(12)}, width, height)]
    flat = [(x / 12, 2.0) for x in range(12)]
    assert drawn(flat, width, height) == [line.rstrip() for line in braille({(x, 0) for x in range(12)}, width, height)]
    corners = [(0.0, 1.0), (1.0, 0.0)]
    line = drawn(corners, width, height)
    assert line[0][0] != " "
    assert line[-1][-1] != " "
    assert all(row.strip() for row in line), "distant points are connected"


def test_the_axis_is_labeled_with_minimum_and_maximum() -> None:
    target = console(40)
    target.print(draw_curves([Curve([(0.0, 7.5), (0.5, 1.25)], "blue"), Curve([(0.5, 9.0)], "red")], 20, 4))
    lines = written(target).splitlines()
    assert lines[0].startswith("  9.000 ")
    assert lines[-1].startswith("  1.250 ")


def test_the_ends_of_the_x_axis_are_labeled() -> None:
    target = console(40)
    target.print(draw_curves([Curve([(0.0, 2.0), (1.0, 1.0)], "blue")], 20, 4, Axes(x_start="step 0", x_end="450")))
    assert written(target).splitlines()[-1].rstrip() == " " * 8 + "step 0" + " " * 11 + "450"


def test_curves_can_be_told_apart_without_color() -> None:
    curves = [Curve([(0.0, 2.0), (1.0, 1.0)], "blue", "training loss"), Curve([(0.5, 1.0)], "red", "held-out loss", marker="●")]
    target = console(60)
    target.print(legend(curves, "nats/token"), draw_curves(curves, 20, 4))
    heading, *chart = written(target).splitlines()
    assert heading.strip().split("  ") == ["⠤⠤ training loss", "● held-out loss", "nats/token"]
    assert "".join(chart).count("●") == 1


@pytest.mark.parametrize("width", [45, 80, 120])
def test_the_panel_has_a_legend_and_units_at_every_width(width: int) -> None:
    panel = rendered_panel(width)
    assert panel.count("●") == 3, "in the legend and at two evaluations"
    legend_line = next(line for line in panel.splitlines() if "⠤⠤ training" in line)
    assert "nats/token" in legend_line
    assert "step 0" in panel


def test_the_elapsed_time_never_decreases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The events arrive with delays of three, three, five and one seconds."""
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    target, view = console(), TerminalView(console(terminal=True), "tinylm train tiny")
    view.phase("first step")
    with view:
        for number, (now, seconds) in enumerate(((1003.0, 0.0), (1013.0, 10.0), (1025.0, 20.0), (1031.0, 30.0)), 1):
            for clock[0] in (now - 0.5, now):
                target.print(view.render())
            view.step(step(number, 2.0, seconds=seconds))
            target.print(view.render())
    shown = [60 * int(minutes) + int(seconds) for minutes, seconds in re.findall(r"(\d+):(\d+) elapsed", written(target))]
    assert len(shown) >= 9
    assert shown == sorted(shown)


def test_the_phase_is_training_after_the_first_step() -> None:
    target = console(terminal=True)
    with TerminalView(target, "tinylm train tiny") as view:
        view.phase("first step")
        view.step(step(1, 6.0))
        target.print(view.render())
    assert "training  " not in written(target).split("first step")[0]
    assert " training " in written(target).split("first step")[-1]


def test_a_run_that_stops_early_without_a_signal_is_not_shown_as_done() -> None:
    target = console()
    with TerminalView(target, "tinylm train tiny") as view:
        send_events(view)
    target.print(view.render())
    last = written(target).split("╭")[-1]
    assert "stopped" in last
    assert "done" not in last
