"""Choose the model sizes and training lengths of a scaling experiment, and store them with its recipe.

    DIR/grid.json    the arguments of the experiment and its runs
    DIR/base.yaml    the recipe of all runs, apart from their size and length

The runs differ only in size and length. They share the text, tokenizer, batch size, learning rates and dropout. Each run has its
own learning-rate schedule, which ends with the run: losses in the middle of a longer run would be too high (Hoffmann et al. 2022).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinylm.cost.cpu import Processor
from tinylm.cost.parameters import estimated, flops_per_token
from tinylm.cost.plan import Plan, make_plan
from tinylm.data.estimate import TextSize, estimate_text_size
from tinylm.errors import InputError
from tinylm.paths import atomic_write_text
from tinylm.recipe import Recipe, load, loads
from tinylm.recipe.schema import LENGTHS, DataSection
from tinylm.reporting import SILENT, Reporter
from tinylm.scaling.law import MIN_DISTINCT
from tinylm.suggest import MAX_EPOCHS, MAX_MEMORIZATION, SIZES, Budget, suggest_recipe
from tinylm.sweep.runner import Training, check_sweep_folder

FAMILY = ((2, 64), *SIZES)
"""(number of layers, width) of the models in the experiment and of those that it recommends. Heads are 64 wide."""
SHAPES = ((4, 4), (3, 3))
"""(number of sizes, number of lengths of each size) of the full grid, and of a smaller one for short budgets.

In simulations of three laws with 0.3% noise, the root-mean-square error of the prediction for four times the compute was 0.5 to
0.8% with 16 runs and 0.7 to 1.4% with 9. If all sizes had the same lengths instead of the same compute, it would be 0.5 to
1.5% and 1.3 to 5.4%: the best size for four times the compute is often a small one, whose runs would be far shorter than the
predicted one."""
LENGTH_RATIO = 2
MIN_STEPS = 100
"""Minimum number of steps in the shortest runs. The first steps of a run do not follow a power law."""
RUN_SECONDS = 6.0
"""Assumed time to start a run and save it."""
SIZE_KEYS = ("model.n_layer", "model.n_head", "model.n_embd")
FIXED_KEYS = (*SIZE_KEYS, *(f"training.{key}" for key in LENGTHS))
"""Recipe keys that the grid sets."""
GRID_FILE, BASE_FILE = "grid.json", "base.yaml"
_ARGUMENTS = {"source": "SOURCE", "minutes": "--minutes", "overrides": "--set", "accelerator": "--hardware"}
"""The command-line argument of each field of `Request`."""
_RUN_SETTINGS = {"evaluation.every": "1000000", "checkpoint.every": "0.5", "checkpoint.keep": "0", "sampling.every": "null"}
"""Evaluate only at the end of each run, on the same held-out tokens."""


@dataclass(frozen=True)
class Request:
    """The arguments of an experiment. A folder contains the runs of a single request."""

    source: tuple[str, ...]
    """The text: files, folders, globs, URLs or builtin:NAME."""
    minutes: float
    """Approximate training time of all runs."""
    overrides: tuple[str, ...] = ()
    """KEY=VALUE settings that apply to every run."""
    accelerator: str | None = None
    """A name from `tinylm.cost.accelerators`, or None for the CPU."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    n_layer: int
    n_embd: int
    steps: int
    parameters: float
    """N in the scaling law: FLOPs per token / 6. This is the number of weights in matrix products, including the head, plus the
    cost of attention. It does not include embedding tables."""
    tokens: int
    """D in the scaling law: the number of training tokens, including repetitions."""

    @property
    def flops(self) -> float:
        """Training compute in FLOPs, 6 N D."""
        return 6 * self.parameters * self.tokens

    @property
    def training(self) -> Training:
        """The run, as an argument for `Sweep.run`."""
        size = size_values(self.n_layer, self.n_embd)
        name = f"n_embd={self.n_embd},steps={self.steps}"
        return Training(name, {**size, "training.steps": str(self.steps), **_RUN_SETTINGS})


@dataclass(frozen=True)
class Grid:
    """The runs of an experiment, and the sizes of its text in tokens."""

    request: Request
    vocab_size: int
    unique_tokens: int
    """Number of tokens in the training text."""
    tokens_per_step: int
    cells: tuple[Cell, ...]

    @property
    def planned(self) -> list[Training]:
        """The runs, as arguments for `Sweep.run`."""
        return [cell.training for cell in self.cells]


