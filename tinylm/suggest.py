"""A recipe for one text, one machine and one time budget: what `tinylm new` writes. Imports without torch.

The text is scanned and tokenized. For each size of a ladder `plan` says how many tokens the budget pays for, on this machine or on
accelerators, and a scaling rule how far that size gets with them. The best is written down, each choice with its reason in a
comment.
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
from tinylm.cost.plan import BUSY, UNDISTURBED, USABLE_MEMORY, Plan, effective_tokens, make_plan
from tinylm.data.estimate import TextSize, measure_text
from tinylm.errors import InputError
from tinylm.recipe import Recipe, loads
from tinylm.recipe.notation import Loader
from tinylm.recipe.schema import DataSection
from tinylm.reporting import SILENT, Reporter
from tinylm.text import split
from tinylm.text.sources import Corpus, describe

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
"""Blocks and width, with heads of 64: depth and width grow together, as in families of models that are published. Without (2, 192),
which was 3 % better than its neighbours for two minutes of 12.6 MB and 16 % worse for ten: the scaling rule sees 1 % there."""
PARAMETER_EXPONENT, TOKEN_EXPONENT = 0.34, 0.28
"""Of Hoffmann et al. 2022, equation 10: what a loss lacks falls as N^-0.34 in parameters and as D^-0.28 in tokens."""
PARAMETER_WEIGHT = 1.2
"""Of the first against the second. Fitted to the grids in benchmarks/README.md: tables of n-grams, Muon and little text change what
Hoffmann et al. found at a thousand times the size."""
FITTED_REPETITIONS_SCALE = 5
"""R* of Muennighoff et al. 2023, who found 15.39: what R repetitions of a text are worth decays as exp(-R / R*). Fitted likewise:
tables learn by heart sooner."""

BYTES_PER_ENTRY, BYTES_READ_PER_ENTRY = 2000, 2500
"""For each entry of the vocabulary, of the text and of what is read in all, repetitions counted: a token that is met more seldom is
not learned. Of 1 MB read nine times, 512 entries (and dropout 0.2 for 0.1) left 4 % fewer bits per byte than 1024 or 2048; of
Python's source 2048 left 2 % fewer than 4096 in two minutes."""
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 512, 32768
BYTES_PER_TOKEN = 4
"""Before a tokenizer is there to tell."""
BUSY_HEAD = "\nThe machine was busy with something else while it was measured: left alone it may deserve a larger model."

CPU_BATCH_TOKENS = 2048
PASSES_OF_SHORT_TEXTS, STEPS_OF_SHORT_TEXTS = 12, 200
"""The smallest model reads any text so often if there is time: 30 and 100 kB were best learned by 12 passes of 6, 12, 20 and 40.
Batches shrink until they make so many steps, which is assumed."""
STEPS_ON_ACCELERATORS = 1500
"""Their batches grow until fewer than twice as many steps are left, for what large products gain."""
MOST_BATCH_TOKENS = 1 << 19
LONG_TEXT_TOKENS = 10_000_000
"""From here on an accelerator looks back 1024 tokens."""

REGULARISATION: tuple[tuple[float, float, float | None], ...] = ((6, 0.2, None), (3, 0.1, 0.5), (0.6, 0.0, 0.5), (0, 0.0, 0.0))
"""From so many passes over the text on: dropout, and that of n-grams; None: no tables of them. Whole tables learn the names of each
document by heart, and the blocks above them do not learn to look for them in the context: one and two passes over 12.6 MB
with half of the n-grams left out needed 8 to 12 % fewer bits per byte than with all (0.65 of a pass 6 % fewer), 0.4 of a pass
1 % more. Of 1 MB read two to four times, half of them made the best of all variants; read nine or ten times (0.3 MB and 1 MB), no
tables at all left 1.3 % fewer than that."""

