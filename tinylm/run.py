"""A run folder: what a training leaves behind, and what every later verb opens.

    recipe.yaml  tokenizer.json  metrics.jsonl  samples.md  environment.json
    heldout/           the held-out tokens, so that the folder can be measured wherever it is copied
    checkpoints/       step-000500/ {model.safetensors, training-00001.safetensors, state.json, manifest.json}, best, last

This room reads, and trusts nothing that it reads: a run folder may be somebody else's. Writing is the trainer's work.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.data.shards import Shard, open_shard
from tinylm.errors import InputError
from tinylm.paths import sync_folder, write_whole
from tinylm.recipe import Recipe, load
from tinylm.tokenizer import Tokenizer

if TYPE_CHECKING:  # a run can be found, listed and refused without waiting for torch
    import torch

    from tinylm.model.transformer import Transformer

RUNS = Path("runs")
LOCK = ".lock"
"""Held by whoever trains into the folder; it stays behind and means nothing then."""
OWN = (
    "recipe.yaml",
    "tokenizer.json",
    "metrics.jsonl",
    "samples.md",
    "environment.json",
    "heldout",
    "checkpoints",
    "reports",
    LOCK,
)
"""What a run folder consists of; anything else in it is the user's."""
VECTORS_FILE, EMBEDDINGS_MARK = "vectors.safetensors", "neighbours.jsonl"
"""What only folders of embeddings have beside these: the vectors, when done, and a file that is there from the beginning."""
LONGEST_CONTEXT = 1 << 24
"""More positions than any model is trained for: their tables would fill the memory of whoever opens the run."""
FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """One saved moment of a training."""

    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step-"))

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def state(self) -> dict[str, Any]:
        """Progress, best-so-far and fingerprints. Raises `InputError` when damaged or from another format."""
        state = _json(self.path / "state.json")
        if state.get("format") != FORMAT:
            raise InputError(
                f"saved in format {state.get('format')} by tinylm {state.get('version')}; this one reads format {FORMAT}",
                where=str(self.path),
            )
        return state

    def problem(self, only: Sequence[str] | None = None) -> str | None:
        """Why this checkpoint cannot be trusted, or None: every file is there with the size and SHA-256 it was saved with.

        With `only`, those files are looked at: a checkpoint can be used without what only resuming needs.
        """
        try:
            if self.path.is_symlink():
                return "it is a link"
            files = _json(self.path / "manifest.json")["files"]
            for name in only if only is not None else files:
                if name not in files:
                    return f"manifest.json does not list {name}"
                noted = files[name]
                file = self.path / name
                if Path(name).name != name or file.is_symlink():
                    return f"{name} does not belong in a checkpoint"
                if file.stat().st_size != noted["bytes"]:
                    return f"{name} has {file.stat().st_size:,} bytes instead of {noted['bytes']:,}"
                if sha256(file) != noted["sha256"]:
                    return f"{name} is not what was saved"
            missing = {"model.safetensors", "state.json"} - set(files)
            strangers = {file.name for file in self.path.iterdir()} - set(files) - {"manifest.json"}
            if missing:
                return f"manifest.json does not list {min(missing)}"
            if strangers and only is None:
                return f"manifest.json does not list {min(strangers)}"
        except OSError as error:
            return f"{Path(str(error.filename)).name}: {error.strerror}"
        except (InputError, KeyError, TypeError, ValueError) as error:
            return error.message if isinstance(error, InputError) else "manifest.json is not what was saved"
        return None


