"""The ladder: train one model of each generation on the same text with the same budget, and compare them in one table.

Each rung is an ordinary run in the ladder's folder. Finished rungs are not trained again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from tinylm.data.prepare import prepare
from tinylm.errors import InputError, WorkError, did_you_mean
from tinylm.evaluation.evaluate_run import evaluate_run
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.model import registry
from tinylm.paths import atomic_file, atomic_write_text
from tinylm.recipe import Recipe, load
from tinylm.recipe.schema import LENGTHS, ModelVariant, require_text
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Run
from tinylm.sweep.runner import OtherRecipeError, Outcome, Sweep, Training, check_trained_on_same_text

Equal = Literal["time", "parameters"]
_SAMPLE_TOKENS = 60
_SAMPLE_CHARACTERS = 80


@dataclass(frozen=True)
class Rung:
    """One generation of language models."""

    name: str
    """The name in the table. The recipe is `ladder-NAME`."""
    year: int
    """The year of the first well-known language model of this kind."""
    width: str | None
    """The `model:` key that sets the model size, or None if the size depends on the training text."""

    @property
    def recipe(self) -> str:
        return f"ladder-{self.name}"


RUNGS = {
    rung.name: rung
    for rung in (
        Rung("ngram", 1999, None),  # Chen & Goodman: modified Kneser-Ney smoothing
        Rung("window", 2003, "n_hidden"),  # Bengio et al.
        Rung("rnn", 2010, "n_embd"),  # Mikolov et al.
        Rung("lstm", 2012, "n_embd"),  # Sundermeyer et al.
        Rung("gru", 2014, "n_embd"),  # Cho et al.
        Rung("gpt", 2018, "n_embd"),  # Radford et al.
    )
}
DEFAULT_RUNGS = ("ngram", "window", "rnn", "lstm", "gpt")
REFERENCE_RUNG = "gpt"
"""With `--equal parameters`, every other network has about as many parameters as this model."""


@dataclass(frozen=True)
class Row:
    """The result of one rung."""

    model: str
    year: int
    run: str
    parameters: int
    seconds: float
    """Training time, including evaluation during training."""
    bits_per_byte: float
    bits_per_byte_ci95: tuple[float, float]
    sample: str
    """A continuation of an empty prompt, on one line."""


@dataclass(frozen=True)
class LadderPlan:
    """Settings for `run_ladder`."""

    folder: Path
    source: tuple[str, ...]
    recipes: Mapping[str, Path]
    """Paths of the recipes that ship with tinylm, by recipe name."""
    rungs: Sequence[Rung]
    minutes: float
    """Total training time of all rungs."""
    equal: Equal = "time"
    overrides: Sequence[str] = ()
    """KEY=VALUE settings that apply to every rung's recipe."""
    device: str = "auto"


def find_rungs(names: Sequence[str]) -> list[Rung]:
    """Return the rungs with these names, oldest first. Raises `InputError` for an unknown name."""
    for name in names:
        if name not in RUNGS:
            hint = did_you_mean(name, RUNGS) or f"the models are {', '.join(RUNGS)}"
            raise InputError(f"no such model {name!r}", where="--models", hint=hint)
    return [rung for rung in RUNGS.values() if rung.name in names]


def run_ladder(plan: LadderPlan, reporter: Reporter = SILENT) -> Iterator[Row]:
    """Train and evaluate the rungs, and yield each result as soon as it is ready.

    Raises `InputError` if a recipe is not valid, the folder contains another ladder, or the text has changed since other rungs were
    trained. Raises `WorkError` if training fails.
    """
    if "-" in plan.source:
        hint = "save the text in a file"
        raise InputError("each model is trained on the text, but standard input can be read only once", where="-", hint=hint)
    values = {rung.name: _values(plan, rung) for rung in plan.rungs}
    recipes = {rung.name: load(plan.recipes[rung.recipe], _settings(values[rung.name])) for rung in plan.rungs}
    if plan.equal == "parameters":
        values = _with_equal_parameters(plan, values, recipes, reporter)
    outcomes: list[Outcome] = []
    for rung in plan.rungs:
        runner = Sweep(plan.folder, plan.recipes[rung.recipe], device=plan.device)
        training = Training(rung.name, values[rung.name])
        known = _is_finished(runner, training)
        for outcome in runner.run([training]):
            if outcome.error is not None:
                hint = "run the same command again to continue"
                raise WorkError(f"{rung.name}: {outcome.error}", where=str(plan.folder), hint=hint)
            outcomes.append(outcome)
            check_trained_on_same_text(outcomes)
            yield _row(plan, rung, outcome, reuse=known)


def _is_finished(runner: Sweep, training: Training) -> bool:
    """Whether a rung has been trained. Raises `InputError` if it was trained with other settings."""
    try:
        return runner.finished(training) is not None
    except OtherRecipeError as error:
        problem = f"{training.name} was trained with other settings: --minutes, --models, --equal, --seed, --set or the text differ"
        raise InputError(problem, where=error.where, hint="repeat the same options, or choose another folder with --out") from None


