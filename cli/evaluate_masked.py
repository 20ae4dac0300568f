"""`tinylm eval` for masked language models."""

from __future__ import annotations

from .console import ConsoleReporter, pluralize, print_fields, print_json, stderr_console, stdout_console
from .evaluation_request import EvaluationRequest

OPTIONS = ("split", "field", "template", "errors", "pseudo", "max_tokens")
"""The `tinylm eval` options that apply to masked language models."""


def evaluate(request: EvaluationRequest) -> None:
    """Evaluate `request.run` and print the result."""
    from tinylm.evaluation.evaluate_masked_run import evaluate_masked_run, interval_text
    from tinylm.evaluation.evaluate_run import TextFormat

    result = evaluate_masked_run(
        request.run,
        request.sources,
        split=request.split,
        pseudo=request.pseudo,
        max_tokens=request.max_tokens,
        text_format=TextFormat(request.field, request.template, request.errors),
        checkpoint=request.checkpoint,
        device=request.device,
        reporter=ConsoleReporter(stderr_console(), quiet=request.quiet),
    )
    document = result.as_dict()
    if request.json:
        print_json(document)
        return
    scores = result.scores
    sizes = ((scores.documents, "document"), (scores.bytes, "byte"), (scores.tokens, "token"))
    rows = [
        ("text", f"{result.text}: {', '.join(pluralize(*size) for size in sizes)}"),
        ("model", f"{result.run} {result.checkpoint}"),
        ("masked", f"{scores.masked:,} tokens ({document['rate']:.0%} of all tokens; every evaluation masks the same ones)"),
        ("masked accuracy", f"{scores.accuracy:.2%}  ({interval_text(scores.accuracy_ci95, '.2%')})"),
        ("masked loss", f"{scores.loss:.4f} nats per masked token  ({interval_text(scores.loss_ci95, '.4f')})"),
    ]
    if result.pseudo is not None:
        interval = interval_text(tuple(document["pseudo_perplexity_ci95"]), ".3f")
        rows.append(("pseudo-perplexity", f"{document['pseudo_perplexity']:.3f} per token, each masked in turn  ({interval})"))
    print_fields(stdout_console(), rows)
