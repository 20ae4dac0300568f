"""A run inside lm-evaluation-harness: its tasks ask, this adapter answers with log-likelihoods and text.

A whole text (`loglikelihood_rolling`) is scored in the windows of `tinylm eval`, so that both find the same perplexity; the
harness's own adapter for transformers gives the last window of a text more context.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tinylm import device as devices
from tinylm.errors import InputError, TinylmError, WorkError
from tinylm.evaluation.perplexity import BATCH_LOGITS, BATCH_TOKENS, windows_of
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.interchange import verify
from tinylm.model.transformer import Transformer
from tinylm.run import Run
from tinylm.tokenizer import Tokenizer

_BOOTSTRAPS = 1000
_NEW_TOKENS = 256
"""What the harness's adapters write at the most where a task does not say."""


@dataclass(frozen=True)
class HarnessResult:
    """`results`: task -> metric -> value, as the harness names them; a metric's standard error is beside it."""

    run: str
    checkpoint: str
    step: int
    harness: str
    results: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Scored:
    """A part of a text: `ids`, of which the last `count` are scored, each from those before it."""

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
    """Evaluate a run on tasks: names that the harness knows, or task files (.yaml). `limit`: on the first documents of each only.

    Raises `InputError` without lm-eval, for an unknown task or one whose data cannot be read, `WorkError` when a task fails.
    """
    harness = verify.require("lm_eval", "harness", "lm-evaluation-harness")
    from lm_eval.tasks import TaskManager

    names, folders = _named(tasks)
    chosen = run.checkpoint(checkpoint)
    network = run.network(chosen, devices.resolve(device))
    manager = TaskManager(include_path=folders or None, include_defaults=any(not _is_file(task) for task in tasks))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise InputError(f"no such task: {', '.join(unknown)}", where="--harness", hint="a name that lm-eval knows, or a task file")
    try:
        answered = harness.simple_evaluate(
            model=adapter(network, run.tokenizer, stride),
            tasks=names,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            verbosity="ERROR",
        )
    except TinylmError:
        raise
    except Exception as error:  # tasks are other people's code and data
        raise WorkError(
            f"{', '.join(names)}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", where="--harness"
        ) from error
    return HarnessResult(str(run.path), chosen.name, chosen.step, harness.__version__, _numbers(answered["results"]))


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _named(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names of the tasks, and the folders of those that are files."""
    names, folders = [], []
    for task in tasks:
        if not _is_file(task):
            names.append(task)
            continue
        try:
            text = Path(task).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(error.strerror or "cannot be read", where=task) from None
        found = re.search(r"^task:\s*[\"']?([^\s\"'#]+)", text, flags=re.MULTILINE)
        if found is None:
            raise InputError("names no task: it has no `task:` line", where=task)
        names.append(found[1])
        folders.append(str(Path(task).absolute().parent))
    return names, folders


def _numbers(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """`word_perplexity,none` -> `word_perplexity`; what is no number is left out."""

    def metrics(found: dict[str, Any]) -> Iterator[tuple[str, float]]:
        for key, value in found.items():
            if isinstance(value, (int, float)) and "," in key:
                name, _, how = key.partition(",")
                yield (name if how == "none" else f"{name}_{how}"), float(value)

    return {task: dict(metrics(found)) for task, found in results.items()}


def adapter(network: Transformer, tokenizer: Tokenizer, stride: int | None = None) -> Any:
    """The object to pass as `model=` to `lm_eval.simple_evaluate`. `stride` as in `tinylm eval`."""
    from lm_eval.api.model import TemplateLM

    class TinylmLM(TemplateLM):  # type: ignore[misc]  # defined here because lm_eval is an extra
        @property
        def eot_token_id(self) -> int:
            return tokenizer.end_of_text or 0

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return tokenizer.encode(string)

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
        ) -> list[tuple[float, bool]]:
            return score_continuations(network, [(before, after) for _, before, after in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return score_texts(network, tokenizer, [request.args[0] for request in requests], stride)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [continuation(network, tokenizer, *request.args) for request in requests]

    return TinylmLM()


def score_continuations(network: Transformer, requests: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """For each (context, continuation): its log-probability in nats, and whether greedy decoding would write it.

    A context too long for the model loses its beginning.
    """
    context = network.model.context_length
    parts, owners = [], []
    for owner, (before, after) in enumerate(requests):
        ids, left = [*before, *after], len(after)
        while left:
            count = min(left, context)
            parts.append(Scored(ids[-context - 1 :], count))
            owners.append(owner)
            ids, left = ids[: len(ids) - count], left - count
    totals = [(0.0, True)] * len(requests)
    for owner, (nats, greedy) in zip(owners, _scores(network, parts), strict=True):
        totals[owner] = (totals[owner][0] - nats, totals[owner][1] and greedy)
    return totals


def score_texts(network: Transformer, tokenizer: Tokenizer, texts: Sequence[str], stride: int | None) -> list[float]:
    """The log-probability of each text in nats, in windows as `tinylm eval` has them."""
    context = network.model.context_length
    parts, owners = [], []
    for owner, text in enumerate(texts):
        ids = [tokenizer.end_of_text or 0, *tokenizer.encode(text)]
        for window in windows_of([(1, len(ids))], context, stride or context):
            parts.append(Scored(ids[window.start : window.start + window.length + 1], window.scored))
            owners.append(owner)
    totals = [0.0] * len(texts)
    for owner, (nats, _) in zip(owners, _scores(network, parts), strict=True):
        totals[owner] -= nats
    return totals


@torch.no_grad()
def _scores(network: Transformer, parts: Sequence[Scored]) -> list[tuple[float, bool]]:
    """(nats, all of them the likeliest) of each part, in batches of like lengths."""
    device = next(network.parameters()).device
    order = sorted(range(len(parts)), key=lambda index: -len(parts[index].ids))
    most = min(BATCH_TOKENS, BATCH_LOGITS // network.vocab_size)
    found: list[tuple[float, bool]] = [(0.0, True)] * len(parts)
    while order:
        rows = max(1, most // len(parts[order[0]].ids))
        batch, order = order[:rows], order[rows:]
        longest = len(parts[batch[0]].ids)
        ids = torch.tensor([[*parts[index].ids, *[0] * (longest - len(parts[index].ids))] for index in batch], device=device)
        logits = network(ids[:, :-1]).float()
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(ids.shape[0], -1)
        likeliest = logits.argmax(-1) == ids[:, 1:]
        for row, index in enumerate(batch):
            end = len(parts[index].ids) - 1
            scored = slice(end - parts[index].count, end)
            found[index] = (float(losses[row, scored].double().sum()), bool(likeliest[row, scored].all()))
    return found


def continuation(network: Transformer, tokenizer: Tokenizer, prompt: str, wanted: dict[str, Any]) -> str:
    """Text after a prompt, up to a stop text; greedy unless the task asks to sample."""
    until = wanted.get("until") or []
    temperature = float(wanted.get("temperature") or 0.0) if wanted.get("do_sample") else 0.0
    options = SamplingOptions(
        int(wanted.get("max_gen_toks", _NEW_TOKENS)),
        temperature,
        wanted.get("top_k"),
        wanted.get("top_p"),
        stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
    )
    return generate(network, tokenizer, prompt, options)[0].text