def _values(plan: LadderPlan, rung: Rung) -> dict[str, str]:
    """Return a rung's recipe settings by key. Every network has the same training time, unless the overrides set the length."""
    values = {"data.train": json.dumps(list(plan.source))}
    if rung.width is not None:
        values["training.minutes"] = f"{plan.minutes / len(plan.rungs):.6g}"
    for override in plan.overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError("must have the form KEY=VALUE", where=f"--set {override}")
        if key in {f"training.{length}" for length in LENGTHS}:
            values.pop("training.minutes", None)
        values[key] = value
    return values


def _settings(values: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _with_equal_parameters(
    plan: LadderPlan, values: dict[str, dict[str, str]], recipes: Mapping[str, Recipe], reporter: Reporter
) -> dict[str, dict[str, str]]:
    """Add the width that brings each network's parameter count closest to the reference model's."""
    first = next(iter(recipes.values()))
    vocab_size = prepare(require_text(first.data), first.tokenizer, reporter).tokenizer.vocab_size
    reference = RUNGS[REFERENCE_RUNG]
    target = parameter_count(load(plan.recipes[reference.recipe], _settings(_values(plan, reference))).model, vocab_size)
    chosen = dict(values)
    for rung in plan.rungs:
        if rung.width is not None and rung is not reference:
            width = width_for(recipes[rung.name].model, rung.width, vocab_size, target)
            chosen[rung.name] = {**values[rung.name], f"model.{rung.width}": str(width)}
    return chosen


def parameter_count(model: ModelVariant, vocab_size: int) -> int:
    """Return a network's number of parameters without allocating memory for them."""
    return registry.build_without_weights(model, vocab_size).parameter_count()


def width_for(model: ModelVariant, key: str, vocab_size: int, parameters: int) -> int:
    """Return the value of `key`, a multiple of 8, for which the parameter count is closest to `parameters`."""

    def count(width: int) -> int:
        return parameter_count(model.model_copy(update={key: width}), vocab_size)

    low, high = 8, 16
    while count(high) < parameters:
        low, high = high, 2 * high
    while high - low > 8:
        middle = (low + high) // 16 * 8
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    return min((low, high), key=lambda width: abs(count(width) - parameters))


def _row(plan: LadderPlan, rung: Rung, outcome: Outcome, *, reuse: bool) -> Row:
    """Evaluate a trained rung and sample from it, or read the saved row if nothing has been trained since."""
    file = plan.folder / "rows" / f"{rung.name}.json"
    if reuse and (saved := _saved_row(file)) is not None:
        return replace(saved, run=outcome.run)
    run = Run.open(outcome.run)
    scores = evaluate_run(run, device=plan.device).perplexity
    row = Row(
        model=rung.name,
        year=rung.year,
        run=outcome.run,
        parameters=outcome.result["parameters"],
        seconds=outcome.result["seconds"],
        bits_per_byte=scores.bits_per_byte,
        bits_per_byte_ci95=scores.bits_per_byte_ci95,
        sample=_sample(run),
    )
    atomic_write_text(file, json.dumps(asdict(row), ensure_ascii=False, indent=1) + "\n")
    return row


def _saved_row(file: Path) -> Row | None:
    """Read a row, or return None if the file is missing or damaged."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return Row(**{**saved, "bits_per_byte_ci95": tuple(saved["bits_per_byte_ci95"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _sample(run: Run) -> str:
    """Sample from an empty prompt. Return one line, truncated to fit in a table."""
    network = run.network(run.checkpoint(), torch.device("cpu"))
    options = SamplingOptions(max_new_tokens=_SAMPLE_TOKENS, temperature=0.8)
    [sample] = generate(network, run.tokenizer, "", options, seed=run.recipe.seed)
    return " ".join(sample.text.split())[:_SAMPLE_CHARACTERS]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot each rung's bits per byte with its 95% confidence interval, oldest rung first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    values = [row.bits_per_byte for row in rows]
    below = [row.bits_per_byte - row.bits_per_byte_ci95[0] for row in rows]
    above = [row.bits_per_byte_ci95[1] - row.bits_per_byte for row in rows]
    axes.errorbar(range(len(rows)), values, yerr=[below, above], fmt="o", capsize=4)
    axes.set_xticks(range(len(rows)), [f"{row.model}\n{row.year}" for row in rows])
    axes.set_ylabel("held-out bits per byte")
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=144, format=path.suffix[1:])
    pyplot.close(figure)


def as_dict(plan: LadderPlan, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the JSON document of `tinylm ladder --json`."""
    return {
        "folder": str(plan.folder),
        "source": list(plan.source),
        "minutes": plan.minutes,
        "equal": plan.equal,
        "rows": [{**asdict(row), "bits_per_byte_ci95": list(row.bits_per_byte_ci95)} for row in rows],
    }
