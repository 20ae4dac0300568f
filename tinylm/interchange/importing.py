"""`tinylm import`: other people's weights as an ordinary run folder, proven to be the same model where that can be asked."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tinylm
from tinylm.errors import InputError
from tinylm.interchange import huggingface, nanogpt, verify
from tinylm.model.transformer import Transformer
from tinylm.paths import whole_folder, write_whole
from tinylm.recipe.schema import DataSection, FileTokenizer, ModelSection, Recipe, TrainingSection
from tinylm.reporting import SILENT, Reporter
from tinylm.run import claim
from tinylm.tokenizer import Tokenizer
from tinylm.training.checkpoint import CheckpointWriter, Snapshot
from tinylm.training.parallel import named_weights
from tinylm.training.trainer import Progress


@dataclass(frozen=True)
class Imported:
    """The names are the keys of `tinylm import --json`. `largest_difference`: of logits, None where it could not be measured."""

    run: str
    source: str
    preset: str
    parameters: int
    context_length: int
    vocab_size: int
    largest_difference: float | None
    tokens_compared: int
    verified_with: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def import_model(
    source: str | Path,
    folder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    context: int | None = None,
    trust_pickle: bool = False,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> Imported:
    """Make the run `folder` of a Hugging Face folder or a nanoGPT checkpoint, with one checkpoint at step 0.

    `tokenizer`: a tokenizer.json instead of the one beside the weights. `context`: fewer positions than the model has. Where
    transformers is installed, the logits of the new run are compared with what it makes of the source.
    Raises `InputError` for what is not there, damaged, or not a model that is computed here; `WorkError` when the logits differ.
    """
    source, folder = Path(source), Path(folder)
    check_place(folder, overwrite)
    model, state, found = _read(source, None if tokenizer is None else Path(tokenizer), trust_pickle)
    model, state = _shortened(model, state, context)
    network, found = _filled(model, state, found, str(source), reporter)
    difference, tokens, by = _verified(source, network, found, reporter)
    with whole_folder(folder) as temporary:
        _write(temporary, folder, source, network, found)
    return Imported(
        run=str(folder),
        source=str(source),
        preset=model.preset,
        parameters=network.parameter_count(),
        context_length=model.context_length,
        vocab_size=network.vocab_size,
        largest_difference=difference,
        tokens_compared=tokens,
        verified_with=by,
    )


def check_place(folder: Path, overwrite: bool) -> None:
    """Raises `InputError` unless a run may be made there."""
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise InputError("is not empty", where=str(folder), hint="--overwrite replaces a run that is there")
    claim(folder, False, overwrite)


def _read(source: Path, tokenizer: Path | None, trust_pickle: bool) -> tuple[ModelSection, dict[str, Tensor], Tokenizer]:
    if not source.exists():
        raise InputError("no such file or folder", where=str(source), hint="a Hugging Face folder, or nanoGPT's ckpt.pt")
    if source.is_dir():
        return huggingface.read(source, tokenizer, trust_pickle=trust_pickle)
    if source.suffix == ".safetensors":
        raise InputError("weights alone name no model", where=str(source), hint="name the folder with its config.json")
    model, state = nanogpt.read(source, trust_pickle=trust_pickle)
    if tokenizer is None:
        raise InputError(
            "has no tokenizer beside it",
            where=str(source),
            hint="name a tokenizer.json with --tokenizer, such as `tinylm tokenize train TEXT --kind char` makes",
        )
    return model, state, huggingface.read_tokenizer(tokenizer)


def _shortened(model: ModelSection, state: dict[str, Tensor], context: int | None) -> tuple[ModelSection, dict[str, Tensor]]:
    if context is None:
        return model, state
    if not 1 <= context <= model.context_length:
        raise InputError(f"{context} positions are not in the model's {model.context_length:,}", where="--context")
    if "positions.weight" in state:
        state = {**state, "positions.weight": state["positions.weight"][:context]}
    return model.model_copy(update={"context_length": context}), state


def _filled(
    model: ModelSection, state: dict[str, Tensor], tokenizer: Tokenizer, where: str, reporter: Reporter
) -> tuple[Transformer, Tokenizer]:
    """The network, and a tokenizer with an id for each of its rows. Raises `InputError` for tensors of another shape."""
    rows = state["embedding.weight"].shape[0]
    if tokenizer.end_of_text is None and rows == tokenizer.vocab_size:
        tokenizer = huggingface.padded(tokenizer, rows + 1, where)
    lacking = tokenizer.vocab_size - rows
    if 0 < lacking <= 2:  # an end of text, and what stands for unknown characters
        names = ", ".join(str(tokenizer.backend.id_to_token(id)) for id in range(rows, tokenizer.vocab_size))
        reporter.warn(f"the model never saw {names}, which the tokenizer has: given the mean of its rows")
        state = {
            **state,
            **{name: _with_mean_rows(state[name], lacking) for name in ("embedding.weight", "head.weight") if name in state},
        }
        rows += lacking
    if rows > tokenizer.vocab_size:
        reporter.note(
            f"{rows - tokenizer.vocab_size:,} of {rows:,} rows of the embedding have no token: kept, under names of their own"
        )
    tokenizer = huggingface.padded(tokenizer, rows, where)
    network = Transformer(model, rows, seed=None)
    if model.tie_embeddings:
        state = {**state, "head.weight": state["embedding.weight"]}
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except RuntimeError as error:
        raise InputError(f"the tensors do not fit config.json: {' '.join(str(error).split())}", where=where) from None
    return network.eval(), tokenizer


def _with_mean_rows(matrix: Tensor, count: int) -> Tensor:
    return torch.cat((matrix, matrix.mean(dim=0, keepdim=True).expand(count, -1)))


def _verified(source: Path, network: Transformer, tokenizer: Tokenizer, reporter: Reporter) -> tuple[float | None, int, str | None]:
    theirs = _as_transformers(source)
    if isinstance(theirs, str):
        reporter.warn(f"not compared with the original: {theirs}")
        return None, 0, None
    logits, by = theirs
    ids = [tokenizer.end_of_text or 0, *tokenizer.encode(verify.some_english())]
    rows = verify.windows(ids, network.model.context_length)
    difference = verify.largest_difference(network, logits, rows)
    verify.check_same(difference, "the import")
    return difference, rows.numel(), by


def _as_transformers(source: Path) -> tuple[Callable[[Tensor], Tensor], str] | str:
    """The source's logits as transformers computes them, or why not. No code of the folder is run: there is a copy here."""
    if not source.is_dir() or not list(source.glob("*.safetensors")):
        return "no other program reads such a file"
    try:
        import transformers
    except ImportError:
        return 'transformers is not installed (pip install "tinylm[hf]")'
    with huggingface.quiet(transformers):
        try:
            other = huggingface.load_model(source, Path(huggingface.__file__).with_name(huggingface.MODELING))
        except Exception as error:  # what it says of somebody's folder is told, and the import stands on its own
            return f"transformers cannot load it: {' '.join(str(error).split())[:200]}"
    return (lambda ids: other(ids).logits), f"transformers {transformers.__version__}"


