"""Suggest a recipe for a text, a machine and a time limit, as `tinylm new` does. This module does not import torch.

The text is scanned and tokenized. For each of several model sizes, `cost.plan` estimates how many tokens the budget allows, on this
CPU or on accelerators, and a scaling law predicts the loss after training on them. The size with the lowest predicted loss becomes
a recipe, with comments that give the reason for each choice. The measurements behind the constants are in docs/lab-notebook.md
under "What `tinylm new` chooses". The comments below refer to the texts in these measurements by size, for example "12.6 MB".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

import yaml

from tinylm.cost.cpu import Processor
from tinylm.cost.micro_batch import USABLE_MEMORY
from tinylm.cost.plan import BUSY, Plan, effective_tokens, make_plan
from tinylm.data.estimate import TextSize, estimate_text_size
from tinylm.errors import InputError
from tinylm.recipe import Recipe, loads
from tinylm.recipe.notation import Loader
from tinylm.recipe.schema import DataSection
from tinylm.reporting import SILENT, Reporter
from tinylm.text import split
from tinylm.text.sources import Corpus, describe
from tinylm.tokenizer.vocab_sweep import vocab_size_for

SIZES = (
    (2, 128),
    (3, 192),
    (4, 256),
    (5, 320),
    (6, 384),
    (8, 512),
    (10, 640),
    (12, 768),
    (16, 1024),
    (20, 1280),
    (24, 1536),
)
"""(number of layers, width) of the models to choose from, all with heads of width 64. Depth and width grow together, as in
published model families. (2, 192) is omitted. On 12.6 MB, it was 3% better than its neighbors after two minutes but 16% worse
after ten. The scaling law predicts a difference of only 1%, so noise in the measured speed would determine the choice."""
PARAMETER_EXPONENT, TOKEN_EXPONENT = 0.34, 0.28
"""Hoffmann et al. 2022, equation 10: the excess loss is the sum of two terms. One falls as N^-0.34 with the number of parameters,
the other as D^-0.28 with the number of tokens."""
PARAMETER_WEIGHT = 1.2
"""Weight of the first term relative to the second. Fitted to the size grids in docs/lab-notebook.md, because Hoffmann et al.
studied models a thousand times larger, with more text and without n-gram tables or Muon."""
FITTED_REPETITIONS_SCALE = 5
"""R*, as in `cost.plan.REPETITIONS_SCALE`. Muennighoff et al. 2023 report 15.39. This value is fitted to the same size grids,
because n-gram tables memorize a text sooner."""

BYTES_PER_TOKEN = 4
"""Estimate that is used until the text has been tokenized."""
BUSY_HEAD = "\nThe machine was busy while it was measured. On an idle machine, `tinylm new` may choose a larger model."

CPU_BATCH_TOKENS = 2048
SHORT_TEXT_EPOCHS, SHORT_TEXT_STEPS = 12, 200
"""The smallest model may train for this many epochs on any text. On 30 kB and 100 kB, 12 epochs were best among 6, 12, 20 and 40.
The batch size is reduced until these epochs contain at least this many steps. The number of steps was not tuned."""
ACCELERATOR_STEPS = 1500
"""Accelerators are faster with large batches. Their batch size is doubled while there are at least twice this many steps."""
MAX_BATCH_TOKENS = 1 << 19
LONG_TEXT_TOKENS = 10_000_000
"""With at least this many training tokens, the context length on accelerators is `ACCELERATOR_CONTEXT`."""
SHORT_CONTEXT, LONG_CONTEXT, ACCELERATOR_CONTEXT = 256, 512, 1024
LONG_CONTEXT_STEPS = 500
"""From this number of steps on, `LONG_CONTEXT` is used instead of `SHORT_CONTEXT`, with the same number of tokens per step. On
three texts, it gave 1 to 4% fewer bits per byte after 500 to 2,300 steps, but the same or up to 3% more after 150 to 450 steps."""

REGULARIZATION: tuple[tuple[float, float, float | None], ...] = ((6, 0.2, None), (3, 0.1, 0.5), (0.6, 0.0, 0.5), (0, 0.0, 0.0))
"""(minimum number of epochs, dropout, n-gram dropout). None means no n-gram tables. Without dropout, the tables memorize the names
in each document, so the blocks do not learn to find these names in the context. On 12.6 MB, an n-gram dropout of 0.5 gave 8 to 12%
fewer bits per byte after one and two epochs and 6% fewer after 0.65 epochs, but 1% more after 0.4 epochs. On 1 MB, 0.5 was best for
two to four epochs. On 0.3 MB and 1 MB, models without the tables were 1.3% better after nine or ten epochs than with 0.5."""

MAX_EPOCHS = 40
"""More epochs than this do not help (Muennighoff et al. 2023, figure 3)."""
MAX_MEMORIZATION = 120
"""Maximum of parameters x epochs / training tokens. Above this value, the model overfits. On 0.3 MB (147,000 tokens), 100 and 120
gave 1.662 bits per byte (1.4 million parameters, 10 and 12 epochs), 150 gave 1.683, 200 with more dropout 1.684 and 1.685, 400 gave
1.725, and 900 gave 1.740 (10.7 million parameters, 12 epochs). On 1 MB, 51 was still better than 41."""

MAX_HELDOUT_BYTES, HELDOUT_BYTES_PER_MINUTE = 2_000_000, 200_000
EVALUATIONS, MAX_EVALUATION_SHARE = 8, 0.05
"""Number of evaluations, and the maximum fraction of the budget for them. If evaluating on all held-out tokens would take longer,
training evaluates only on the first tokens."""
_PHRASE = re.compile(r"\b[^\W\d_]{1,20}(?:[ ,]{1,3}[^\W\d_]{1,20}){2,4}\b")
"""Matches a few consecutive words, which become the prompt for samples during training."""
PROMPT_PIECES, PROMPT_CHARACTERS = 100, 100_000
"""Number of text pieces to search for a prompt, and number of characters to search in each."""
MIN_STEPS, MIN_DOCUMENTS, MIN_BYTES = 50, 20, 10_000


@dataclass(frozen=True)
class Budget:
    """Minutes of training on this machine's CPU, or on `devices` accelerators.

    `accelerator` is a name from `tinylm.cost.accelerators`, or None for the CPU. If `processor` is None, the CPU is measured.
    """

    minutes: float = 10
    accelerator: str | None = None
    devices: int = 1
    processor: Processor | None = None


@dataclass(frozen=True)
class Suggestion:
    """A recipe, as YAML with comments and as an object, and its estimated cost."""

    yaml: str
    recipe: Recipe
    plan: Plan


@dataclass(frozen=True)
class _Draft:
    """The values chosen for a recipe, and the reason for each value."""

    name: str
    data: DataSection
    share: float
    by: Literal["document", "tail"]
    minutes: float
    prompt: str
    vocab_size: int = 4096
    layers: int = 4
    width: int = 256
    context: int = SHORT_CONTEXT
    batch: int = 8
    dropout: float = 0.0
    ngram_dropout: float | None = 0.0
    """None means no n-gram tables."""
    for_gguf: bool = False
    """Use only features that llama.cpp supports."""
    fixed_context: bool = False
    """Use the same context length for runs of all lengths."""
    evaluations: int = 1
    max_tokens: int | None = None
    """Number of held-out tokens to evaluate on during training. None means all."""
    epochs: float | None = None
    """Replaces `minutes` if training for that long would overfit."""
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return loads(self.yaml)

    @property
    def yaml(self) -> str:
        lines = [f"# {line}" for line in self.reasons.get("head", "").splitlines()]
        column = max(len(text) for text, _ in self._lines()) + 2
        for text, key in self._lines():
            reason = self.reasons.get(key)
            lines.append(f"{text:<{column}}# {reason}" if reason else text)
        return "\n".join(lines) + "\n"

    def _lines(self) -> Iterator[tuple[str, str]]:
        """Yield each line of the recipe with its key in `reasons`."""
        sources = self.data.sources()["train"]
        yield f"name: {_quoted(self.name)}", "name"
        yield "seed: 1337", "seed"
        yield "data:", "data"
        yield f"  train: {_quoted(sources[0]) if len(sources) == 1 else json.dumps(sources, ensure_ascii=False)}", "train"
        yield f"  heldout: {{share: {self.share:g}, by: {self.by}}}", "heldout"
        if self.data.field != "text":
            yield f"  field: {_quoted(self.data.field)}", "field"
        if self.data.template is not None:
            yield f"  template: {_quoted(self.data.template)}", "template"
        if self.data.errors != "strict":
            yield f"  errors: {self.data.errors}", "errors"
        digits = ", digits: 1" if self.for_gguf else ""
        yield f"tokenizer: {{kind: bpe, vocab_size: {self.vocab_size}{digits}}}", "vocab_size"
        yield "model:", "model"
        yield f"  preset: {'llama' if self.for_gguf else 'modern'}", "preset"
        if self.for_gguf:
            yield "  qk_norm: true", "qk_norm"
        yield f"  n_layer: {self.layers}", "n_layer"
        yield f"  n_head: {max(1, self.width // 64)}", "n_head"
        yield f"  n_embd: {self.width}", "n_embd"
        yield f"  context_length: {self.context}", "context_length"
        if not self.for_gguf:
            yield "  shifted_key_heads: 1", "shifted_key_heads"
        if self.ngram_dropout is not None:
            yield "  ngram_embeddings: [2, 3]", "ngram_embeddings"
            yield "  ngram_width: 64", "ngram_width"
        if self.ngram_dropout:
            yield f"  ngram_dropout: {self.ngram_dropout:g}", "ngram_dropout"
        if self.dropout:
            yield f"  dropout: {self.dropout:g}", "dropout"
        yield "training:", "training"
        if self.epochs is None:
            yield f"  minutes: {self.minutes:g}", "minutes"
        else:
            yield f"  epochs: {self.epochs:g}", "epochs"
        yield f"  global_batch_size: {self.batch}", "global_batch_size"
        yield "  optimizer: {name: muon, lr: 0.02, adamw_lr: 6e-3}", "optimizer"
        yield "  schedule: {name: wsd, warmup: 0.02, cooldown: 0.6}", "schedule"
        every = 1 / self.evaluations if self.evaluations > 1 else 1_000_000
        limit = "" if self.max_tokens is None else f", max_tokens: {self.max_tokens}"
        yield f"evaluation: {{every: {every:g}{limit}}}", "every"
        yield f"checkpoint: {{every: {every:g}, keep: 1}}", "checkpoint"
        yield f"sampling: {{every: {every:g}, prompts: [{json.dumps(self.prompt, ensure_ascii=False)}]}}", "sampling"


def _minutes(budget: Budget) -> str:
    return "1 minute" if budget.minutes == 1 else f"{budget.minutes:g} minutes"


def _short(number: float) -> str:
    """Abbreviate a number: 12345678 becomes "12M"."""
    size, letter = next((size, letter) for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")) if number >= size)
    shown = number / size
    return f"{shown:.1f}{letter}" if shown < 10 else f"{shown:.0f}{letter}"


def _quoted(text: str) -> str:
    """Format a string as YAML, with quotes if it would otherwise be parsed as something else."""
    plain = re.fullmatch(r"[\w./~][\w./~:-]*\w", text) is not None and yaml.load(text, Loader) == text
    return text if plain else json.dumps(text, ensure_ascii=False)


def suggest_recipe(
    data: DataSection,
    budget: Budget,
    *,
    name: str = "mine",
    sizes: Sequence[tuple[int, int]] = SIZES,
    for_gguf: bool = False,
    fixed_context: bool = False,
    reporter: Reporter = SILENT,
) -> Suggestion:
    """Return the recipe with the lowest predicted held-out loss within the budget. The budget includes evaluations.

    `sizes` lists (number of layers, width) for the models to choose from, smallest first. `data.heldout` is replaced.
    If `for_gguf` is true, the model and the tokenizer use only features that llama.cpp supports. If `fixed_context` is true, the
    context length does not depend on the length of the training run.

    Raises `InputError` if the text cannot be read or is too short, if it is standard input (which training could not read again),
    if no model fits in memory, or if the budget does not allow `MIN_STEPS` steps of the smallest model.
    """
    if "-" in data.sources()["train"]:
        raise InputError("standard input cannot be read again for training", where="-", hint="save it to a file")
    draft, summary = _first_draft(name, data, budget)
    draft = replace(draft, for_gguf=for_gguf, fixed_context=fixed_context, ngram_dropout=None if for_gguf else draft.ngram_dropout)
    read_bytes = BYTES_PER_TOKEN * _plan(draft, summary.as_tokens(draft.vocab_size), budget).tokens
    draft = replace(draft, vocab_size=vocab_size_for(summary.train_bytes, read_bytes))
    text = estimate_text_size(draft.recipe.data, draft.recipe.tokenizer, reporter)
    context = SHORT_CONTEXT if budget.accelerator is None or text.train_tokens < LONG_TEXT_TOKENS else ACCELERATOR_CONTEXT
    draft = _with_context(replace(draft, vocab_size=text.vocab_size), context, text, budget)
    candidates = list(_candidates(draft, text, budget, sizes))
    if not candidates:
        raise _no_candidate_error(replace(draft, layers=sizes[0][0], width=sizes[0][1]), text, budget)
    busy = any(plan.busy for _, plan in candidates)
    if busy:
        reporter.warn(BUSY)
    best, plan = min(candidates, key=lambda candidate: excess_loss(candidate[1]))
    best = replace(best, reasons=_reasons(best, plan, text, summary, budget, len(candidates), busy))
    return Suggestion(best.yaml, best.recipe, plan)


def excess_loss(plan: Plan) -> float:
    """Return the predicted loss minus the loss of an infinite model trained on infinite text, up to a constant factor.

    Repeated tokens are converted to an equivalent number of unique tokens.
    """
    assert plan.compute_optimal is not None
    tokens = effective_tokens(plan.tokens, plan.compute_optimal.unique_tokens, FITTED_REPETITIONS_SCALE)
    return float(PARAMETER_WEIGHT * _matmul_parameters(plan) ** -PARAMETER_EXPONENT + tokens**-TOKEN_EXPONENT)


def _matmul_parameters(plan: Plan) -> float:
    """Return the number of matmul parameters that would cost the same FLOPs as the model, including its attention."""
    return plan.flops / plan.tokens / 6


@dataclass(frozen=True)
class _TextSummary:
    """Sizes of the text, measured in a first scan before tokenization."""

    bytes: int
    documents: int
    train_bytes: int
    heldout_bytes: int

    def as_tokens(self, vocab_size: int) -> TextSize:
        """Estimate the sizes in tokens."""
        train, heldout = (size // BYTES_PER_TOKEN for size in (self.train_bytes, self.heldout_bytes))
        return TextSize(vocab_size, train, heldout, exact=False)


def _first_draft(name: str, data: DataSection, budget: Budget) -> tuple[_Draft, _TextSummary]:
    """Return a draft with a suitable held-out share, and the sizes of the text."""
    sources = data.sources()["train"]
    with Corpus(sources, field=data.field, template=data.template, errors=data.errors) as corpus:
        scan = split.scan(corpus.pieces())
        phrases = (_PHRASE.search(piece.text[:PROMPT_CHARACTERS]) for piece in islice(corpus.pieces(), PROMPT_PIECES))
        prompt = next((match[0] for match in phrases if match), "")
    if not scan.characters:
        raise InputError("the text is empty", where=describe(sources))
    share = float(f"{min(0.1, budget.minutes * HELDOUT_BYTES_PER_MINUTE / scan.bytes, MAX_HELDOUT_BYTES / scan.bytes):.1g}")
    divisible = scan.documents >= MIN_DOCUMENTS and scan.lengths.max() <= share * scan.characters / 2
    by: Literal["document", "tail"] = "document" if divisible and _holds_out(scan, share) else "tail"
    summary = _TextSummary(scan.bytes, scan.documents, int(scan.bytes * (1 - share)), int(scan.bytes * share))
    if summary.train_bytes < MIN_BYTES:
        raise InputError(f"{scan.bytes:,} bytes are not enough to train on", where=describe(sources), hint="use a longer text")
    return _Draft(
        name, data, share, by, budget.minutes, prompt[:40], batch=_batch(CPU_BATCH_TOKENS // SHORT_CONTEXT, budget)
    ), summary


def _holds_out(scan: split.Scan, share: float) -> bool:
    """Return whether a split by document would hold out 0.5 to 1.5 times the requested share."""
    try:
        boundaries = split.by_document(scan, share).boundaries
    except InputError:
        return False
    heldout_characters = int(scan.lengths[boundaries == 0].sum())
    return 0.5 <= heldout_characters / (share * scan.characters) <= 1.5


def _batch(sequences: int, budget: Budget) -> int:
    """Round the number of sequences up to a multiple of the number of devices."""
    return math.ceil(sequences / budget.devices) * budget.devices


def _with_context(draft: _Draft, context: int, text: TextSize, budget: Budget) -> _Draft:
    """Set the context length, or a shorter one for a short text, and the batch size for a CPU."""
    while context > 16 and (text.train_tokens < 32 * context or text.heldout_tokens < 2 * context):
        context //= 2
    tokens = min(CPU_BATCH_TOKENS, SHORT_TEXT_EPOCHS * text.train_tokens // SHORT_TEXT_STEPS)
    return replace(draft, context=context, batch=_batch(max(1, tokens // context), budget))


def _candidates(draft: _Draft, text: TextSize, budget: Budget, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[_Draft, Plan]]:
    """Yield the completed draft and plan for each size that fits in memory and can train for enough steps within the budget."""
    for layers, width in sizes:
        candidate, plan = _completed(replace(draft, layers=layers, width=width), text, budget)
        if plan.steps < MIN_STEPS:
            return
        if plan.memory_bytes.total <= USABLE_MEMORY * plan.device_memory_bytes:
            yield candidate, plan


def _no_candidate_error(smallest: _Draft, text: TextSize, budget: Budget) -> InputError:
    """Return an error that explains why even the smallest model cannot be trained."""
    _, plan = _completed(smallest, text, budget)
    if plan.steps >= MIN_STEPS:
        return InputError("the smallest model does not fit in memory", where="--hardware" if budget.accelerator else None)
    problem = f"{_minutes(budget)} and {text.train_tokens:,} tokens are not enough for {MIN_STEPS} steps of the smallest model"
    return InputError(problem, where="--minutes", hint="allow more time or use a longer text")


def _completed(draft: _Draft, text: TextSize, budget: Budget) -> tuple[_Draft, Plan]:
    """Choose the context and batch size, training length, dropout and evaluation interval for the model size and the budget."""
    draft, plan = _with_length(draft, text, budget)
    if draft.context == SHORT_CONTEXT and plan.steps >= LONG_CONTEXT_STEPS and not draft.fixed_context:
        draft, plan = _with_length(_with_context(draft, LONG_CONTEXT, text, budget), text, budget)
    if budget.accelerator is not None:
        while plan.steps >= 2 * ACCELERATOR_STEPS and plan.tokens_per_step < MAX_BATCH_TOKENS:
            draft, plan = _with_length(replace(draft, batch=2 * draft.batch), text, budget)
    _, dropout, ngram_dropout = next(row for row in REGULARIZATION if plan.epochs >= row[0])
    ngram_dropout = None if draft.for_gguf else ngram_dropout
    draft, plan = _with_length(replace(draft, dropout=dropout, ngram_dropout=ngram_dropout), text, budget)
    allowed = MAX_EVALUATION_SHARE * 60 * budget.minutes / EVALUATIONS / max(plan.evaluation_seconds, 1e-3)
    limit = max(2 * draft.context, int(float(f"{allowed * text.heldout_tokens:.1g}"))) if allowed < 1 else None
    draft = replace(draft, evaluations=EVALUATIONS, max_tokens=limit)
    return draft, _plan(draft, text, budget)


def _with_length(draft: _Draft, text: TextSize, budget: Budget) -> tuple[_Draft, Plan]:
    """Set the training length to the full budget, or to the maximum number of epochs if the full budget would overfit."""
    draft = replace(draft, epochs=None)
    plan = _plan(draft, text, budget)
    max_epochs = MAX_MEMORIZATION * text.train_tokens / _matmul_parameters(plan)
    if (draft.layers, draft.width) == SIZES[0]:
        max_epochs = max(max_epochs, SHORT_TEXT_EPOCHS)
    max_epochs = min(max_epochs, MAX_EPOCHS)
    if plan.epochs > max_epochs:
        draft = replace(draft, epochs=float(f"{max_epochs:.2g}"))
        plan = _plan(draft, text, budget)
    return draft, plan


def _plan(draft: _Draft, text: TextSize, budget: Budget) -> Plan:
    return make_plan(
        draft.recipe,
        text.vocab_size,
        text.train_tokens,
        heldout_tokens=text.heldout_tokens,
        accelerator=budget.accelerator,
        devices=budget.devices,
        processor=budget.processor,
    )


def _range(steps: tuple[int, int]) -> str:
    low, high = steps
    return f"{high:,}" if low == high else f"{low:,} to {high:,}"


def _preset_reason(draft: _Draft) -> str:
    if draft.for_gguf:
        return "llama.cpp supports this preset, and the tokenizer with digits: 1"
    return "without n-gram tables, which would overfit in many passes" if draft.ngram_dropout is None else ""


def _reasons(
    draft: _Draft, plan: Plan, text: TextSize, summary: _TextSummary, budget: Budget, candidates: int, busy: bool
) -> dict[str, str]:
    """Map each key to the reason for its value, and "head" to the comment at the top of the recipe."""
    machine = "this CPU" if budget.accelerator is None else f"{budget.devices} x {budget.accelerator}"
    documents = f"{summary.documents:,} document{'' if summary.documents == 1 else 's'}"
    passes = f"{plan.epochs:.1f} passes over the text" if plan.epochs < 10 else f"{plan.epochs:.0f} passes over the text"
    heldout = f"{summary.heldout_bytes / 1e3:,.0f} kB to evaluate on"
    return {
        "head": f"A recipe for {describe(draft.data.sources()['train'])} ({summary.bytes / 1e6:.2g} MB in {documents}) "
        f"and {_minutes(budget)} on {machine}.\n"
        f"About {_range(plan.steps_range)} steps, {plan.tokens_per_second:,.0f} tokens/s in {plan.precision}. "
        f"docs/reference/recipe.md explains every key.{BUSY_HEAD if busy else ''}",
        "heldout": f"{heldout}: " + ("whole documents, chosen by hash" if draft.by == "document" else "the end of the text"),
        "vocab_size": f"for {text.train_tokens:,} training tokens; `tokenize sweep` compares sizes",
        "preset": _preset_reason(draft),
        "qk_norm": "llama.cpp runs this model as qwen3; export it with `tinylm export --to gguf`",
        "n_layer": f"a scaling law predicts the lowest loss for this size, out of {candidates} sizes",
        "n_head": "each head is 64 wide",
        "n_embd": f"{_short(plan.parameters)} parameters, trained on {_short(plan.tokens)} tokens: {passes}",
        "context_length": "the model attends to this many tokens",
        "shifted_key_heads": "one head finds the tokens that followed earlier occurrences of the current one",
        "ngram_embeddings": "tables for token pairs and triples improve the model at little cost",
        "ngram_dropout": "without dropout, the tables would memorize the names in each document",
        "dropout": f"without it, {passes} would overfit",
        "minutes": f"use `steps: {plan.steps}` instead to get the same model in every run",
        "epochs": f"more passes would overfit; these take {plan.seconds_estimate / 60:.2g} of the {_minutes(budget)}",
        "global_batch_size": f"{plan.tokens_per_step:,} tokens per step"
        + ("; on a CPU, a larger batch only means fewer steps" if budget.accelerator is None else f", for {plan.steps:,} steps"),
        "optimizer": "these learning rates suit every width",
        "schedule": "the learning rate falls to zero over the last 60%",
        "every": f"{EVALUATIONS} evaluations during the run"
        + (", on the first held-out tokens; `tinylm eval` uses all" if draft.max_tokens else ""),
    }