MOST_EPOCHS = 40
"""Passes over a text after which more of them teach nothing (Muennighoff et al. 2023, figure 3)."""
MOST_LEARNED_BY_HEART = 120
"""Parameters times passes for each token of the text, after which more of either do harm. 0.3 MB of 147,000 tokens left 1.662 bits
per byte after 100 and 120 (1.4 million parameters, 10 and 12 passes), 1.683 after 150, 1.684 and 1.685 after 200 with more dropout,
1.725 after 400, and 1.740 after 900 (10.7 million, 12 passes). 1 MB was still gaining from 41 to 51."""

MOST_HELDOUT_BYTES, HELDOUT_BYTES_A_MINUTE = 2_000_000, 200_000
EVALUATIONS, EVALUATION_SHARE = 5, 0.05
"""At most so many, and of the budget."""
_WORDS = re.compile(r"\b[^\W\d_]{1,20}(?:[ ,]{1,3}[^\W\d_]{1,20}){2,4}\b")
"""A few words in a row: what the model is asked to go on from as it learns."""
PROMPT_PIECES, PROMPT_CHARACTERS = 100, 100_000
"""Where they are looked for: in the beginnings of so many pieces of the text."""
FEWEST_STEPS, FEWEST_DOCUMENTS, FEWEST_BYTES = 50, 20, 10_000


@dataclass(frozen=True)
class Budget:
    """Minutes of a whole training on this machine's CPU, or on `devices` accelerators of a name that `tinylm.cost.accelerators` knows.

    `here`: instead of measuring this machine.
    """

    minutes: float = 10
    accelerator: str | None = None
    devices: int = 1
    here: Processor | None = None


@dataclass(frozen=True)
class Proposal:
    """A commented recipe as YAML, the same as an object, and what it will cost."""

    yaml: str
    recipe: Recipe
    plan: Plan


@dataclass(frozen=True)
class _Draft:
    """The values of a recipe that are chosen, and the reasons for them by key."""

    name: str
    data: DataSection
    share: float
    by: Literal["document", "tail"]
    minutes: float
    prompt: str
    vocab_size: int = 4096
    layers: int = 4
    width: int = 256
    context: int = 256
    batch: int = 8
    dropout: float = 0.0
    ngram_dropout: float | None = 0.0
    """None: no tables of n-grams."""
    every: int = 1_000_000
    epochs: float | None = None
    """Instead of minutes, where those would read the text too often."""
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return loads(self.yaml)

    @property
    def yaml(self) -> str:
        lines = [f"# {line}" for line in self.reasons.get("head", "").splitlines()]
        wide = max(len(text) for text, _ in self._lines()) + 2
        for text, key in self._lines():
            reason = self.reasons.get(key)
            lines.append(f"{text:<{wide}}# {reason}" if reason else text)
        return "\n".join(lines) + "\n"

    def _lines(self) -> Iterator[tuple[str, str]]:
        """Each line of the recipe, and the key whose reason stands behind it."""
        sources = self.data.train
        yield f"name: {_quoted(self.name)}", "name"
        yield "seed: 1337", "seed"
        yield "data:", "data"
        yield f"  train: {_quoted(sources[0]) if len(sources) == 1 else json.dumps(sources, ensure_ascii=False)}", "train"
        yield f"  heldout: {{share: {self.share:g}, by: {self.by}}}", "heldout"
        if self.data.field != "text":
            yield f"  field: {_quoted(self.data.field)}", "field"
        if self.data.errors != "strict":
            yield f"  errors: {self.data.errors}", "errors"
        yield f"tokenizer: {{kind: bpe, vocab_size: {self.vocab_size}}}", "vocab_size"
        yield "model:", "model"
        yield "  preset: modern", "preset"
        yield f"  n_layer: {self.layers}", "n_layer"
        yield f"  n_head: {max(1, self.width // 64)}", "n_head"
        yield f"  n_embd: {self.width}", "n_embd"
        yield f"  context_length: {self.context}", "context_length"
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
        yield f"evaluation: {{every: {self.every}}}", "every"
        yield f"checkpoint: {{every: {self.every}, keep: 1}}", "checkpoint"
        yield f"sampling: {{every: {self.every}, prompts: [{json.dumps(self.prompt, ensure_ascii=False)}]}}", "sampling"