def _write(temporary: Path, folder: Path, source: Path, network: Transformer, tokenizer: Tokenizer) -> None:
    recipe = Recipe(
        name=re.sub(r"[^\w.-]+", "-", folder.name) or "imported",
        data=DataSection(train=(f"imported:{source.absolute()}",)),
        tokenizer=FileTokenizer(kind="file", path=str(folder / "tokenizer.json")),
        model=network.model,
        training=TrainingSection(steps=1),
    )
    told = "# Imported weights: data and training only fill the form. A recipe with model.init_from trains them on.\n"
    write_whole(temporary / "recipe.yaml", told + recipe.to_yaml())
    tokenizer.save(temporary / "tokenizer.json")
    note = {"tinylm": tinylm.__version__, "torch": torch.__version__, "imported": str(source.absolute())}
    write_whole(
        temporary / "environment.json", json.dumps({**note, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, indent=1) + "\n"
    )
    fingerprints = {"data": "imported", "tokenizer": Tokenizer.load(temporary / "tokenizer.json").fingerprint}
    save_untrained(temporary, network, fingerprints)


def save_untrained(folder: Path, network: Transformer, fingerprints: dict[str, str]) -> None:
    """Make a run folder's only checkpoint: these weights at step 0, best and last, with no optimizer state to go on from."""
    writer = CheckpointWriter(folder, keep=1)
    writer.prepare()
    writer.begin(Snapshot(named_weights(network), {}, {**asdict(Progress()), "scaler": {}, "fingerprints": fingerprints}))
    saved = writer.finish()
    assert saved is not None
    writer.point("best", saved.name)
