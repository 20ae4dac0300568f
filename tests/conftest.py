"""Real text and one tiny trained run, shared by the tests of every room."""

from __future__ import annotations

import os
import pydoc_data.topics
from pathlib import Path

import pytest
import torch

from tinylm.pipeline import train
from tinylm.recipe import Recipe, loads
from tinylm.run import Run

TINY = """\
name: tiny
seed: 1
data: {{train: {text}, heldout: {{share: 0.1, by: tail}}}}
tokenizer: {{kind: bpe, vocab_size: 400}}
model: {{preset: {preset}, n_layer: 2, n_head: 2, n_embd: 32, context_length: 32}}
training: {{steps: 20, global_batch_size: 8, micro_batch_size: 4, precision: fp32, log_every: 1}}
evaluation: {{every: 10}}
checkpoint: {{every: 5, keep: 1}}
"""


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the user's cache; tiny models are fastest on one thread, beside other workers above all."""
    os.environ["TINYLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("TINYLM_RUN", None)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def english() -> str:
    """460 kB of real English: Python's language reference."""
    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


@pytest.fixture(scope="session")
def text_file(english: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "english.txt"
    path.write_text(english[:60_000], encoding="utf-8")
    return path


def tiny_recipe(text: Path, preset: str = "modern", *overrides: str) -> Recipe:
    """A recipe that trains in a second or two."""
    return loads(TINY.format(text=text, preset=preset), overrides)


@pytest.fixture(scope="session")
def tiny_run(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run folder. Read it; never write into it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_recipe(text_file), folder, device="cpu")
    return Run.open(folder)
