"""Run folders, which `tinylm train` writes and all other commands open.

    recipe.yaml  tokenizer.json  metrics.jsonl  samples.md  environment.json
    chat_template.json  the control tokens for conversations, if the model was trained on conversations
    heldout/           the held-out tokens and the test tokens, so that a copied folder can still be evaluated
    training_text/     a sample of the training text's n-grams, to measure its overlap with other texts
    checkpoints/       step-000500/ {model.safetensors, training-00001.safetensors, state.json, manifest.json}, best, last

This module reads run folders and validates everything it reads, because a folder may come from an untrusted source.
`training.run_folder` and `training.checkpoint` write run folders.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm import hints
from tinylm.data import training_text
from tinylm.data.shards import Shard, open_shard
from tinylm.data.source_spans import Span, open_spans
from tinylm.data.training_text import TrainingText, open_training_texts
from tinylm.errors import InputError, TinylmWarning
from tinylm.paths import atomic_write_text, check_utf8, is_temporary, is_url, sha256, sync_folder
from tinylm.recipe import Recipe, load
from tinylm.remote_runs import POINTERS as POINTERS
from tinylm.remote_runs import cached_copy
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.chat_template import CHAT_TEMPLATE_FILE, ChatEncoder, ChatTemplate

if TYPE_CHECKING:  # runs can be found, listed and rejected without importing torch
    import torch

    from tinylm.model.base import Model
    from tinylm.recipe.schema import LoraSection, ModelVariant, ObjectiveVariant

RUNS = Path("runs")
LOCK = ".lock"
"""Lock file. It is locked while a process trains in the folder. It is never removed."""
RUN_FILES = (
    "recipe.yaml",
    "tokenizer.json",
    CHAT_TEMPLATE_FILE,
    "metrics.jsonl",
    "samples.md",
    "environment.json",
    "heldout",
    training_text.FOLDER,
    "checkpoints",
    "reports",
    "tensorboard",
    "wandb",
    LOCK,
)
"""The files and folders in a run folder. Anything else in it belongs to the user."""
VECTORS_FILE, EMBEDDINGS_MARKER = "vectors.safetensors", "neighbours.jsonl"
"""Additional files of embedding runs: the vectors, written at the end of training, and a file that exists from the start."""
MODEL_FILES = ("model.safetensors", "state.json")
"""The checkpoint files that are needed to use the model. The others are needed only to resume training."""
OPTIMIZER_FILES = "training-"
"""Prefix for the names of optimizer state files."""
HAS_HEAD, NORMALIZED = "has_head", "normalized_sentence_vectors"
"""Notes in environment.json about an imported encoder: whether its source had a head, and whether its vectors have length 1."""
_STEP_NAME = re.compile(r"step-[0-9]{1,15}")
_MAX_FOREIGN_NAMES = 4
FORMAT = 3
"""Version of the checkpoint format and of the recipe keys. Runs with other versions are rejected."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder, `checkpoints/step-N`."""

    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step-"))

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def state(self) -> dict[str, Any]:
        """Training progress, scaler state and fingerprints. Raises `InputError` if state.json is damaged or in another format."""
        state = _json(self.path / "state.json")
        _check_format(state, self.path)
        fingerprints = state.get("fingerprints", {"tokenizer": ""})  # embedding runs use another key
        if type(state.get("step")) is not int or not isinstance(fingerprints, dict) or "tokenizer" not in fingerprints:
            raise InputError("state.json has an unexpected structure", where=str(self.path))
        return state

    @property
    def is_permanent(self) -> bool:
        """Whether `checkpoint.keep_every` protects this checkpoint from being removed during training. False if it is damaged."""
        try:
            return self.state.get("permanent") is True
        except InputError:
            return False

    @property
    def has_optimizer_state(self) -> bool:
        """Whether training can be resumed from this checkpoint with the same optimizer."""
        return any(self.path.glob(f"{OPTIMIZER_FILES}*"))

    def problem(self, only: Sequence[str] | None = None) -> str | None:
        """Return why this checkpoint is damaged, or None if every file has the size and SHA-256 that it was saved with.

        `only` limits the check to these files. For example, sampling does not need the optimizer state.
        """
        try:
            if self.path.is_symlink():
                return "it is a symbolic link"
            files = _json(self.path / "manifest.json")["files"]
            for name in only if only is not None else files:
                if name not in files:
                    return f"manifest.json does not list {name}"
                expected = files[name]
                file = self.path / name
                if Path(name).name != name or file.is_symlink():
                    return f"{name} does not belong in a checkpoint"
                if file.stat().st_size != expected["bytes"]:
                    return f"{name} has {file.stat().st_size:,} bytes instead of {expected['bytes']:,}"
                if sha256(file) != expected["sha256"]:
                    return f"{name} has changed since it was saved"
            missing = set(MODEL_FILES) - set(files)
            unlisted = {file.name for file in self.path.iterdir()} - set(files) - {"manifest.json"}
            if missing:
                return f"manifest.json does not list {min(missing)}"
            if unlisted and only is None:
                return f"manifest.json does not list {min(unlisted)}"
        except OSError as error:
            return f"{Path(str(error.filename)).name}: {error.strerror}"
        except (InputError, KeyError, TypeError, ValueError) as error:
            return error.message if isinstance(error, InputError) else "manifest.json has an unexpected structure"
        return None