def size_values(n_layer: int, n_embd: int) -> dict[str, str]:
    """Return the recipe keys for a size in `FAMILY`."""
    return dict(zip(SIZE_KEYS, map(str, (n_layer, max(1, n_embd // 64), n_embd)), strict=True))


def law_parameters(recipe: Recipe, vocab_size: int) -> float:
    """Return N of a recipe (see `Cell.parameters`). Raises `InputError` if its architecture has no cost estimates."""
    return flops_per_token(estimated(recipe.model), vocab_size) / 6


def resized(recipe: Recipe, n_layer: int, n_embd: int, steps: int) -> Recipe:
    """Return the recipe with another size in `FAMILY` and another training length."""
    size = {key.removeprefix("model."): int(value) for key, value in size_values(n_layer, n_embd).items()}
    length = {key: steps if key == "steps" else None for key in LENGTHS}
    model, training = recipe.model.model_copy(update=size), recipe.training.model_copy(update=length)
    return recipe.model_copy(update={"model": model, "training": training})


def open_grid(folder: Path) -> tuple[Grid, Recipe]:
    """Read an experiment's grid and recipe. Raises `InputError` if the folder does not contain an experiment."""
    file = folder / GRID_FILE
    try:
        stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        request: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in stored.pop("request").items()
        }
        cells = tuple(Cell(**cell) for cell in stored.pop("cells"))
        grid = Grid(request=Request(**request), cells=cells, **stored)
    except FileNotFoundError:
        raise InputError(
            "the folder does not contain a scaling experiment",
            where=str(folder),
            hint="select its folder with --out, or run one with `tinylm scale SOURCE`",
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"cannot be read: {error}", where=str(file), hint="choose another folder with --out") from None
    return grid, load(folder / BASE_FILE, check_files=False)


def open_or_plan(folder: Path, request: Request, *, processor: Processor | None = None, reporter: Reporter = SILENT) -> Grid:
    """Return the grid that is stored in the folder, or plan and store a new one.

    Raises `InputError` if the folder contains another experiment, and in the cases of `check_sweep_folder` and `plan_grid`.
    """
    check_sweep_folder(folder)
    if (folder / GRID_FILE).exists():
        grid, _ = open_grid(folder)
        if grid.request != request:
            different = next(key for key in asdict(request) if getattr(grid.request, key) != getattr(request, key))
            raise InputError(
                f"the folder contains a scaling experiment with a different {_ARGUMENTS[different]}",
                where=str(folder),
                hint="choose another folder with --out",
            )
        return grid
    grid, base = plan_grid(request, processor=processor, reporter=reporter)
    folder.mkdir(parents=True, exist_ok=True)
    store(folder, grid, base)
    return grid


def store(folder: Path, grid: Grid, base: Recipe) -> None:
    """Write the recipe, and the grid last, so that a folder that contains a grid is complete."""
    atomic_write_text(folder / BASE_FILE, base.to_yaml())
    atomic_write_text(folder / GRID_FILE, json.dumps(asdict(grid), ensure_ascii=False, indent=1) + "\n")


def plan_grid(request: Request, *, processor: Processor | None = None, reporter: Reporter = SILENT) -> tuple[Grid, Recipe]:
    """Choose a recipe, sizes and lengths for a text and a training time.

    The recipe and the largest size are those of `suggest_recipe` for the same time. If `processor` is None, the CPU is measured.
    Raises `InputError` if the text is too short, or if the time does not suffice for the smallest grid.
    """
    for setting in request.overrides:
        key, equals, _ = setting.partition("=")
        if not equals:
            raise InputError("must have the form KEY=VALUE", where=f"--set {setting}")
        if key.strip() in FIXED_KEYS:
            raise InputError("`tinylm scale` chooses the sizes and training lengths", where=f"--set {setting}", hint="omit it")
    budget = Budget(request.minutes, request.accelerator, processor=processor)
    data = DataSection(train=request.source)
    suggestion = suggest_recipe(data, budget, name="scale", sizes=FAMILY, fixed_context=True, reporter=reporter)
    base = loads(suggestion.yaml, request.overrides)
    known = (base.data, base.tokenizer) == (suggestion.recipe.data, suggestion.recipe.tokenizer)
    text = estimate_text_size(base.data, base.tokenizer, SILENT if known else reporter)
    planner = _Planner(base, text, budget, reporter)
    largest = FAMILY.index((estimated(suggestion.recipe.model).n_layer, estimated(suggestion.recipe.model).n_embd))
    base = resized(base, *FAMILY[largest], MIN_STEPS)
    tokens_per_step = base.training.global_batch_size * base.model.context_length
    cells = tuple(
        Cell(*size, steps, law_parameters(resized(base, *size, steps), text.vocab_size), steps * tokens_per_step)
        for size, steps in planner.choose(max(largest, MIN_DISTINCT - 1))
    )
    return Grid(request, text.vocab_size, text.train_tokens, tokens_per_step, cells), base


def max_tokens(parameters: float, unique_tokens: int) -> float:
    """Return the number of tokens above which a run would overfit, which the law does not describe, as in `tinylm new`."""
    return min(MAX_EPOCHS * unique_tokens, MAX_MEMORIZATION * unique_tokens**2 / parameters)


@dataclass(frozen=True)
class _Planner:
    """Chooses the sizes and lengths that fit in the budget."""

    base: Recipe
    text: TextSize
    budget: Budget
    reporter: Reporter

    def choose(self, largest: int) -> list[tuple[tuple[int, int], int]]:
        """Return the size and number of steps of each run. Choose smaller sizes than `FAMILY[largest]` if runs would be too short.

        The longest runs of all sizes have the same compute, and each shorter run has half the compute of the next longer one.
        """
        costs = {size: self._costs(size) for size in FAMILY[: largest + 1]}
        flops_per_step = {size: 6 * self._parameters(size) * cost.tokens_per_step for size, cost in costs.items()}
        minutes, limited_by_text = 0.0, False
        for sizes, n_lengths in self._shapes(largest):
            shares = [LENGTH_RATIO**-index for index in reversed(range(n_lengths))]
            fixed = len(sizes) * n_lengths * RUN_SECONDS + n_lengths * sum(costs[size].evaluation_seconds for size in sizes)
            seconds_per_flop = sum(shares) * sum(costs[size].seconds_per_step / flops_per_step[size] for size in sizes)
            flops = (60 * self.budget.minutes - fixed) / seconds_per_flop  # of the longest run of each size
            allowed = {size: flops / flops_per_step[size] for size in sizes}
            limits = {
                size: max_tokens(self._parameters(size), self.text.train_tokens) / costs[size].tokens_per_step for size in sizes
            }
            longest = {size: min(allowed[size], limits[size]) for size in sizes}
            if min(longest.values()) * shares[0] >= MIN_STEPS:
                if longest != allowed:
                    training = sum(shares) * sum(longest[size] * costs[size].seconds_per_step for size in sizes)
                    used = (fixed + training) / 60
                    self.reporter.warn(f"longer runs would overfit this text; the experiment takes about {used:.2g} minutes")
                return [(size, max(MIN_STEPS, round(longest[size] * share))) for size in sizes for share in shares]
            minutes = (fixed + MIN_STEPS / shares[0] * max(flops_per_step[size] for size in sizes) * seconds_per_flop) / 60
            limited_by_text = min(allowed.values()) * shares[0] >= MIN_STEPS
        if limited_by_text:
            raise InputError(
                f"{self.text.train_tokens:,} training tokens are not enough: even the smallest models would overfit",
                where=", ".join(self.base.data.sources()["train"]),
                hint="use a longer text",
            )
        raise InputError(
            f"not enough time for {MIN_DISTINCT} model sizes and {MIN_DISTINCT} training lengths",
            where=f"--minutes {self.budget.minutes:g}",
            hint=f"the smallest experiment takes about {minutes:.2g} minutes",
        )

    def _parameters(self, size: tuple[int, int]) -> float:
        return law_parameters(resized(self.base, *size, MIN_STEPS), self.text.vocab_size)

    @staticmethod
    def _shapes(largest: int) -> Iterator[tuple[Sequence[tuple[int, int]], int]]:
        """Yield pairs of sizes and a number of lengths, preferred first: full grids with the largest sizes, then smaller grids."""
        (full, full_lengths), (small, small_lengths) = SHAPES
        for top in range(largest, max(largest - 2, full - 2), -1):
            yield FAMILY[top + 1 - full : top + 1], full_lengths
        for top in range(largest, small - 2, -1):
            yield FAMILY[top + 1 - small : top + 1], small_lengths

    def _costs(self, size: tuple[int, int]) -> Plan:
        recipe = resized(self.base, *size, 10 * MIN_STEPS)
        once = recipe.evaluation.model_copy(update={"every": 10 * MIN_STEPS})
        return make_plan(
            recipe.model_copy(update={"evaluation": once}),
            self.text.vocab_size,
            self.text.train_tokens,
            heldout_tokens=self.text.heldout_tokens,
            accelerator=self.budget.accelerator,
            devices=self.budget.devices,
            processor=self.budget.processor,
        )
