"""`tinylm compare` for translation models: the difference in BLEU on the same sentences, with a paired bootstrap interval."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .console import ConsoleReporter, print_json, stderr_console, stdout_console

if TYPE_CHECKING:
    from tinylm.run import Run


def compare(
    runs: list[Run], sources: list[str], split: str, document: dict[str, Any], *, device: str, json: bool, quiet: bool
) -> None:
    """Compare the first run with each of the others and print the results. `document` has the other keys of the JSON output."""
    from tinylm.translation.evaluate import compare_translators

    reporter = ConsoleReporter(stderr_console(), quiet=quiet)
    first, *others = runs
    tests = [(run, compare_translators(first, run, sources, split=split, device=device, reporter=reporter)) for run in others]
    if json:
        compared = [{"a": str(first.path), "b": str(run.path), **asdict(test)} for run, test in tests]
        print_json({**document, "tests": compared})
        return
    for run, test in tests:
        low, high = test.ci95
        stdout_console().print(
            f"BLEU: {first.path} {test.a_bleu:.2f}, {run.path} {test.b_bleu:.2f}; difference {test.difference:+.2f} "
            f"(95% interval {low:+.2f} to {high:+.2f}, p = {test.p_value:.3f})",
            soft_wrap=True,
        )
