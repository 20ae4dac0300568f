"""Evaluate a run with lm-evaluation-harness. `run_tasks` runs tasks, and `adapter` implements the harness's model interface.

Whole texts (`loglikelihood_rolling`) are scored in the same windows as in `tinylm eval`, so both report the same perplexity. The
harness's own adapter for transformers differs slightly because it gives the last window of a text more context.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinylm import device as devices
from tinylm.cost.memory import EVALUATION_BATCH_LOGITS, EVALUATION_BATCH_TOKENS
from tinylm.errors import InputError, TinylmError, WorkError
from tinylm.evaluation.perplexity import sliding_windows
from tinylm.evaluation.scoring import token_losses
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.interchange import verify
from tinylm.model.base import Model
from tinylm.run import Run
from tinylm.tokenizer import Tokenizer

_BOOTSTRAP_ITERATIONS = 1000
_DEFAULT_NEW_TOKENS = 256
"""Maximum number of generated tokens for a task that does not set one. The harness's own adapters use the same value."""


@dataclass(frozen=True)
class HarnessResult:
    """A run's scores. `results` maps task -> metric -> value, and standard errors are separate metrics."""

    run: str
    checkpoint: str
    step: int
    harness: str
    """The version of lm-eval."""
    results: dict[str, dict[str, float]]


@dataclass(frozen=True)
class ScoredSpan:
    """A sequence in which the last `count` ids are scored. Each is conditioned on all ids before it."""

    ids: Sequence[int]
    count: int


def run_tasks(
    run: Run,
    tasks: Sequence[str],
    *,
    checkpoint: str | None = None,
    stride: int | None = None,
    limit: int | None = None,
    device: str = "auto",
) -> HarnessResult:
    """Evaluate a run on tasks, given as names of the harness's own tasks or as paths to task files (.yaml).

    `limit` is the number of documents per task, taken from the beginning. `stride` has the same meaning as in `tinylm eval`. Raises
    `InputError` if lm-eval is not installed, or if a task is unknown or unreadable. Raises `WorkError` if a task fails.
    """
    harness = verify.require("lm_eval", "harness", "running lm-evaluation-harness tasks")
    from lm_eval.tasks import TaskManager

    names, folders = _resolve_tasks(tasks)
    chosen = run.checkpoint(checkpoint)
    network = run.network(chosen, devices.resolve(device))
    manager = TaskManager(include_path=folders or None, include_defaults=any(not _is_task_file(task) for task in tasks))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise InputError(
            f"unknown task: {', '.join(unknown)}", where="--harness", hint="pass the name of an lm-eval task, or a task file"
        )
    try:
        evaluated = harness.simple_evaluate(
            model=adapter(network, run.tokenizer, stride),
            tasks=names,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP_ITERATIONS,
            log_samples=False,
            verbosity="ERROR",
        )
    except TinylmError:
        raise
    except Exception as error:  # tasks run third-party code on third-party data
        raise WorkError(
            f"{', '.join(names)}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", where="--harness"
        ) from error
    results = _numeric_metrics(evaluated["results"])
    return HarnessResult(str(run.path), chosen.name, chosen.step, harness.__version__, results)