def check_run_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise `InputError` if a run cannot be written to `folder`. An existing run requires `resume` or `overwrite`."""
    if resume and overwrite:
        raise InputError("these options are mutually exclusive", where="--resume, --overwrite")
    check_utf8(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file, not a folder", where=str(folder), hint="choose another folder with --out")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise InputError("this folder is not writable", where=str(existing), hint="choose another folder with --out")
    if not folder.exists() or all(path.name == LOCK or is_temporary(path.name) for path in folder.iterdir()):
        return
    if not (folder / "recipe.yaml").exists():
        raise InputError(
            "this folder is not empty and not a run folder", where=str(folder), hint="choose another folder with --out"
        )
    if not resume and not overwrite:
        hint = "--resume continues it, --overwrite replaces it"
        raise InputError("this folder already contains a run", where=str(folder), hint=hint)


def run_files(folder: Path) -> tuple[str, ...]:
    """Return `RUN_FILES`, plus the additional files of an embedding run if `folder` is one."""
    return (*RUN_FILES, VECTORS_FILE, EMBEDDINGS_MARKER) if os.path.lexists(folder / EMBEDDINGS_MARKER) else RUN_FILES


def refuse_external_links(folder: Path) -> None:
    """Raise `InputError` if an entry of the run folder is a link to a target outside it, or neither a file nor a folder."""
    inside = os.path.realpath(folder)
    checkpoints, names = folder / "checkpoints", run_files(folder)
    own = [path for path in folder.iterdir() if path.name in names]
    folders = [folder / "heldout", folder / training_text.FOLDER, checkpoints]
    saved = list(checkpoints.iterdir()) if checkpoints.is_dir() and not checkpoints.is_symlink() else []
    folders += [path for path in saved if path.is_dir() and not path.is_symlink()]
    for path in (*own, *saved, *(file for each in folders if not each.is_symlink() for file in each.glob("*"))):
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
            hint = "if you trust it, replace the link with a copy of its target"
            raise InputError("is a link to a target outside the run folder", where=str(path), hint=hint)
        kind = _file_type(path)
        if kind is not None and not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise InputError("is neither a file nor a folder", where=str(path), hint="a run folder contains only files and folders")


def _file_type(path: Path) -> int | None:
    """Return the mode bits of `path`, following links, or None if it does not exist. Raises `InputError` for circular links."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(error.strerror or "cannot be read", where=str(path)) from None


def write_manifest(folder: Path) -> None:
    """Sync a checkpoint's files to disk, then write its manifest, which marks the checkpoint as complete."""
    files = {}
    for file in sorted(folder.iterdir()):
        with open(file, "rb+") as written:
            os.fsync(written.fileno())
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    atomic_write_text(folder / "manifest.json", json.dumps({"files": files}, indent=1) + "\n")
    sync_folder(folder)


def drop_optimizer_state(checkpoint: Checkpoint) -> None:
    """Remove the optimizer state from a complete checkpoint.

    The manifest is replaced before the files are removed. If the process is killed in between, the model can still be used.
    """
    manifest = _json(checkpoint.path / "manifest.json")
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith(OPTIMIZER_FILES)}
    atomic_write_text(checkpoint.path / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    for file in checkpoint.path.glob(f"{OPTIMIZER_FILES}*"):
        file.unlink()


def _json(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():  # reading a named pipe would wait forever
        raise InputError(f"{path.name} is not a file", where=str(path.parent))
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path.name}: {error.strerror}", where=str(path.parent)) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name} is not JSON: {error}", where=str(path.parent)) from None
    if not isinstance(value, dict):
        raise InputError(f"{path.name} is not an object", where=str(path.parent))
    return value


