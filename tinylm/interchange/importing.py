"""`tinylm import`: convert a Hugging Face folder, a nanoGPT checkpoint or an ARPA file to a run with one checkpoint at step 0.

If transformers can load the source, the import succeeds only if the logits match.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tinylm
from tinylm.data.pairs import SOURCE_TOKENIZER
from tinylm.errors import InputError
from tinylm.evaluation.metrics import LANGUAGE_MODEL
from tinylm.file_kinds import identify
from tinylm.interchange import arpa, encoder_folders, hub, huggingface, marian, nanogpt, verify
from tinylm.model import registry
from tinylm.model.base import BODY, Model
from tinylm.paths import atomic_folder, atomic_write_text
from tinylm.recipe.fixed_context import NgramSection
from tinylm.recipe.labels import ClassificationObjective, LabelsSection
from tinylm.recipe.pairs import PairSources, PairsSection, TranslationObjective
from tinylm.recipe.schema import (
    CausalLMObjective,
    DataSection,
    DataVariant,
    DecoderSection,
    FileTokenizer,
    ObjectiveVariant,
    Recipe,
    TrainingSection,
)
from tinylm.recipe.values import run_name
from tinylm.reporting import SILENT, Reporter
from tinylm.run import HAS_HEAD, NORMALIZED, check_run_folder, shape_mismatch
from tinylm.tokenizer import Tokenizer
from tinylm.training.checkpoint import CheckpointWriter, Snapshot
from tinylm.training.progress import Progress


@dataclass(frozen=True)
class ImportResult:
    """What was imported. The field names are the keys of `tinylm import --json`.

    `largest_difference` is the largest absolute difference between logits on real text, or between hidden states if the model has
    no head. It is None if there was no reference.
    """

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
) -> ImportResult:
    """Import a model and create the run folder `folder` for it.

    `source` is a Hugging Face model folder, a nanoGPT ckpt.pt, an ARPA file, or `hf:OWNER/NAME` to download a model from
    the Hugging Face Hub. `tokenizer` is a tokenizer.json to use instead of the source's own. `context` reduces the context length
    to this many tokens. `trust_pickle` allows reading pickle files, but only tensors and plain values. Raises `InputError` if the
    source is missing, damaged or unsupported. Raises `WorkError` if the logits differ from those of transformers.
    """
    name, folder = str(source), Path(folder)
    check_destination(folder, overwrite)
    if arpa.is_arpa(Path(source)):
        return _import_arpa(Path(source), folder, tokenizer, context)
    is_remote = name.startswith(hub.PREFIX)
    source = hub.download(name, trust_pickle=trust_pickle) if is_remote else Path(source)
    if marian.is_marian(source):
        if context is not None:
            raise InputError("has no effect on Marian models", where="--context")
        tokenizer_file = None if tokenizer is None else Path(tokenizer)
        model_name = name if is_remote else str(source.absolute())
        return _import_translator(source, folder, model_name, tokenizer_file, trust_pickle, reporter)
    if encoder_folders.is_encoder(source):
        options = _EncoderOptions(None if tokenizer is None else Path(tokenizer), context, trust_pickle)
        return _import_encoder(source, folder, name if is_remote else str(source.absolute()), options, reporter)
    model, state, source_tokenizer = _read(source, None if tokenizer is None else Path(tokenizer), trust_pickle)
    model, state = _shorten_context(model, state, context)
    network, run_tokenizer = _build_network(model, state, source_tokenizer, str(source), reporter)
    difference, tokens, reference = _compare_with_transformers(source, network, run_tokenizer, reporter)
    with atomic_folder(folder) as temporary:
        _write(temporary, folder, name if is_remote else str(source.absolute()), network, run_tokenizer)
    return ImportResult(
        run=str(folder),
        source=name,
        preset=model.preset,
        parameters=network.parameter_count(),
        context_length=model.context_length,
        vocab_size=network.vocab_size,
        largest_difference=difference,
        tokens_compared=tokens,
        verified_with=reference,
    )


@dataclass(frozen=True)
class _EncoderOptions:
    tokenizer: Path | None
    context: int | None
    trust_pickle: bool


def _import_encoder(source: Path, folder: Path, name: str, options: _EncoderOptions, reporter: Reporter) -> ImportResult:
    """Import BERT, DistilBERT, RoBERTa or ModernBERT: a masked model, a classifier, or an encoder without a head."""
    imported, tokenizer = encoder_folders.read(source, options.tokenizer, trust_pickle=options.trust_pickle)
    model, state, prefix = imported.model, imported.state, BODY if isinstance(imported.objective, ClassificationObjective) else ""
    sentences = encoder_folders.sentence_settings(source)
    if options.context is not None:
        check_context(model.context_length, options.context)
    context = options.context or min(sentences.max_tokens or model.context_length, model.context_length)
    if context < model.context_length:
        model = model.model_copy(update={"context_length": context})
        if f"{prefix}positions.weight" in state:
            state = {**state, f"{prefix}positions.weight": state[f"{prefix}positions.weight"][:context]}
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    mismatch = shape_mismatch(model, tokenizer.vocab_size, shapes, objective=imported.objective)
    if mismatch is not None:
        raise InputError(f"the tensors do not match config.json: {mismatch}", where=str(source))
    network = registry.build(model, tokenizer.vocab_size, None, objective=imported.objective)
    network.load_stored_weights({key: tensor.float() for key, tensor in state.items()})
    network.eval()
    if not imported.has_head:
        reporter.warn(
            "the source has no head, so only its hidden states and sentence vectors are meaningful; it cannot predict masked tokens"
        )
    compared = encoder_folders.compare_with_transformers(source, network, tokenizer)
    difference, tokens, reference = (None, 0, None) if isinstance(compared, str) else compared
    if isinstance(compared, str):
        reporter.warn(f"the imported model was not compared with the original, because {compared}")
    elif difference is not None:
        verify.check_logits(difference, "the imported model")
    if options.tokenizer is None:
        probe = encoder_folders.differently_tokenized_text(source, tokenizer)
        if probe is not None:
            reporter.warn(f"the imported tokenizer and transformers tokenize {probe[:60]!r} differently")
    with atomic_folder(folder) as temporary:
        notes = {HAS_HEAD: imported.has_head, NORMALIZED: sentences.normalize}
        _write(temporary, folder, name, network, tokenizer, imported.objective, notes)
    return ImportResult(
        run=str(folder),
        source=name,
        preset=model.preset,
        parameters=network.parameter_count(),
        context_length=model.context_length,
        vocab_size=network.vocab_size,
        largest_difference=difference,
        tokens_compared=tokens,
        verified_with=reference,
    )


def _import_translator(
    source: Path, folder: Path, name: str, tokenizer_file: Path | None, trust_pickle: bool, reporter: Reporter
) -> ImportResult:
    """Import a Marian model."""
    content = marian.read(source, tokenizer_file, trust_pickle=trust_pickle)
    model, state, tokenizer = content.model, content.state, content.tokenizer
    mismatch = shape_mismatch(model, tokenizer.vocab_size, {key: tuple(tensor.shape) for key, tensor in state.items()})
    if mismatch is not None:
        raise InputError(f"the tensors do not match config.json: {mismatch}", where=str(source))
    network = registry.build(model, tokenizer.vocab_size, None)
    network.load_stored_weights({key: tensor.float() for key, tensor in state.items()})
    compared = marian.compare_with_transformers(source, network.eval(), content)
    difference, tokens, reference = (None, 0, None) if isinstance(compared, str) else compared
    if isinstance(compared, str):
        reporter.warn(f"the imported model was not compared with the original, because {compared}")
    elif difference is not None:
        verify.check_logits(difference, "the imported model")
    with atomic_folder(folder) as temporary:
        _write(temporary, folder, name, network, tokenizer, TranslationObjective())
        if content.source_tokenizer is not tokenizer:
            content.source_tokenizer.save(temporary / SOURCE_TOKENIZER)
    return ImportResult(
        run=str(folder),
        source=name,
        preset=model.preset,
        parameters=network.parameter_count(),
        context_length=model.context_length,
        vocab_size=network.vocab_size,
        largest_difference=difference,
        tokens_compared=tokens,
        verified_with=reference,
    )


def _import_arpa(source: Path, folder: Path, tokenizer: str | Path | None, context: int | None) -> ImportResult:
    """Import an n-gram model. Without a tokenizer, the words in the file become the tokens."""
    if context is not None:
        raise InputError("has no effect on n-gram models", where="--context")
    if tokenizer is None:
        tables, words = arpa.read(source)
        run_tokenizer = arpa.word_tokenizer(words)
    else:
        run_tokenizer = Tokenizer.load(Path(tokenizer))
        tables, _ = arpa.read(source, {word: id for id, word in enumerate(arpa.words_of(run_tokenizer))})
    network = registry.build(NgramSection(order=tables.order), tables.vocab_size, None)
    arpa.load_tables(network, tables)
    with atomic_folder(folder) as temporary:
        _write(temporary, folder, str(source.absolute()), network, run_tokenizer)
    return ImportResult(
        run=str(folder),
        source=str(source),
        preset=f"{tables.order}-gram",
        parameters=network.parameter_count(),
        context_length=network.model.context_length,
        vocab_size=network.vocab_size,
        largest_difference=None,
        tokens_compared=0,
        verified_with=None,
    )


def check_destination(folder: Path, overwrite: bool) -> None:
    """Raise `InputError` unless a run can be created in `folder`."""
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise InputError("the folder is not empty", where=str(folder), hint="--overwrite replaces an existing run")
    check_run_folder(folder, False, overwrite)


def _read(source: Path, tokenizer: Path | None, trust_pickle: bool) -> tuple[DecoderSection, dict[str, Tensor], Tokenizer]:
    if not source.exists():
        raise InputError(
            "no such file or folder", where=str(source), hint="expected a Hugging Face model folder or a nanoGPT ckpt.pt"
        )
    kind = identify(source)
    if kind is not None and source.suffix not in (".pt", ".pth"):  # nanoGPT checkpoints can be pickles
        raise InputError(f"this is {kind.name}", where=str(source), hint=kind.hint)
    if source.is_dir():
        return huggingface.read(source, tokenizer, trust_pickle=trust_pickle)
    if source.suffix == ".safetensors":
        raise InputError(
            "a weights file alone does not contain the model configuration",
            where=str(source),
            hint="import the folder that contains it and config.json",
        )
    model, state = nanogpt.read(source, trust_pickle=trust_pickle)
    if tokenizer is None:
        raise InputError(
            "the checkpoint does not include a tokenizer",
            where=str(source),
            hint="pass a tokenizer.json with --tokenizer, such as one created with `tinylm tokenize train TEXT --kind char`",
        )
    return model, state, Tokenizer.load(tokenizer)


def check_context(context_length: int, context: int) -> None:
    """Raise `InputError` unless a model with this context length can be shortened to `context`."""
    if not 1 <= context <= context_length:
        raise InputError(f"must be between 1 and the model's context length ({context_length:,})", where="--context")


def _shorten_context(
    model: DecoderSection, state: dict[str, Tensor], context: int | None
) -> tuple[DecoderSection, dict[str, Tensor]]:
    if context is None:
        return model, state
    check_context(model.context_length, context)
    if "positions.weight" in state:
        state = {**state, "positions.weight": state["positions.weight"][:context]}
    return model.model_copy(update={"context_length": context}), state


def _build_network(
    model: DecoderSection, state: dict[str, Tensor], tokenizer: Tokenizer, where: str, reporter: Reporter
) -> tuple[Model, Tokenizer]:
    """Return the network and a tokenizer with exactly one id per embedding row.

    Special tokens without an embedding row get the mean of all rows. Rows without a token get a placeholder token. Raises
    `InputError` if the tensor shapes do not match `model`.
    """
    rows = state["embedding.weight"].shape[0]
    if tokenizer.end_of_text is None and rows == tokenizer.vocab_size:
        tokenizer = huggingface.pad_vocabulary(tokenizer, rows + 1, where)
    missing = tokenizer.vocab_size - rows
    if 0 < missing <= 2:  # the end-of-text token and the unknown token
        names = ", ".join(str(tokenizer.backend.id_to_token(id)) for id in range(rows, tokenizer.vocab_size))
        reporter.warn(f"the model has no embedding for {names}, which the tokenizer defines; using the mean embedding")
        state = {
            **state,
            **{name: _append_mean_rows(state[name], missing) for name in ("embedding.weight", "head.weight") if name in state},
        }
        rows += missing
    if rows > tokenizer.vocab_size:
        reporter.note(
            f"{rows - tokenizer.vocab_size:,} of {rows:,} embedding rows have no token; kept them and added placeholder tokens"
        )
    tokenizer = huggingface.pad_vocabulary(tokenizer, rows, where)
    mismatch = shape_mismatch(model, rows, {name: tuple(tensor.shape) for name, tensor in state.items()})
    if mismatch is not None:
        raise InputError(f"the tensors do not match config.json: {mismatch}", where=where)
    network = registry.build(model, rows, None)
    try:
        network.load_stored_weights({name: tensor.float() for name, tensor in state.items()})
    except RuntimeError as error:
        raise InputError(f"the tensors do not match config.json: {' '.join(str(error).split())}", where=where) from None
    return network.eval(), tokenizer


def _append_mean_rows(matrix: Tensor, count: int) -> Tensor:
    return torch.cat((matrix, matrix.mean(dim=0, keepdim=True).expand(count, -1)))


def _compare_with_transformers(
    source: Path, network: Model, tokenizer: Tokenizer, reporter: Reporter
) -> tuple[float | None, int, str | None]:
    """Return the largest difference between logits, the number of compared tokens, and the name and version of the reference.

    If transformers cannot load the source, warn and return (None, 0, None).
    """
    reference = _load_reference(source)
    if isinstance(reference, str):
        reporter.warn(f"the imported model was not compared with the original, because {reference}")
        return None, 0, None
    logits, name = reference
    ids = [tokenizer.end_of_text or 0, *tokenizer.encode(verify.english_text())]
    rows = verify.windows(ids, network.model.context_length)
    difference = verify.largest_difference(network, logits, rows)
    verify.check_logits(difference, "the imported model")
    return difference, rows.numel(), name


def _load_reference(source: Path) -> tuple[Callable[[Tensor], Tensor], str] | str:
    """Load the source with transformers. Returns its logits function and the transformers version, or an error message.

    Code from the folder is never executed. A folder with tinylm's own class is loaded with the installed `modeling_tinylm.py`.
    """
    if not source.is_dir() or not list(source.glob("*.safetensors")):
        return "transformers cannot read this format"
    try:
        import transformers
    except ImportError:
        return 'transformers is not installed (pip install "tinylm[hf]")'
    with huggingface.quiet(transformers):
        try:
            other = huggingface.load_model(source, Path(huggingface.__file__).with_name(huggingface.MODELING_FILE))
        except Exception as error:  # the import also works without a reference; the caller reports the reason as a warning
            return f"transformers cannot load it: {' '.join(str(error).split())[:200]}"
    return (lambda ids: other(ids).logits), f"transformers {transformers.__version__}"


def _write(
    temporary: Path,
    folder: Path,
    source: str,
    network: Model,
    tokenizer: Tokenizer,
    objective: ObjectiveVariant | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write the run. `notes` are added to environment.json."""
    sources: Any = (f"imported:{source}",)
    data: DataVariant = DataSection(train=sources)
    if isinstance(objective, ClassificationObjective):
        data = LabelsSection(train=sources)
    elif isinstance(objective, TranslationObjective):
        data = PairsSection(train=PairSources(sources=sources))
    recipe = Recipe(
        name=run_name(folder.name, "imported"),
        data=data,
        tokenizer=FileTokenizer(kind="file", path=str(folder / "tokenizer.json")),
        model=network.model,
        objective=objective or CausalLMObjective(),
        training=TrainingSection(epochs=1) if network.model.learns_by_counting else TrainingSection(steps=1),
    )
    header = "# Imported weights: `data` and `training` are placeholders. To fine-tune, set model.init_from in another recipe.\n"
    atomic_write_text(temporary / "recipe.yaml", header + recipe.to_yaml())
    tokenizer.save(temporary / "tokenizer.json")
    environment = {"tinylm": tinylm.__version__, "torch": torch.__version__, "imported": source, **(notes or {})}
    atomic_write_text(
        temporary / "environment.json",
        json.dumps({**environment, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, indent=1) + "\n",
    )
    fingerprints = {"data": "imported", "tokenizer": Tokenizer.load(temporary / "tokenizer.json").fingerprint}
    save_untrained(temporary, network, fingerprints)


def save_untrained(folder: Path, network: Model, fingerprints: dict[str, str]) -> None:
    """Save the weights as a run's only checkpoint, at step 0 and without optimizer state. It is marked as both best and last."""
    writer = CheckpointWriter(folder, keep=1)
    writer.prepare()
    progress = Progress().as_state(LANGUAGE_MODEL)
    writer.start_save(Snapshot(network.stored_weights(), {}, {**progress, "scaler": {}, "fingerprints": fingerprints}))
    saved = writer.wait()
    assert saved is not None
    writer.set_pointer("best", saved.name)
