"""`tinylm eval` for models that were fine-tuned on conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .console import ConsoleReporter, pluralize, print_fields, print_json, stderr_console, stdout_console
from .evaluation_request import EvaluationRequest

if TYPE_CHECKING:
    from tinylm.generation.chat_evaluation import Answer

OPTIONS = ("split", "mistakes")
"""The `tinylm eval` options that have an effect when a chat model is evaluated on its own conversations."""


def evaluate(request: EvaluationRequest) -> None:
    """Evaluate `request.run` on its held-out or test conversations, and print the result."""
    from tinylm.generation.chat_evaluation import evaluate_chat_run

    result = evaluate_chat_run(
        request.run,
        split=request.split,
        checkpoint=request.checkpoint,
        device=request.device,
        reporter=ConsoleReporter(stderr_console(), quiet=request.quiet),
    )
    document = result.as_dict()
    mistakes = [answer for answer in result.answers if not answer.exact][: request.mistakes]
    if request.json:
        print_json(document | {"mistakes": [_document(answer) for answer in mistakes]})
        return
    scores, part = result.scores, {"heldout": "held-out", "test": "test"}[result.split]
    rows = [
        ("conversations", f"{scores.conversations:,} {part}; {pluralize(scores.tokens, 'answer token')}"),
        ("model", f"{result.run} {result.checkpoint}"),
        ("loss", f"{scores.loss:.4f} nats per answer token, including end-of-turn tokens"),
        ("exact match", _rate(document, "exact_match")),
        (
            "stop rate",
            _rate(document, "stop_rate") + ("" if document["stop_rate"] in (None, 1.0) else "; the other answers were truncated"),
        ),
    ]
    if scores.skipped:
        rows.insert(1, ("skipped", f"{pluralize(scores.skipped, 'conversation')} whose last answer is longer than the context"))
    console = stdout_console()
    print_fields(console, rows)
    for answer in mistakes:
        console.print(f"\n> {answer.question}", style="dim")
        console.print(f"expected   {answer.expected}")
        console.print(f"generated  {answer.text}{'' if answer.stopped else ' ... (did not stop)'}")


def _rate(document: dict[str, Any], key: str) -> str:
    low, high = document[f"{key}_ci95"]
    return f"{document[key]:.1%} of {pluralize(document['answers'], 'answer')}  (95% interval {low:.1%} to {high:.1%})"


def _document(answer: Answer) -> dict[str, Any]:
    return {"question": answer.question, "expected": answer.expected, "text": answer.text, "stopped": answer.stopped}