def _is_task_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _resolve_tasks(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the task names and the folders that contain the task files."""
    names, folders = [], []
    for task in tasks:
        if not _is_task_file(task):
            names.append(task)
            continue
        try:
            text = Path(task).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(error.strerror or "cannot be read", where=task) from None
        match = re.search(r"^task:\s*[\"']?([^\s\"'#]+)", text, flags=re.MULTILINE)
        if match is None:
            raise InputError("the task file has no `task:` line", where=task)
        names.append(match[1])
        folders.append(str(Path(task).absolute().parent))
    return names, folders


def _numeric_metrics(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Keep numeric metrics and drop the filter name `none` from their keys: `word_perplexity,none` -> `word_perplexity`."""

    def metrics(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
        for key, value in values.items():
            if isinstance(value, (int, float)) and "," in key:
                name, _, filter_name = key.partition(",")
                yield (name if filter_name == "none" else f"{name}_{filter_name}"), float(value)

    return {task: dict(metrics(values)) for task, values in results.items()}


def adapter(network: Model, tokenizer: Tokenizer, stride: int | None = None) -> Any:
    """Return the object to pass as `model=` to `lm_eval.simple_evaluate`. `stride` has the same meaning as in `tinylm eval`."""
    from lm_eval.api.model import TemplateLM

    class TinylmLM(TemplateLM):  # type: ignore[misc]  # defined here because lm_eval is an optional dependency
        @property
        def eot_token_id(self) -> int:
            return tokenizer.end_of_text or 0

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return tokenizer.encode(string)

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
        ) -> list[tuple[float, bool]]:
            return score_continuations(network, [(context, target) for _, context, target in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return score_texts(network, tokenizer, [request.args[0] for request in requests], stride)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [complete(network, tokenizer, *request.args) for request in requests]

    return TinylmLM()


def score_continuations(network: Model, requests: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Score (context, continuation) pairs of ids.

    Returns, for each continuation, its log-probability in nats and whether greedy decoding would generate it. A context that is too
    long for the model is truncated on the left. A continuation that is too long is scored in several spans.
    """
    context_length = network.model.context_length
    spans, owners = [], []
    for owner, (context, continuation) in enumerate(requests):
        ids, remaining = [*context, *continuation], len(continuation)
        while remaining:
            count = min(remaining, context_length)
            spans.append(ScoredSpan(ids[-context_length - 1 :], count))
            owners.append(owner)
            ids, remaining = ids[: len(ids) - count], remaining - count
    totals = [(0.0, True)] * len(requests)
    for owner, (nats, greedy) in zip(owners, _score_spans(network, spans), strict=True):
        totals[owner] = (totals[owner][0] - nats, totals[owner][1] and greedy)
    return totals


def score_texts(network: Model, tokenizer: Tokenizer, texts: Sequence[str], stride: int | None) -> list[float]:
    """Return the log-probability of each text in nats, scored in the same windows as in `tinylm eval`."""
    context_length = network.model.context_length
    spans, owners = [], []
    for owner, text in enumerate(texts):
        ids = [tokenizer.end_of_text or 0, *tokenizer.encode(text)]
        for window in sliding_windows([(1, len(ids))], context_length, stride or context_length):
            spans.append(ScoredSpan(ids[window.start : window.start + window.length + 1], window.scored))
            owners.append(owner)
    totals = [0.0] * len(texts)
    for owner, (nats, _) in zip(owners, _score_spans(network, spans), strict=True):
        totals[owner] -= nats
    return totals


@torch.no_grad()
def _score_spans(network: Model, spans: Sequence[ScoredSpan]) -> list[tuple[float, bool]]:
    """Return, for each span, the summed loss in nats and whether every scored token is the most likely one.

    Spans with similar lengths are batched together, longest first.
    """
    device = network.device
    order = sorted(range(len(spans)), key=lambda index: -len(spans[index].ids))
    max_tokens = min(EVALUATION_BATCH_TOKENS, EVALUATION_BATCH_LOGITS // network.vocab_size)
    scores: list[tuple[float, bool]] = [(0.0, True)] * len(spans)
    while order:
        rows = max(1, max_tokens // len(spans[order[0]].ids))
        batch, order = order[:rows], order[rows:]
        longest = len(spans[batch[0]].ids)
        ids = torch.tensor([[*spans[index].ids, *[0] * (longest - len(spans[index].ids))] for index in batch], device=device)
        logits = network(ids[:, :-1])
        losses = token_losses(logits, ids[:, 1:])
        is_greedy = logits.argmax(-1) == ids[:, 1:]
        for row, index in enumerate(batch):
            end = len(spans[index].ids) - 1
            scored = slice(end - spans[index].count, end)
            scores[index] = (float(losses[row, scored].double().sum()), bool(is_greedy[row, scored].all()))
    return scores


def complete(network: Model, tokenizer: Tokenizer, prompt: str, settings: dict[str, Any]) -> str:
    """Continue a prompt up to a stop string. Decoding is greedy unless the task's `settings` enable sampling."""
    until = settings.get("until") or []
    temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
    options = SamplingOptions(
        int(settings.get("max_gen_toks", _DEFAULT_NEW_TOKENS)),
        temperature,
        settings.get("top_k"),
        settings.get("top_p"),
        stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
    )
    return generate(network, tokenizer, prompt, options)[0].text
