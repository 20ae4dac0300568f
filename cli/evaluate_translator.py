"""`tinylm eval` for translation models."""

from __future__ import annotations

from rich.table import Table

from .console import ConsoleReporter, pluralize, print_fields, print_json, stderr_console, stdout_console
from .evaluation_request import EvaluationRequest

OPTIONS = ("split", "no_baselines", "hardest", "max_pairs")
"""The `tinylm eval` options that apply to translation models."""
_NAMES = {"copy": "copy of the source", "memory": "most similar training sentence", "word_by_word": "word by word (IBM model 1)"}


def evaluate(request: EvaluationRequest) -> None:
    """Evaluate `request.run` and print the result."""
    from tinylm.translation.evaluate import TranslationEvaluationOptions, evaluate_translator

    result = evaluate_translator(
        request.run,
        request.sources,
        options=TranslationEvaluationOptions(
            split=request.split,
            max_pairs=request.max_pairs,
            baselines=not request.no_baselines,
            hardest=request.hardest,
        ),
        checkpoint=request.checkpoint,
        device=request.device,
        reporter=ConsoleReporter(stderr_console(), quiet=request.quiet),
    )
    document = result.as_dict()
    if request.json:
        print_json(document)
        return
    scores = result.scores
    print_fields(
        stdout_console(),
        [
            ("text", f"{result.text}: {pluralize(result.pairs, 'pair')}, {pluralize(result.target_tokens, 'target token')}"),
            ("model", f"{result.run} {result.checkpoint}, {result.beams} beams, length penalty {result.length_penalty:g}"),
            ("BLEU", f"{scores.bleu:.2f}{_interval(scores.bleu_ci95)}"),
            ("chrF", f"{scores.chrf:.2f}{_interval(scores.chrf_ci95)}"),
            ("exact", f"{result.exact:.2%} of the translations match their reference"),
            ("signature", scores.bleu_signature),
            ("loss", f"{result.loss:.4f} nats per target token"),
            ("perplexity", f"{document['perplexity']:.3f} per target token"),
        ],
    )
    if result.baselines:
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), title=" ")
        for name, justify in (("BLEU", "right"), ("chrF", "right"), ("model minus baseline", "left"), ("baseline", "left")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for name, baseline in result.baselines.items():
            paired = result.against_baselines[name]
            difference = f"{paired.difference:+.2f}{_interval(paired.ci95)}"
            table.add_row(f"{baseline.bleu:.2f}", f"{baseline.chrf:.2f}", difference, _NAMES[name])
        stdout_console().print(table)
    for sentence in result.hardest:
        rows = [
            ("loss", f"{sentence.loss:.3f} nats per target token"),
            ("source", sentence.source),
            ("reference", sentence.reference),
        ]
        stdout_console().print()
        print_fields(stdout_console(), [*rows, ("translation", sentence.translation)])


def _interval(ci95: tuple[float, float] | None) -> str:
    return "" if ci95 is None else f"  (95% interval {ci95[0]:.2f} to {ci95[1]:.2f})"
