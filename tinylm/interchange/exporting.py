"""`tinylm export`: a run's model as a Hugging Face folder, a GGUF file or an ONNX file, whole and proven or not there at all."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tinylm.errors import InputError
from tinylm.interchange import card, gguf, huggingface, onnx, verify
from tinylm.paths import whole_file, whole_folder
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Checkpoint, Run

Format = Literal["hf", "gguf", "onnx"]


@dataclass(frozen=True)
class Exported:
    """The names are the keys of `tinylm export --json`; `largest_difference` is that of logits, on real text.

    Of a GGUF file: from the run's weights rounded to its type, whose cost is `perplexity` over `run_perplexity`.
    """

    run: str
    checkpoint: str
    step: int
    to: str
    path: str
    bytes: int
    architecture: str
    own_code_because: tuple[str, ...]
    largest_difference: float
    tokens_compared: int
    verified_with: tuple[str, ...]
    type: str = "f32"
    perplexity: float | None = None
    run_perplexity: float | None = None
    same_greedy: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def export(
    run: Run,
    to: Format,
    path: str | Path,
    *,
    checkpoint: str | None = None,
    type: str = "f32",
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> Exported:
    """Write the model of a checkpoint to `path`, load it with other people's programs, and keep it only when it is the same.

    `type`: how a GGUF file stores matrices. What is at `path` is replaced with `overwrite` only.
    Raises `InputError` for what cannot be written there or in that format, `WorkError` when the proof fails.
    """
    path = Path(path)
    _check_place(path, to, overwrite)
    chosen = run.checkpoint(checkpoint)
    if to == "gguf":
        gguf.check(run.recipe.model, run.tokenizer)  # before anything is loaded
    if to == "onnx":
        onnx.require()
    if to == "hf":
        verify.require("transformers", "hf", "checking a Hugging Face folder")
    writer = {"hf": _to_folder, "gguf": _to_gguf, "onnx": _to_onnx}[to]
    return writer(run, chosen, path, type, reporter)


def _check_place(path: Path, to: Format, overwrite: bool) -> None:
    if to == "hf":
        if path.exists() and not path.is_dir():
            raise InputError("is a file, not a folder", where=str(path))
        if path.exists() and any(path.iterdir()):
            if not overwrite:
                raise InputError("is not empty", where=str(path), hint="--overwrite replaces an export that is there")
            if not (path / "config.json").exists():
                raise InputError("is no exported folder: it has no config.json", where=str(path), hint="choose another")
    elif path.is_dir():
        raise InputError("is a folder, not a file", where=str(path), hint=f"name a file, like {path / 'model'}.{to}")
    elif path.exists() and not overwrite:
        raise InputError("is there already", where=str(path), hint="--overwrite replaces it")


def _common(run: Run, checkpoint: Checkpoint, to: Format, path: Path) -> dict[str, Any]:
    return {"run": str(run.path), "checkpoint": checkpoint.name, "step": checkpoint.step, "to": to, "path": str(path)}


def _to_folder(run: Run, checkpoint: Checkpoint, path: Path, type: str, reporter: Reporter) -> Exported:
    network = run.network(checkpoint, torch.device("cpu"))
    class_name, lacking = huggingface.class_of(network.model)
    if lacking:
        reporter.note(f"no class of transformers has {', '.join(lacking)}: the folder carries {huggingface.MODELING}")
    with whole_folder(path) as temporary:
        written = card.model_card(run, checkpoint, network.parameter_count(), class_name, lacking)
        huggingface.write(temporary, network, run.tokenizer, written)
        difference, tokens = huggingface.check_export(temporary, network, run.tokenizer, verify.text_of(run))
        size = sum(file.stat().st_size for file in temporary.iterdir())
    import transformers

    return Exported(
        **_common(run, checkpoint, "hf", path),
        bytes=size,
        architecture=class_name,
        own_code_because=lacking,
        largest_difference=difference,
        tokens_compared=tokens,
        verified_with=(f"transformers {transformers.__version__}",),
    )


def _to_gguf(run: Run, checkpoint: Checkpoint, path: Path, type: str, reporter: Reporter) -> Exported:
    network = run.network(checkpoint, torch.device("cpu"))
    architecture, _ = gguf.check(network.model, run.tokenizer)
    with whole_file(path) as temporary:
        gguf.write(temporary, network, run.tokenizer, type, run.recipe.name)
        verified = gguf.check_export(temporary, network, run.tokenizer, verify.text_of(run), type, reporter)
        size = temporary.stat().st_size
    return Exported(
        **_common(run, checkpoint, "gguf", path),
        bytes=size,
        architecture=architecture,
        own_code_because=(),
        largest_difference=verified.largest_difference,
        tokens_compared=verified.tokens,
        verified_with=verified.by,
        type=type,
        perplexity=verified.perplexity,
        run_perplexity=verified.run_perplexity,
        same_greedy=verified.same_greedy,
    )


def _to_onnx(run: Run, checkpoint: Checkpoint, path: Path, type: str, reporter: Reporter) -> Exported:
    import onnxruntime

    network = run.network(checkpoint, torch.device("cpu"))
    with whole_file(path) as temporary:
        onnx.write(temporary, network, run.recipe.name)
        difference, tokens = onnx.check_export(temporary, network, run.tokenizer, verify.text_of(run))
        size = temporary.stat().st_size
    return Exported(
        **_common(run, checkpoint, "onnx", path),
        bytes=size,
        architecture="ONNX graph",
        own_code_because=(),
        largest_difference=difference,
        tokens_compared=tokens,
        verified_with=(f"onnxruntime {onnxruntime.__version__}",),
    )
