"""Test that `tinylm plot` draws several metrics and many runs, and compares runs only in comparable units."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command import RunCli

from tinylm.recipe.schema import BpeTokenizer
from tinylm.run import Run
from tinylm.text.sources import Piece
from tinylm.tokenizer import training


@pytest.fixture
def svg_of(run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`svg_of(runs, *options)` plots runs and returns the SVG, with labels as text instead of paths."""
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")

    def plot(runs: list[Path], *options: str) -> str:
        assert run_cli("plot", *runs, *options, "--out", tmp_path / "x.svg").code == 0
        return (tmp_path / "x.svg").read_text(encoding="utf-8")

    return plot


def test_plot_draws_several_metrics_with_a_legend(svg_of: Callable[..., str], tiny_run: Run) -> None:
    picture = svg_of([tiny_run.path], "--metric", "loss", "--metric", "lr", "--metric", "grad_norm")
    for text in ("Held-out loss", "Learning rate", "Gradient norm", "tiny, held-out loss", "training loss of each step"):
        assert text in picture


def copies(run: Run, folder: Path, changes: list[dict[str, object]]) -> list[Path]:
    """Return copies of a run with changed keys in their recipes."""
    paths = []
    for number, change in enumerate(changes):
        paths.append(shutil.copytree(run.path, folder / f"run{number:02}"))
        (paths[-1] / "recipe.yaml").write_text(run.recipe.model_copy(update=change).to_yaml())
    return paths


def test_plot_compares_runs_with_different_tokenizers_in_bits_per_byte(
    svg_of: Callable[..., str], tiny_run: Run, tmp_path: Path
) -> None:
    (other,) = copies(tiny_run, tmp_path, [{}])
    training.train(BpeTokenizer(kind="bpe", vocab_size=300), [Piece("a text" * 50, True)], print).save(other / "tokenizer.json")
    picture = svg_of([tiny_run.path, other])
    assert "Held-out bits per byte" in picture
    assert "nats" not in picture


def test_plot_groups_more_than_ten_runs(svg_of: Callable[..., str], tiny_run: Run, tmp_path: Path) -> None:
    seeds = copies(tiny_run, tmp_path / "seeds", [{"seed": seed} for seed in range(11)])
    assert "run00 (mean and range of 11 seeds)" in svg_of(seeds)
    sections = [tiny_run.recipe.training.model_copy(update={"clip_grad_norm": clip + 1.0}) for clip in range(12)]
    recipes = copies(tiny_run, tmp_path / "recipes", [{"training": section} for section in sections])
    assert "7 others" in svg_of(recipes)