def claim(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raises `InputError` unless a training may write into `folder`: what is there is only touched when that was asked for."""
    if resume and overwrite:
        raise InputError("cannot both go on and begin anew", where="--resume, --overwrite")
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file, not a folder", where=str(folder), hint="choose another with --out")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise InputError("this folder may not be written to", where=str(there), hint="choose another with --out")
    if not folder.exists() or all(path.name == LOCK for path in folder.iterdir()):
        return
    if not (folder / "recipe.yaml").exists():
        raise InputError("this folder is not empty and not a run", where=str(folder), hint="choose another with --out")
    if not resume and not overwrite:
        raise InputError("there is a run here already", where=str(folder), hint="--resume goes on with it, --overwrite begins anew")


def own_names(folder: Path) -> tuple[str, ...]:
    """`OWN`, and in a folder of embeddings what only such have."""
    return (*OWN, VECTORS_FILE, EMBEDDINGS_MARK) if os.path.lexists(folder / EMBEDDINGS_MARK) else OWN


def refuse_links_out(folder: Path) -> None:
    """Raises `InputError` when part of a run folder is a link to somewhere else: a run is read, and written, where it lies."""
    inside = folder.resolve()
    checkpoints, names = folder / "checkpoints", own_names(folder)
    paths = [*folder.iterdir(), *(checkpoints.iterdir() if checkpoints.is_dir() and not checkpoints.is_symlink() else ())]
    for path in (*paths, *(folder / "heldout").glob("*")):
        if path.is_symlink() and (path.name in names or path.parent != folder) and not path.resolve().is_relative_to(inside):
            raise InputError("leads out of the run folder", where=str(path), hint="copy what it leads to, if you trust it")


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def seal(folder: Path) -> None:
    """Sync the files of a checkpoint to disk and write its manifest, with which it counts as whole."""
    files = {}
    for file in sorted(folder.iterdir()):
        with open(file, "rb+") as written:
            os.fsync(written.fileno())
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_whole(folder / "manifest.json", json.dumps({"files": files}, indent=1) + "\n")
    sync_folder(folder)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path.name}: {error.strerror}", where=str(path.parent)) from None
    except ValueError as error:
        raise InputError(f"{path.name} is not JSON: {error}", where=str(path.parent)) from None
    if not isinstance(value, dict):
        raise InputError(f"{path.name} is not an object", where=str(path.parent))
    return value


@dataclass(frozen=True)
class Run:
    """An opened run folder. Make one with `Run.open` or `Run.find`."""

    path: Path
    pinned: str | None = None
    """The checkpoint that the user named by giving its folder."""

    @classmethod
    def open(cls, path: str | Path, *, embeddings: bool = False) -> Run:
        """A run folder, or one checkpoint folder inside it. Raises `InputError` when it is neither.

        A folder of embeddings is none, unless `embeddings` says that it will do.
        """
        path = Path(path)
        if path.parent.name == "checkpoints" and (path / "state.json").exists():
            return cls.open(path.parent.parent, embeddings=embeddings)._pinned(path.name)
        if not path.exists():
            raise InputError("no such run", where=str(path), hint="`tinylm runs` lists those here")
        if not (path / "recipe.yaml").exists():
            raise InputError("not a run folder: it has no recipe.yaml", where=str(path))
        if not embeddings and (path / EMBEDDINGS_MARK).exists():
            raise InputError("holds embeddings, not a language model", where=str(path), hint="`tinylm embed` asks them")
        refuse_links_out(path)
        return cls(path)

    def _pinned(self, checkpoint: str) -> Run:
        return Run(self.path, checkpoint)

    @classmethod
    def find(cls) -> Run:
        """TINYLM_RUN, or the most recently trained run under runs/. Raises `InputError` when there is none."""
        if named := os.environ.get("TINYLM_RUN"):
            return cls.open(named)
        runs = list(all_runs(RUNS))
        if not runs:
            raise InputError("no run under runs/ yet", hint="train one with `tinylm train quickstart`, or name one with --run")
        return max(runs, key=lambda run: run.changed)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def changed(self) -> float:
        """When it was last trained, as seconds since the epoch."""
        metrics = self.path / "metrics.jsonl"
        return (metrics if metrics.exists() else self.path / "recipe.yaml").stat().st_mtime

    @cached_property
    def recipe(self) -> Recipe:
        return load(self.path / "recipe.yaml", check_files=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path / "tokenizer.json")

    def heldout(self) -> Shard:
        """The held-out half that this run was measured on. Raises `InputError` where there is none: its text is not known here."""
        if not (self.path / "heldout").exists():
            raise InputError("this run has no held-out text", where=str(self.path), hint="name a text to measure it on")
        return open_shard(self.path / "heldout", "heldout")

    def checkpoints(self) -> list[Checkpoint]:
        """Whole or not, in the order of their steps."""
        found = (self.path / "checkpoints").glob("step-*")
        return sorted((Checkpoint(path) for path in found if path.name[5:].isdigit()), key=lambda checkpoint: checkpoint.step)

    def checkpoint(self, which: str | None = None) -> Checkpoint:
        """`best`, `last` or a step; default: the one pinned by its folder, else best. Raises `InputError` when absent."""
        which = which or self.pinned or "best"
        if which in ("best", "last"):
            which = self._pointed(which)
        digits = which.removeprefix("step-")
        if not digits.isdigit():
            raise InputError(f"{which!r} is not best, last or a step", where="--checkpoint")
        for checkpoint in self.checkpoints():
            if checkpoint.step == int(digits):
                return checkpoint
        steps = ", ".join(str(checkpoint.step) for checkpoint in self.checkpoints()) or "none"
        raise InputError(f"no checkpoint of step {int(digits)} in {self.path} (there: {steps})", where="--checkpoint")

    def _pointed(self, name: str) -> str:
        pointer = self.path / "checkpoints" / name
        if not pointer.exists():
            saved = self.checkpoints()
            hint = f"--checkpoint {saved[-1].step} names the newest" if saved else "has it trained to its first checkpoint?"
            raise InputError(f"no {name} checkpoint yet", where=str(self.path), hint=hint)
        pointed = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"step-[0-9]+", pointed):
            raise InputError("names no checkpoint", where=str(pointer), hint="name a step with --checkpoint")
        return pointed

    def network(self, checkpoint: Checkpoint, device: torch.device) -> Transformer:
        """The model with the checkpoint's weights, in float32, ready to evaluate; low-rank additions are merged into them.

        Raises `InputError` when weights or tokenizer are not what was saved.
        """
        from tinylm.model import lora

        problem = checkpoint.problem(only=("model.safetensors", "state.json"))
        if problem is not None:
            raise InputError(f"damaged: {problem}", where=str(checkpoint.path), hint="name another with --checkpoint")
        if checkpoint.state["fingerprints"]["tokenizer"] != self.tokenizer.fingerprint:
            raise InputError("not the tokenizer this model was trained with", where=str(self.path / "tokenizer.json"))
        check_shapes(self.recipe, self.tokenizer.vocab_size, checkpoint)
        network = lora.blank(self.recipe.model, self.tokenizer.vocab_size, self.recipe.training.lora)
        load_weights(network, checkpoint)
        lora.merge(network)
        return network.to(device).eval()

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl; a line torn by a crash is left out."""
        try:
            lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and event.get("kind") in ("step", "eval"):
                yield event

    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())


