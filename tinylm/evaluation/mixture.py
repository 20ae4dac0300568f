"""Evaluate a model separately on each source of a mixture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from tinylm.data.shards import Shard
from tinylm.data.source_spans import Span

Result = TypeVar("Result")
Progress = Callable[[int], None]
Evaluate = Callable[[Shard, int | None, Progress], Result]
"""A function that evaluates a model on (the text, the maximum number of tokens, a function that receives the progress)."""


def evaluate_sources(
    evaluate: Evaluate[Result], shard: Shard, spans: Sequence[Span], max_tokens: int | None, on_progress: Progress
) -> dict[str, Result]:
    """Return the result on each source that has any held-out text.

    With `max_tokens`, evaluate on the beginning of each source, in proportion to its number of tokens.
    """
    total = sum(span.tokens for span in spans)
    results: dict[str, Result] = {}
    done = 0
    for span in spans:
        limit = None if max_tokens is None or max_tokens >= total else max(1, max_tokens * span.tokens // total)
        if not span.tokens:
            continue
        before = done
        results[span.source] = evaluate(span.of(shard), limit, lambda tokens, before=before: on_progress(before + tokens))  # type: ignore[misc]
        done += span.tokens if limit is None else min(limit, span.tokens)
    return results
