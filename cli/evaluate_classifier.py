"""`tinylm eval` for classifiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .console import ConsoleReporter, escaped, pluralize, print_fields, print_json, stderr_console, stdout_console
from .evaluation_request import EvaluationRequest

if TYPE_CHECKING:
    from tinylm.evaluation.evaluate_classifier import ClassifierEvaluation

OPTIONS = ("split", "field", "label", "mistakes", "no_baselines", "plot")
"""The `tinylm eval` options that apply to classifiers."""
ENSEMBLES = True
"""Whether an ensemble of several models can be evaluated."""
_MAX_COLUMNS = 16
"""With more labels than this, only the most frequent confusions are printed instead of the whole matrix."""
_MAX_CONFUSIONS = 15
_MAX_WIDTH = 80
"""Longer texts of mistakes are shortened to this number of characters."""
_NAMES = {"majority": "majority label", "tfidf_linear": "TF-IDF + linear"}


def evaluate(request: EvaluationRequest) -> None:
    """Evaluate `request.run` and print the result."""
    from tinylm.evaluation.confusion_plot import check_drawable, draw
    from tinylm.evaluation.evaluate_classifier import evaluate_classifier

    if request.plot is not None:
        check_drawable(request.plot)
    result = evaluate_classifier(
        request.ensemble,
        request.sources,
        split=request.split,
        text_field=request.text_field,
        label_field=request.label,
        baselines=not request.no_baselines,
        mistakes=request.mistakes,
        device=request.device,
        reporter=ConsoleReporter(stderr_console(), quiet=request.quiet),
    )
    if request.plot is not None:
        draw(result.scores.confusion, result.labels, request.plot)
        if not request.quiet:
            stderr_console().print_line(f"wrote {request.plot}", "dim")
    if request.json:
        print_json(result.as_dict())
        return
    console = stdout_console()
    _print_totals(console, result)
    _print_labels(console, result)
    _print_confusion(console, result)
    _print_mistakes(console, result)


def _print_totals(console: Console, result: ClassifierEvaluation) -> None:
    scores = result.scores
    low, high = scores.accuracy_ci95
    model = f"the mean probabilities of {len(result.members)} models" if result.members else f"{result.run} {result.checkpoint}"
    rows = [
        ("texts", f"{result.text}: {pluralize(scores.examples, 'text')}, {pluralize(len(result.labels), 'label')}"),
        ("model", model),
        ("accuracy", f"{scores.accuracy:.2%}  (95% interval {low:.2%} to {high:.2%})"),
        ("macro F1", f"{scores.macro_f1:.4f}"),
    ]
    if result.unseen == scores.examples:
        rows.append(("unknown labels", "no text has a label that the model knows; all are counted as mistakes"))
    else:
        rows += [("loss", f"{scores.loss:.4f} nats per text"), ("calibration", _calibration(result.calibration))]
        if result.unseen:
            known = f"{pluralize(result.unseen, 'text')} with a label that the model does not have; counted as mistakes"
            rows.append(("unknown labels", known))
    for name, baseline in result.baselines.items():
        interval = _difference(scores.accuracy - baseline.accuracy, baseline.difference_ci95)
        rows.append((_NAMES[name], f"{baseline.accuracy:.2%}; difference (model - baseline) {interval}"))
    for member in result.members:
        interval = _difference(scores.accuracy - member.accuracy, member.difference_ci95)
        rows.append(("member", f"{member.accuracy:.2%} for {member.member.name}; difference (ensemble - member) {interval}"))
    print_fields(console, rows)


def _calibration(temperature: float) -> str:
    comment = "above 1: the model is overconfident" if temperature > 1 else "below 1: the model is underconfident"
    return f"a temperature of {temperature:.3f} fits these texts best ({comment})"


def _difference(value: float, interval: tuple[float, float]) -> str:
    """Format a difference of accuracies and its interval in percentage points."""
    low, high = interval
    return f"{100 * value:+.2f} points  (95% interval {100 * low:+.2f} to {100 * high:+.2f})"


def _print_labels(console: Console, result: ClassifierEvaluation) -> None:
    console.print()
    table = _table()
    for column in ("precision", "recall", "F1", "texts"):
        table.add_column(column, justify="right")
    table.add_column("label")
    for label, row in zip(result.labels, result.scores.per_label, strict=True):
        table.add_row(f"{row.precision:.4f}", f"{row.recall:.4f}", f"{row.f1:.4f}", f"{row.count:,}", Text(escaped(label)))
    console.print(table)


def _print_confusion(console: Console, result: ClassifierEvaluation) -> None:
    confusion, labels = result.scores.confusion, result.labels
    if len(labels) <= _MAX_COLUMNS:
        _print_title(console, "confusion matrix: rows are true labels, columns are predicted labels")
        table = _table()
        for label in labels:
            table.add_column(Text(escaped(label)), justify="right")
        table.add_column("")
        for label, row in zip(labels, confusion, strict=True):
            table.add_row(*(f"{count:,}" for count in row), Text(escaped(label)))
        console.print(table)
        return
    pairs = [(int(confusion[i, j]), i, j) for i in range(len(labels)) for j in range(len(labels)) if i != j and confusion[i, j]]
    _print_title(console, "most frequent confusions (--plot draws the whole matrix)")
    table = _table()
    table.add_column("texts", justify="right")
    table.add_column("true label")
    table.add_column("predicted")
    for count, true, predicted in sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:_MAX_CONFUSIONS]:
        table.add_row(f"{count:,}", Text(escaped(labels[true])), Text(escaped(labels[predicted])))
    console.print(table)


def _print_mistakes(console: Console, result: ClassifierEvaluation) -> None:
    if not result.mistakes:
        return
    _print_title(console, "most confident mistakes")
    table = _table()
    table.add_column("probability", justify="right")
    table.add_column("predicted")
    table.add_column("true label")
    table.add_column("text")
    for mistake in result.mistakes:
        text = " ".join(mistake.text.split())
        labels = Text(escaped(mistake.predicted)), Text(escaped(mistake.label))
        table.add_row(f"{mistake.probability:.4f}", *labels, Text(_shortened(text)))
    console.print(table)


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_WIDTH else text[: _MAX_WIDTH - 1] + "…"


def _print_title(console: Console, title: str) -> None:
    """Print the title of a table on its own line, because `rich` limits a title to the width of the table."""
    console.print()
    console.print(title, style="italic")


def _table() -> Table:
    return Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