def _minutes(budget: Budget) -> str:
    return "1 minute" if budget.minutes == 1 else f"{budget.minutes:g} minutes"


def _short(number: float) -> str:
    """12345678 -> 12M."""
    size, letter = next((size, letter) for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")) if number >= size)
    shown = number / size
    return f"{shown:.1f}{letter}" if shown < 10 else f"{shown:.0f}{letter}"


def _quoted(text: str) -> str:
    """As YAML: bare where that is read back as the same text."""
    bare = re.fullmatch(r"[\w./~][\w./~:-]*\w", text) is not None and yaml.load(text, Loader) == text
    return text if bare else json.dumps(text, ensure_ascii=False)


def propose(
    data: DataSection,
    budget: Budget,
    *,
    name: str = "mine",
    sizes: Sequence[tuple[int, int]] = SIZES,
    reporter: Reporter = SILENT,
) -> Proposal:
    """The recipe that should leave the fewest held-out bits per byte within the budget, measuring included.

    `sizes`: blocks and width of the models to choose from, smallest first. Of `data`, `heldout` is chosen here. Raises `InputError`
    for a text that cannot be read or is too short, for standard input (training reads the text again), and for a budget in which
    not even the smallest model makes `FEWEST_STEPS` steps.
    """
    if "-" in data.train:
        raise InputError("standard input cannot be read again for training", where="-", hint="save it in a file and name that")
    draft, look = _first_draft(name, data, budget)
    read_bytes = BYTES_PER_TOKEN * _planned(draft, look.as_tokens(draft.vocab_size), budget).tokens
    draft = replace(draft, vocab_size=_vocab_size(min(look.train_bytes / BYTES_PER_ENTRY, read_bytes / BYTES_READ_PER_ENTRY)))
    text = measure_text(draft.recipe.data, draft.recipe.tokenizer, reporter)
    draft = _fitted(replace(draft, vocab_size=text.vocab_size), text, budget)
    options = list(_options(draft, text, budget, sizes))
    if not options:
        raise _no_option(replace(draft, layers=sizes[0][0], width=sizes[0][1]), text, budget)
    busy = min(plan.undisturbed for _, plan in options) < UNDISTURBED
    if busy:
        reporter.warn(BUSY)
    best, plan = min(options, key=lambda option: excess_loss(option[1]))
    best = replace(best, reasons=_reasons(best, plan, text, look, budget, len(options), busy))
    return Proposal(best.yaml, best.recipe, plan)


def excess_loss(plan: Plan) -> float:
    """How much the loss should lack of what the text allows, up to a factor: what too few parameters and too few tokens cost.

    Tokens of a text that is repeated count as what they are worth.
    """
    tokens = effective_tokens(plan.tokens, plan.compute_optimal.unique_tokens, FITTED_REPETITIONS_SCALE)
    return float(PARAMETER_WEIGHT * _multiplied(plan) ** -PARAMETER_EXPONENT + tokens**-TOKEN_EXPONENT)


def _multiplied(plan: Plan) -> float:
    """Parameters that a token is multiplied by, attention counted with them."""
    return plan.flops / plan.tokens / 6


@dataclass(frozen=True)
class _Look:
    """What a first reading of the text found."""

    bytes: int
    documents: int
    train_bytes: int
    heldout_bytes: int

    def as_tokens(self, vocab_size: int) -> TextSize:
        train, heldout = (size // BYTES_PER_TOKEN for size in (self.train_bytes, self.heldout_bytes))
        return TextSize(vocab_size, train, heldout, exact=False)


def _first_draft(name: str, data: DataSection, budget: Budget) -> tuple[_Draft, _Look]:
    """A recipe with the split that suits the text, and what was found of it."""
    with Corpus(data.train, field=data.field, errors=data.errors) as corpus:
        found = split.scan(corpus.pieces())
        begun = (_WORDS.search(piece.text[:PROMPT_CHARACTERS]) for piece in islice(corpus.pieces(), PROMPT_PIECES))
        prompt = next((match[0] for match in begun if match), "")
    if not found.characters:
        raise InputError("the text is empty", where=describe(data.train))
    share = float(f"{min(0.1, budget.minutes * HELDOUT_BYTES_A_MINUTE / found.bytes, MOST_HELDOUT_BYTES / found.bytes):.1g}")
    alike = found.documents >= FEWEST_DOCUMENTS and found.lengths.max() <= share * found.characters / 2
    by: Literal["document", "tail"] = "document" if alike and _holds_out(found, share) else "tail"
    look = _Look(found.bytes, found.documents, int(found.bytes * (1 - share)), int(found.bytes * share))
    if look.train_bytes < FEWEST_BYTES:
        raise InputError(f"{found.bytes:,} bytes are too few to learn from", where=describe(data.train), hint="use more text")
    return _Draft(name, data, share, by, budget.minutes, prompt[:40], batch=_batch(CPU_BATCH_TOKENS // 256, budget)), look


def _holds_out(found: split.Scan, share: float) -> bool:
    """Whether the hashes of documents hold out as much as is wanted, give or take a half."""
    try:
        boundaries = split.by_document(found, share).boundaries
    except InputError:
        return False
    held = int(found.lengths[boundaries == 0].sum())
    return 0.5 <= held / (share * found.characters) <= 1.5


def _batch(sequences: int, budget: Budget) -> int:
    """At least so many that each device has as many as the others."""
    return math.ceil(sequences / budget.devices) * budget.devices


def _vocab_size(entries: float) -> int:
    """The power of two nearest to as many entries as are met often enough."""
    exponent = round(math.log2(max(1.0, entries)))
    return min(max(1 << exponent, SMALLEST_VOCABULARY), LARGEST_VOCABULARY)


def _fitted(draft: _Draft, text: TextSize, budget: Budget) -> _Draft:
    """With the context that text and machine suit, and the batch that goes with it on a CPU."""
    context = 256 if budget.accelerator is None or text.train_tokens < LONG_TEXT_TOKENS else 1024
    while context > 16 and (text.train_tokens < 32 * context or text.heldout_tokens < 2 * context):
        context //= 2
    tokens = min(CPU_BATCH_TOKENS, PASSES_OF_SHORT_TEXTS * text.train_tokens // STEPS_OF_SHORT_TEXTS)
    return replace(draft, context=context, batch=_batch(max(1, tokens // context), budget))


def _options(draft: _Draft, text: TextSize, budget: Budget, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[_Draft, Plan]]:
    """Each size that is worth considering: it fits into the memory, and the budget pays for enough steps."""
    for layers, width in sizes:
        option, plan = _priced(replace(draft, layers=layers, width=width), text, budget)
        if plan.steps < FEWEST_STEPS:
            return
        if plan.memory_bytes.total <= USABLE_MEMORY * plan.device_memory_bytes:
            yield option, plan


def _no_option(smallest: _Draft, text: TextSize, budget: Budget) -> InputError:
    """Why not even the smallest size is worth considering."""
    _, plan = _priced(smallest, text, budget)
    if plan.steps >= FEWEST_STEPS:
        return InputError("the smallest model does not fit into the memory", where="--hardware" if budget.accelerator else None)
    found = f"{_minutes(budget)} and {text.train_tokens:,} tokens are not enough for {FEWEST_STEPS} steps of the smallest model"
    return InputError(found, where="--minutes")


def _priced(draft: _Draft, text: TextSize, budget: Budget) -> tuple[_Draft, Plan]:
    """With batch, end, regularisation and evaluations that fit what the budget pays for."""
    draft, plan = _ended(draft, text, budget)
    if budget.accelerator is not None:
        while plan.steps >= 2 * STEPS_ON_ACCELERATORS and plan.tokens_per_step < MOST_BATCH_TOKENS:
            draft, plan = _ended(replace(draft, batch=2 * draft.batch), text, budget)
    _, dropout, ngram_dropout = next(limit for limit in REGULARISATION if plan.epochs >= limit[0])
    draft, plan = _ended(replace(draft, dropout=dropout, ngram_dropout=ngram_dropout), text, budget)
    evaluations = min(EVALUATIONS, int(EVALUATION_SHARE * 60 * budget.minutes / max(plan.evaluation_seconds, 1e-3)))
    draft = replace(draft, every=max(1, math.ceil(plan.steps / max(1, evaluations))))
    return draft, _planned(draft, text, budget)


def _ended(draft: _Draft, text: TextSize, budget: Budget) -> tuple[_Draft, Plan]:
    """With the minutes as its end, or as many epochs as are good for it where the minutes would pay for more."""
    draft = replace(draft, epochs=None)
    plan = _planned(draft, text, budget)
    most = MOST_LEARNED_BY_HEART * text.train_tokens / _multiplied(plan)
    if (draft.layers, draft.width) == SIZES[0]:
        most = max(most, PASSES_OF_SHORT_TEXTS)
    most = min(most, MOST_EPOCHS)
    if plan.epochs > most:
        draft = replace(draft, epochs=float(f"{most:.2g}"))
        plan = _planned(draft, text, budget)
    return draft, plan


def _planned(draft: _Draft, text: TextSize, budget: Budget) -> Plan:
    return make_plan(
        draft.recipe,
        text.vocab_size,
        text.train_tokens,
        heldout_tokens=text.heldout_tokens,
        accelerator=budget.accelerator,
        devices=budget.devices,
        here=budget.here,
    )


def _reasons(draft: _Draft, plan: Plan, text: TextSize, look: _Look, budget: Budget, options: int, busy: bool) -> dict[str, str]:
    """Why each value is what it is, by key."""
    machine = "this CPU" if budget.accelerator is None else f"{budget.devices} x {budget.accelerator}"
    documents = f"{look.documents:,} document{'' if look.documents == 1 else 's'}"
    megabytes = f"{look.bytes / 1e6:.2g} MB"
    fewer = f"{look.documents:,} documents" if look.documents > 1 else "a single document"
    epochs = f"{plan.epochs:.1f} passes over the text" if plan.epochs < 10 else f"{plan.epochs:.0f} passes over the text"
    return {
        "head": f"{describe(draft.data.train)}: {megabytes} in {documents}; {_minutes(budget)} on {machine}.\n"
        f"About {plan.steps:,} steps, {plan.tokens_per_second:,.0f} tokens a second in {plan.precision}. "
        f"What each key means: docs/recipe.md.{BUSY_HEAD if busy else ''}",
        "heldout": f"{look.heldout_bytes / 1e3:,.0f} kB, "
        + ("whole documents, chosen by their hash" if draft.by == "document" else f"the end of it: {fewer}"),
        "vocab_size": f"each entry is to be met often enough to be learned; {text.train_tokens:,} tokens to learn from",
        "n_layer": f"{_short(plan.parameters)} parameters: the best of {options} sizes by the scaling rule,",
        "n_head": f"between too few parameters and too few tokens for {_minutes(budget)}:",
        "n_embd": f"this size reads {_short(plan.tokens)} tokens, {epochs}",
        "context_length": "tokens that the model looks back",
        "preset": "without tables of n-grams: many passes fill them by heart" if draft.ngram_dropout is None else "",
        "ngram_embeddings": "tables of pairs and triples of tokens: nearly free, and worth a lot",
        "dropout": f"{epochs} would be learned by heart without it",
        "ngram_dropout": "whole tables would learn the names in each document by heart",
        "minutes": f"from the first step on; `steps: {plan.steps}` instead gives the same model every time",
        "epochs": f"more passes do harm; these take {plan.seconds_estimate / 60:.2g} of {_minutes(budget)}",
        "global_batch_size": f"{plan.tokens_per_step:,} tokens a step"
        + (": on a CPU larger ones only mean fewer steps" if budget.accelerator is None else f", for {plan.steps:,} steps"),
        "optimizer": "rates that hold for every width",
        "schedule": "the rate falls to nothing over the last 60 %, where most is learned",
        "every": "steps between measurements of the held-out text",
    }