def check_shapes(recipe: Recipe, vocab_size: int, checkpoint: Checkpoint) -> None:
    """Compare the header of model.safetensors with what the recipe builds, before memory is spent on either.

    A file is as large as its header says, and a model no larger than a file that fits it. Raises `InputError`.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from tinylm.model import lora

    model, file = recipe.model, checkpoint.path / "model.safetensors"
    try:
        with safe_open(file, "pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118  it is no mapping
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot be read: {error}", where=str(file)) from None
    layers = sum(name.endswith(".attention.qkv.weight") for name in shapes)
    if layers != model.n_layer:
        raise InputError(f"does not fit the recipe: {layers} layers instead of {model.n_layer}", where=str(file))
    if model.context_length > LONGEST_CONTEXT:
        raise InputError(f"a context of {model.context_length:,} tokens", where=str(checkpoint.path.parent.parent / "recipe.yaml"))
    with torch.device("meta"):
        built = lora.blank(model, vocab_size, recipe.training.lora)
    wanted = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    if model.tie_embeddings:
        del wanted["head.weight"]
        shapes.pop("head.weight", None)
    different = [name for name in {**wanted, **shapes} if wanted.get(name) != shapes.get(name)]
    if different:
        name = different[0]
        found = f"{name} is {shapes.get(name, 'not there')} instead of {wanted.get(name, 'not there')}"
        raise InputError(f"does not fit the recipe: {found}", where=str(file))


def load_weights(network: Transformer, checkpoint: Checkpoint) -> None:
    """Fill the network from model.safetensors. Raises `InputError` when it does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = checkpoint.path / "model.safetensors"
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot be read: {error}", where=str(file)) from None
    if network.model.tie_embeddings and "embedding.weight" in weights:
        weights["head.weight"] = weights["embedding.weight"]
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"does not fit the recipe: {error}", where=str(file)) from None


def all_runs(folder: Path) -> Iterator[Run]:
    """The run folders directly inside `folder`; those of embeddings are none."""
    for path in sorted(folder.glob("*/recipe.yaml")):
        if not (path.parent / EMBEDDINGS_MARK).exists():
            yield Run(path.parent)