def check_run_format(folder: Path) -> None:
    """Raise `InputError` if the newest readable checkpoint of a run folder has a format other than `FORMAT`.

    Call this before loading the run's recipe.yaml, because another version may have used different recipe keys.
    """
    for checkpoint in reversed(_checkpoints(folder)):
        try:
            state = _json(checkpoint.path / "state.json")
        except InputError:  # damaged; this is reported when the checkpoint is used
            continue
        _check_format(state, folder)
        return


def _check_format(state: dict[str, Any], where: Path) -> None:
    if state.get("format") != FORMAT:
        problem = f"saved in checkpoint format {state.get('format')} by tinylm {state.get('version')}"
        hint = "train the model again from a recipe for this version"
        raise InputError(f"{problem}; this version reads format {FORMAT}", where=str(where), hint=hint)


def _checkpoints(run_folder: Path) -> list[Checkpoint]:
    paths = (run_folder / "checkpoints").glob("step-*")
    return sorted((Checkpoint(path) for path in paths if _STEP_NAME.fullmatch(path.name)), key=lambda checkpoint: checkpoint.step)


@dataclass(frozen=True)
class Run:
    """An opened run folder. Create one with `Run.open` or `Run.find`."""

    path: Path
    pinned: str | None = None
    """The default checkpoint, if the run was opened through the path of a checkpoint folder."""

    @classmethod
    def open(cls, path: str | Path, *, embeddings: bool = False) -> Run:
        """Open a run folder, or the run that a checkpoint folder belongs to. Raises `InputError` if `path` is neither.

        A URL of a copy (`checkpoint.mirror`) is first downloaded to the cache, without the optimizer state. An embedding run is
        accepted only if `embeddings` is true. Runs saved in another checkpoint format are rejected.
        """
        path = cached_copy(str(path), RUN_FILES, (*MODEL_FILES, "manifest.json")) if is_url(str(path)) else Path(path)
        check_utf8(path)
        if path.parent.name == "checkpoints" and (path / "state.json").exists():
            return cls.open(path.parent.parent, embeddings=embeddings)._pinned(path.name)
        if not path.exists():
            inside = RUNS / path
            suggestion = f"did you mean {inside}?" if (inside / "recipe.yaml").exists() else "`tinylm runs` lists the runs in runs/"
            raise InputError("no such run", where=str(path), hint=suggestion)
        if not (path / "recipe.yaml").exists():
            hint = f"`tinylm runs {shlex.quote(str(path))}` lists the runs in this folder" if any(all_runs(path)) else None
            raise InputError("not a run folder: it has no recipe.yaml", where=str(path), hint=hint)
        if not embeddings and (path / EMBEDDINGS_MARKER).exists():
            raise InputError("contains embeddings, not a language model", where=str(path), hint="use `tinylm embed`")
        refuse_external_links(path)
        check_run_format(path)
        run = cls(path)
        if foreign := run.foreign_code:
            listed = ", ".join(foreign[:_MAX_FOREIGN_NAMES]) + (", ..." if len(foreign) > _MAX_FOREIGN_NAMES else "")
            text = f"trained with code outside tinylm ({listed}); without this code, the results will differ"
            warnings.warn(f"{path}: {text}", TinylmWarning, stacklevel=2)
        return run

    def _pinned(self, checkpoint: str) -> Run:
        return Run(self.path, checkpoint)

    @classmethod
    def find(cls) -> Run:
        """Open the run in TINYLM_RUN or, if that is not set, the most recently trained run directly inside runs/.

        Runs of sweeps, ladders and scaling experiments are not considered, because the newest of them is rarely the best one.
        Raises `InputError` if there is no run or `open` rejects it.
        """
        if named := os.environ.get("TINYLM_RUN"):
            return cls.open(named)
        runs = list(all_runs(RUNS))
        if not runs:
            if (nested := next(experiment_runs(RUNS), None)) is not None:
                hint = f"select one with --run; `tinylm runs {shlex.quote(str(nested.path.parent))}` lists them"
                raise InputError(f"there is no default run: the runs are in {nested.path.parent}", hint=hint)
            raise InputError(
                "there are no runs in runs/ yet", hint="train one with `tinylm train quickstart`, or select one with --run"
            )
        return cls.open(max(runs, key=lambda run: run.modified_at).path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def environment(self) -> dict[str, Any]:
        """The contents of environment.json: versions, and notes about an imported model. Empty if the file cannot be read."""
        try:
            return _json(self.path / "environment.json")
        except InputError:
            return {}

    @property
    def has_head(self) -> bool:
        """Whether the model predicts tokens or labels. False only if it was imported from an encoder without a head."""
        return self.environment.get(HAS_HEAD) is not False

    @property
    def foreign_code(self) -> list[str]:
        """Names of classes and functions outside tinylm that the network was trained with, as recorded in environment.json."""
        environment = self.environment
        resumed = environment.get("resumed")
        parts = [environment, *(resumed if isinstance(resumed, list) else ())]
        lists = [part.get("foreign_code") for part in parts if isinstance(part, dict)]
        names = [name for listed in lists if isinstance(listed, list) for name in listed]
        return list(dict.fromkeys(name for name in names if isinstance(name, str) and name.isprintable()))

    @property
    def modified_at(self) -> float:
        """When the run was last trained, in seconds since the epoch."""
        metrics = self.path / "metrics.jsonl"
        return (metrics if metrics.exists() else self.path / "recipe.yaml").stat().st_mtime

    @cached_property
    def recipe(self) -> Recipe:
        return load(self.path / "recipe.yaml", check_files=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path / "tokenizer.json")

    @cached_property
    def chat_encoder(self) -> ChatEncoder | None:
        """Encodes conversations for this model. None if it was not trained on conversations.

        Raises `InputError` if the template is damaged or does not fit the tokenizer.
        """
        file = self.path / CHAT_TEMPLATE_FILE
        if not file.exists():
            return None
        try:
            return ChatEncoder(ChatTemplate.from_json(file.read_text(encoding="utf-8", errors="replace")), self.tokenizer)
        except InputError as error:
            raise InputError(error.message, where=str(file)) from None

    def require_chat(self) -> ChatEncoder:
        """Return `chat_encoder`. Raises `InputError` if the model was not trained on conversations."""
        if self.chat_encoder is None:
            hint = "`tinylm new --chat FILE --from RUN` writes a recipe that fine-tunes it"
            raise InputError("this model was not trained on conversations", where=str(self.path), hint=hint)
        return self.chat_encoder

    def heldout(self, split: str = "heldout") -> Shard:
        """Open the held-out tokens of this run or, with `split="test"`, its test tokens.

        Raises `InputError` if there are none, as in an imported run, or if they are damaged.
        """
        file = self.path / "heldout" / f"{split}.npy"
        hint = "specify a text to evaluate it on"
        if split == "test" and not self.has_test_split:
            raise InputError(
                "this run has no test text", where=str(self.path), hint="set `data.test` in the recipe to hold one out"
            )
        if not file.parent.exists():
            raise InputError("this run has no held-out text", where=str(self.path), hint=hint)
        shard = open_shard(file.parent, split)
        problem = shard.problem(self.tokenizer.vocab_size)
        if problem is not None:
            raise InputError(f"the tokens are damaged: {problem}", where=str(file), hint=hint)
        return shard

    def heldout_sources(self, shard: Shard, split: str = "heldout") -> tuple[Span, ...]:
        """Return which tokens of `heldout(split)` belong to which source of a mixture. Empty if the text is not a mixture.

        Raises `InputError` if the record is damaged.
        """
        return open_spans(self.path / "heldout", split, shard)

    @property
    def has_test_split(self) -> bool:
        return (self.path / "heldout" / "test.npy").exists()

    def training_texts(self) -> list[TrainingText]:
        """Return the texts that the model was trained on, starting with this run's. Raises `InputError` if the record is damaged.

        The n-grams are None for imported runs and for runs of earlier versions.
        """
        folder = self.path / training_text.FOLDER
        if folder.exists():
            return open_training_texts(folder, self.tokenizer)
        sources = self.recipe.data.sources().get("train", ())
        return [TrainingText(tuple(source.removeprefix("imported:") for source in sources), None, self.tokenizer)]

    def checkpoints(self) -> list[Checkpoint]:
        """Return all checkpoints, complete or damaged, sorted by step."""
        return _checkpoints(self.path)

    def checkpoint(self, which: str | None = None) -> Checkpoint:
        """Return a checkpoint: `best`, `last` or a step. Raises `InputError` if it is missing.

        The default is `pinned` or else `best`. Before the first evaluation, there is no best checkpoint. The default is then the
        newest checkpoint, with a warning.
        """
        which = which or self.pinned or self._default_checkpoint()
        if which in POINTERS:
            which = self._resolve_pointer(which)
        digits = which.removeprefix("step-")
        if not _STEP_NAME.fullmatch(f"step-{digits}"):
            hint = hints.value(which, POINTERS)
            raise InputError(f"{which!r} is not best, last or a step", where="--checkpoint", hint=hint)
        for checkpoint in self.checkpoints():
            if checkpoint.step == int(digits):
                return checkpoint
        steps = ", ".join(str(checkpoint.step) for checkpoint in self.checkpoints()) or "none"
        raise InputError(f"no checkpoint for step {int(digits)} in {self.path}", where="--checkpoint", hint=f"saved steps: {steps}")

    def _default_checkpoint(self) -> str:
        saved = self.checkpoints()
        if (self.path / "checkpoints" / "best").exists() or not saved or self._was_evaluated():
            return "best"
        newest = saved[-1].name
        if newest not in self._announced:
            self._announced.add(newest)
            text = f"no best checkpoint yet, because the run has not been evaluated; using the newest, {newest}"
            warnings.warn(f"{self.path}: {text}", TinylmWarning, stacklevel=3)
        return newest

    def _was_evaluated(self) -> bool:
        """Whether the run has, or had, a best checkpoint. Without metrics, this is unknown, and the answer is yes."""
        return not (self.path / "metrics.jsonl").exists() or any(event["kind"] == "eval" for event in self.metrics())

    @cached_property
    def _announced(self) -> set[str]:
        """The default checkpoints that a warning has announced. Commands choose the checkpoint several times but warn once."""
        return set()

    def _resolve_pointer(self, name: str) -> str:
        pointer = self.path / "checkpoints" / name
        if not pointer.exists():
            saved = self.checkpoints()
            hint = f"use the newest with --checkpoint {saved[-1].step}" if saved else "train it at least up to its first checkpoint"
            raise InputError(f"no {name} checkpoint yet", where=str(self.path), hint=hint)
        name_in_file = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if not _STEP_NAME.fullmatch(name_in_file):
            hint = "select a step with --checkpoint"
            raise InputError("does not contain the name of a checkpoint", where=str(pointer), hint=hint)
        return name_in_file

    def model(self, checkpoint: str | None = None, *, device: str = "auto") -> Model:
        """Load the model from a checkpoint: `best`, `last` or a step. The default is the same as for `Run.checkpoint`."""
        from tinylm import device as devices

        return self.network(self.checkpoint(checkpoint), devices.resolve(device))

    def network(self, checkpoint: Checkpoint, device: torch.device) -> Model:
        """Load the network with the checkpoint's weights, in float32 and in eval mode. LoRA matrices are merged into the weights.

        Raises `InputError` if the weights are damaged or the tokenizer is not the one that the run was trained with.
        """
        from tinylm.model import lora, registry

        problem = checkpoint.problem(only=MODEL_FILES)
        if problem is not None:
            raise InputError(f"damaged: {problem}", where=str(checkpoint.path), hint="select another checkpoint with --checkpoint")
        if checkpoint.state["fingerprints"]["tokenizer"] != self.tokenizer.fingerprint:
            raise InputError("is not the tokenizer that this model was trained with", where=str(self.path / "tokenizer.json"))
        check_shapes(self.recipe, self.tokenizer.vocab_size, checkpoint)
        recipe = self.recipe
        network = registry.build(
            recipe.model, self.tokenizer.vocab_size, None, objective=recipe.objective, with_lora=recipe.training.lora
        )
        load_weights(network, checkpoint)
        lora.merge(network)
        return network.to(device).eval()

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the step and eval lines in metrics.jsonl. Truncated and damaged lines are skipped."""
        for event in self._metrics_lines():
            if event is not None and event["kind"] in ("step", "eval"):
                yield event

    def damaged_metrics(self) -> int:
        """Return the number of damaged lines in metrics.jsonl, not counting a last line that was truncated by a crash."""
        lines = list(self._metrics_lines())
        complete = not lines or (self.path / "metrics.jsonl").read_bytes().endswith(b"\n")
        return sum(event is None for event in (lines if complete else lines[:-1]))

    def _metrics_lines(self) -> Iterator[dict[str, Any] | None]:
        """Yield each line in metrics.jsonl, or None for a damaged line. Raises `InputError` if the file cannot be read."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        if not path.is_file():
            raise InputError("is not a file", where=str(path))
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise InputError(error.strerror or "cannot be read", where=str(path)) from None
        for line in lines:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                event = None
            yield event if isinstance(event, dict) and _is_event(event) else None

    def size(self) -> int:
        """Return the size on disk in bytes."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())


_LARGEST = 2**63
"""A log line with a larger integer is considered damaged."""


def _is_event(event: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl has the fields and types of its kind."""
    kind, counts = event.get("kind"), (event.get("step"), event.get("tokens", 0))
    if not isinstance(kind, str) or not all(type(count) is int and 0 <= count < _LARGEST for count in counts):
        return False
    if kind not in ("step", "eval"):
        return True
    if "tokens" not in event or (kind == "step" and "loss" not in event):
        return False
    numbers = [value for key, value in event.items() if key.startswith("val_") or key in ("loss", "lr", "grad_norm", "seconds")]
    by_source = event.get("by_source", {})
    if not isinstance(by_source, dict) or not all(isinstance(part, dict) for part in by_source.values()):
        return False
    numbers += [value for part in by_source.values() for value in part.values()]
    return all(value is None or type(value) is float or (type(value) is int and abs(value) < _LARGEST) for value in numbers)


def check_shapes(recipe: Recipe, vocab_size: int, checkpoint: Checkpoint) -> None:
    """Raise `InputError` if the shapes in the header of model.safetensors do not match the recipe's network.

    Reads only the header and builds the network on the meta device, to avoid allocating tensors before a mismatch is detected.
    """
    from safetensors import SafetensorError, safe_open

    model, file = recipe.model, checkpoint.path / "model.safetensors"
    try:
        with safe_open(file, "pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118  not a mapping
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot be read: {error}", where=str(file)) from None
    mismatch = shape_mismatch(model, vocab_size, shapes, objective=recipe.objective, with_lora=recipe.training.lora)
    if mismatch is not None:
        raise InputError(f"does not match the recipe: {mismatch}", where=str(file))


def shape_mismatch(
    model: ModelVariant,
    vocab_size: int,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    objective: ObjectiveVariant | None = None,
    with_lora: LoraSection | None = None,
) -> str | None:
    """Return how weight shapes differ from those of a network, or None if they match. Does not allocate the network."""
    from tinylm.model import registry

    mismatch = registry.network_class(model).check_size(model, shapes)
    if mismatch is not None:
        return mismatch
    built = registry.build_without_weights(model, vocab_size, objective=objective, with_lora=with_lora)
    shapes = dict(shapes)
    expected = built.stored_shapes(shapes)
    for name in built.tied_weights():
        del expected[name]
        shapes.pop(name, None)
    different = [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]
    if different:
        name = different[0]
        return f"{name} is {shapes.get(name, 'absent')} instead of {expected.get(name, 'absent')}"
    return None


def load_weights(network: Model, checkpoint: Checkpoint) -> None:
    """Load model.safetensors into `network`. Raises `InputError` if the file does not match it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = checkpoint.path / "model.safetensors"
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot be read: {error}", where=str(file)) from None
    try:
        network.load_stored_weights(weights)
    except RuntimeError as error:
        raise InputError(f"does not match the recipe: {error}", where=str(file)) from None


def all_runs(folder: Path) -> Iterator[Run]:
    """Yield the runs directly inside `folder`, except embedding runs."""
    for path in sorted(folder.glob("*/recipe.yaml")):
        if not (path.parent / EMBEDDINGS_MARKER).exists():
            yield Run(path.parent)


def experiment_runs(folder: Path) -> Iterator[Run]:
    """Yield the runs of the sweeps, ladders and scaling experiments inside `folder`. Their folders contain `results/`."""
    for results in sorted(folder.glob("*/results")):
        yield from all_runs(results.parent)
