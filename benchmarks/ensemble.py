"""Measure how much an ensemble of several seeds improves the held-out loss, and how much of this one distilled model keeps.

    python benchmarks/ensemble.py SOURCE... [--recipe quickstart] [--members 3] [--steps 450] [--weights 0.5 0.8]
                                  [--set KEY=VALUE]... [--out FOLDER]

For each text, the script trains the recipe with `--members` seeds for the same number of steps, and evaluates the ensembles of the
first 2, 3, ... members. Then it trains the recipe with one more seed, once alone and once for each teacher weight, with all members
as teachers. All models are evaluated after the last step. The differences in bits per byte are paired: those of ensembles are
relative to the best member, and those of distilled models to the model with the same seed that was trained alone. `kept` is the
improvement by distillation as a fraction of the difference between the ensemble and the mean of its members.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from tinylm import pipeline
from tinylm.ensemble import Ensemble
from tinylm.evaluation.comparison import compare_runs
from tinylm.evaluation.evaluate_run import Evaluation, evaluate_ensemble
from tinylm.recipe import Recipe, load
from tinylm.run import Run


def train(recipe: Recipe, folder: Path) -> tuple[Run, float]:
    """Train a recipe and return the last checkpoint, as a run, and the seconds per step."""
    result = pipeline.train(recipe, folder, device="cpu", overwrite=True)
    return Run.open(Run.open(folder).checkpoint("last").path), result.train_seconds / result.step


def evaluate(runs: list[Run]) -> Evaluation:
    return evaluate_ensemble(Ensemble.of(runs), device="cpu")


def show(name: str, result: Evaluation, difference: str) -> None:
    scores = result.perplexity
    print(f"{name:<28}  {scores.loss:.4f} nats  {scores.bits_per_byte:.4f} bits per byte  {difference}", flush=True)


def measure(arguments: argparse.Namespace, source: str, folder: Path) -> None:
    """Train and evaluate all models on one text, and print the results."""

    def recipe(seed: int, *overrides: str) -> Recipe:
        length = [f"training.steps={arguments.steps}"] if arguments.steps else []
        shared = [f"data.train={source}", *length, *arguments.set, f"seed={seed}", "sampling.every=null", "checkpoint.keep=0"]
        return load(arguments.recipe, [*shared, *overrides])

    print(f"\n{source}", flush=True)
    members, alone = [], []
    for seed in range(1, arguments.members + 1):
        members.append(train(recipe(seed), folder / f"member-{seed}")[0])
        alone.append(evaluate(members[-1:]))
        show(f"seed {seed}", alone[-1], "")
    mean_loss = statistics.mean(result.perplexity.loss for result in alone)
    print(f"{'mean of the seeds':<28}  {mean_loss:.4f} nats", flush=True)
    ensemble = alone[0]
    for count in range(2, arguments.members + 1):
        ensemble = evaluate(members[:count])
        comparison = ensemble.best_member.comparison if ensemble.best_member is not None else None
        interval = "" if comparison is None else f"({comparison.ci95[0]:+.4f} to {comparison.ci95[1]:+.4f})"
        show(f"ensemble of {count}", ensemble, "" if comparison is None else f"{comparison.difference:+.4f} {interval} vs. best")

    seed = arguments.members + 1
    control, control_seconds = train(recipe(seed), folder / "alone")
    control_result = evaluate([control])
    show(f"seed {seed} alone", control_result, "")
    teachers = ", ".join(str(run.checkpoint().path) for run in members)
    for weight in arguments.weights:
        overrides = [f"objective.teacher=[{teachers}]", f"objective.teacher_weight={weight}"]
        distilled, seconds = train(recipe(seed, *overrides), folder / f"distilled-{weight:g}")
        result = evaluate([distilled])
        [test] = compare_runs([distilled, control], device="cpu").model_tests
        low, high = test.result.ci95
        kept = (control_result.perplexity.loss - result.perplexity.loss) / (mean_loss - ensemble.perplexity.loss)
        difference = f"{test.result.difference:+.4f} ({low:+.4f} to {high:+.4f}) vs. alone, kept {kept:.0%}"
        show(
            f"seed {seed} distilled, weight {weight:g}",
            result,
            f"{difference}, {seconds / control_seconds:.2f} times the step time",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="+")
    parser.add_argument("--recipe", default="quickstart", help="a recipe file, or the name of a recipe in recipes/")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: the recipe's training length")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    arguments = parser.parse_args()
    if not arguments.recipe.endswith(".yaml"):
        arguments.recipe = Path(__file__).resolve().parent.parent / "recipes" / f"{arguments.recipe}.yaml"
    with tempfile.TemporaryDirectory() as temporary:
        for number, source in enumerate(arguments.source, 1):
            measure(arguments, source, (arguments.out or Path(temporary)) / f"text-{number}")


if __name__ == "__main__":
    main()
