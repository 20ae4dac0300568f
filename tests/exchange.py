"""Run folders of models that were never trained, for the tests of going elsewhere and coming back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tinylm.model.transformer import Transformer
from tinylm.optim.groups import Optimizers
from tinylm.recipe import loads
from tinylm.run import Run
from tinylm.tokenizer import Tokenizer
from tinylm.training.checkpoint import CheckpointWriter
from tinylm.training.trainer import Progress

CONTEXT = 48
Make = Callable[..., Run]


def save(folder: Path, network: Transformer, tokenizer: Tokenizer) -> Run:
    folder.mkdir(parents=True)
    recipe = loads("data: {train: text.txt}\ntraining: {steps: 1}\n", check_files=False)
    recipe = recipe.model_copy(update={"model": network.model, "name": folder.name})
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    tokenizer.save(folder / "tokenizer.json")
    fingerprint = Tokenizer.load(folder / "tokenizer.json").fingerprint
    writer = CheckpointWriter(folder, keep=1)
    state = {**asdict(Progress()), "scaler": {}, "fingerprints": {"data": "", "tokenizer": fingerprint}}
    writer.point("best", writer.save(network, Optimizers({}, {}), state).name)
    return Run.open(folder)
