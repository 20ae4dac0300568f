"""Tiny recipes for encoders and classifiers, and their training texts."""

from __future__ import annotations

import json
from pathlib import Path

from tinylm.recipe import Recipe, loads

TRAINING = "training: {steps: 6, global_batch_size: 8, micro_batch_size: 4, precision: fp32, compile: off, log_every: 1}\n"
EVERY = "evaluation: {every: 3}\ncheckpoint: {every: 3}\n"
SHAPE = "n_layer: 1, n_head: 2, n_embd: 16, context_length: 16"
WORDS = {
    "fruit": ("apple", "pear", "plum", "grape"),
    "tool": ("hammer", "saw", "drill", "file"),
    "color": ("red", "green", "blue", "white"),
}


def write_text(folder: Path) -> Path:
    """Write a JSON Lines file with 42 short documents that follow a few sentence patterns."""
    lines = [
        {"text": f"The {a} is near the {b}. The {b} is not the {a}."}
        for number in range(10)
        for words in WORDS.values()
        for a, b in [(words[number % 4], words[(number + 1) % 4])]
    ]
    lines += [{"text": f"A {a} and number {number}"} for number, a in enumerate(WORDS["tool"] * 3)]
    file = folder / "text.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


def write_labeled(folder: Path, suffix: str = ".jsonl") -> Path:
    """Write 60 different labeled texts, 20 for each label."""
    rows = [(f"the {words[i % 4]} and the {words[i // 4 % 4]} {i}", label) for label, words in WORDS.items() for i in range(20)]
    file = folder / f"labeled{suffix}"
    if suffix == ".jsonl":
        file.write_text("".join(f"{json.dumps({'text': text, 'label': label})}\n" for text, label in rows))
    else:
        delimiter = "\t" if suffix == ".tsv" else ","
        file.write_text("".join(f"{text}{delimiter}{label}\n" for text, label in [("text", "label"), *rows]))
    return file


def masked_recipe(folder: Path, *, model: str = "preset: modern", extra: str = "", tokenizer: str = "{kind: byte}") -> Recipe:
    """Return a recipe that trains a masked language model on the text from `write_text`."""
    return loads(
        f"name: masked\ndata: {{train: {write_text(folder)}, heldout: {{share: 0.2, by: tail}}}}\ntokenizer: {tokenizer}\n"
        f"model: {{architecture: encoder, {model}, {SHAPE}}}\n{TRAINING}{EVERY}{extra}"
    )


def classifier_recipe(
    folder: Path,
    *,
    model: str = f"architecture: encoder, {SHAPE}",
    data: str = "",
    tokenizer: str = "{kind: byte}",
    extra: str = "",
) -> Recipe:
    """Return a recipe that trains a classifier on the texts from `write_labeled`."""
    return loads(
        f"name: labels\ndata: {{train: {write_labeled(folder)}, format: labels, heldout: {{share: 0.2}}{data}}}\n"
        f"tokenizer: {tokenizer}\nmodel: {{{model}}}\n{TRAINING}{EVERY}{extra}"
    )
