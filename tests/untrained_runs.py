"""Run folders with untrained models for export and import tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tinylm.interchange.importing import save_untrained
from tinylm.model.transformer import Transformer
from tinylm.recipe import loads
from tinylm.run import Run
from tinylm.tokenizer import Tokenizer

CONTEXT = 48
MakeRun = Callable[..., Run]
"""The type of the `make_run` fixture."""


def save_run(folder: Path, network: Transformer, tokenizer: Tokenizer) -> Run:
    """Create a run folder with a single checkpoint that contains the weights of `network`."""
    folder.mkdir(parents=True)
    recipe = loads("data: {train: text.txt}\ntraining: {steps: 1}\n", check_files=False)
    recipe = recipe.model_copy(update={"model": network.model, "name": folder.name})
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    tokenizer.save(folder / "tokenizer.json")
    fingerprint = Tokenizer.load(folder / "tokenizer.json").fingerprint
    save_untrained(folder, network, {"data": "", "tokenizer": fingerprint})
    return Run.open(folder)
