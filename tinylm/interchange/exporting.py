"""`tinylm export`: write a run's model as a Hugging Face folder or a GGUF, ONNX or ARPA file, and verify the result.

An export is written atomically: if verification fails, the destination does not change.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from tinylm.errors import InputError
from tinylm.evaluation.classify_texts import heldout_texts
from tinylm.interchange import arpa, card, chat_files, encoder_folders, encoders, gguf, huggingface, marian, onnx, verify
from tinylm.interchange.encoder_folders import SentenceSettings
from tinylm.interchange.generation_check import Snippet
from tinylm.model.base import Model
from tinylm.model.encoder_decoder import EncoderDecoder
from tinylm.paths import atomic_file, atomic_folder
from tinylm.recipe.encoder import EncoderSection
from tinylm.recipe.encoder_decoder import EncoderDecoderSection
from tinylm.recipe.labels import ClassificationObjective
from tinylm.reporting import SILENT, Reporter
from tinylm.run import NORMALIZED, Checkpoint, Run
from tinylm.tokenizer import Tokenizer
from tinylm.translation.translator import Translator, source_tokenizer_of

Format = Literal["hf", "gguf", "onnx", "arpa"]


@dataclass(frozen=True)
class ExportResult:
    """What was exported and how it was verified. The field names are the keys of `tinylm export --json`.

    `largest_difference` is the largest absolute difference between logits on real text, or between hidden states if the model has
    no head. The reference is the run's model with its weights rounded to the export's type. `perplexity` and `run_perplexity` show
    the effect of rounding. `custom_code_reasons` lists the model parts that no transformers class supports. `same_greedy` is the
    number of greedily decoded tokens before the first one that differs in llama.cpp.
    """

    run: str
    checkpoint: str
    step: int
    to: str
    path: str
    bytes: int
    architecture: str
    custom_code_reasons: tuple[str, ...]
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
) -> ExportResult:
    """Write a checkpoint's model to `path`, load it with third-party libraries, and keep the export only if the outputs match.

    `type` is the storage type of the weights in a Hugging Face folder or of the matrices in a GGUF file. An existing export at
    `path` is replaced only if `overwrite` is set. Raises `InputError` if the format does not support the model or `path` cannot be
    written. Raises `WorkError` if verification fails.
    """
    path = Path(path)
    _check_destination(path, to, overwrite)
    chosen = run.checkpoint(checkpoint)
    if to == "gguf":
        _reject_classifier(run, to)
        gguf.check_supported(run.recipe.model, run.tokenizer)  # fail before loading the weights
    if to == "onnx":
        onnx.check_possible(run.recipe.model)
    if to == "hf":
        verify.require("transformers", "hf", "checking a Hugging Face folder")
        if isinstance(run.recipe.model, EncoderDecoderSection):
            marian.check_exportable(run.recipe.model, source_tokenizer_of(run) is not run.tokenizer)
        elif isinstance(run.recipe.model, EncoderSection):
            encoders.check_exportable(run.recipe.model, run.recipe.objective, run.has_head)
        else:
            _reject_classifier(run, to)
            huggingface.select_class(run.recipe.model)
    if to == "arpa":
        arpa.check_supported(run.recipe.model)
    writer = {"hf": _export_huggingface, "gguf": _export_gguf, "onnx": _export_onnx, "arpa": _export_arpa}[to]
    return writer(run, chosen, path, type, reporter)


def _reject_classifier(run: Run, to: Format) -> None:
    if isinstance(run.recipe.objective, ClassificationObjective):
        architecture = run.recipe.model.architecture
        hint = "--to onnx exports classifiers that are based on an encoder or a decoder"
        raise InputError(f"a classifier with the {architecture} architecture cannot be exported", where=f"--to {to}", hint=hint)


def _check_destination(path: Path, to: Format, overwrite: bool) -> None:
    if to == "hf":
        if path.exists() and not path.is_dir():
            raise InputError("exists and is a file, but this format needs a folder", where=str(path))
        if path.exists() and any(path.iterdir()):
            if not overwrite:
                raise InputError("the folder is not empty", where=str(path), hint="--overwrite replaces an existing export")
            if not (path / "config.json").exists():
                raise InputError("not an exported folder: it has no config.json", where=str(path), hint="choose another folder")
    elif path.is_dir():
        raise InputError(
            "exists and is a folder, but this format needs a file", where=str(path), hint=f"for example {path / 'model'}.{to}"
        )
    elif path.exists() and not overwrite:
        raise InputError("the file already exists", where=str(path), hint="--overwrite replaces it")


def _common_fields(run: Run, checkpoint: Checkpoint, to: Format, path: Path) -> dict[str, Any]:
    return {"run": str(run.path), "checkpoint": checkpoint.name, "step": checkpoint.step, "to": to, "path": str(path)}


def _folder_size(folder: Path) -> int:
    """Return the size in bytes of all files in a folder and its subfolders."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _export_huggingface(run: Run, checkpoint: Checkpoint, path: Path, type: str, reporter: Reporter) -> ExportResult:
    if isinstance(run.recipe.model, EncoderDecoderSection):
        return _export_translator(run, checkpoint, path, type)
    network = run.network(checkpoint, torch.device("cpu"))
    if isinstance(network.model, EncoderSection):
        return _export_encoder(run, checkpoint, network, path, type)
    class_name, unsupported = huggingface.select_class(network.model)
    if unsupported:
        reporter.note(
            f"no transformers class supports {', '.join(unsupported)}; the folder includes {huggingface.MODELING_FILE} instead"
        )
    with atomic_folder(path) as temporary:
        text = verify.sample_text(run)
        snippet = Snippet.choose(run.tokenizer, network.model.context_length, text, bool(unsupported))
        readme = card.model_card(run, checkpoint, network.parameter_count(), class_name, unsupported, snippet)
        huggingface.write(temporary, network, run.tokenizer, readme, type)
        if run.chat_encoder is not None:
            chat_files.write(temporary, run.chat_encoder)
        rounded = huggingface.round_weights(network, type)
        difference, tokens = huggingface.check_export(temporary, rounded, run.tokenizer, text, snippet, run.chat_encoder)
        perplexities = _perplexities(network, rounded, run.tokenizer, text) if type != "f32" else (None, None)
        size = _folder_size(temporary)
    import transformers

    return ExportResult(
        **_common_fields(run, checkpoint, "hf", path),
        bytes=size,
        architecture=class_name,
        custom_code_reasons=unsupported,
        largest_difference=difference,
        tokens_compared=tokens,
        verified_with=(f"transformers {transformers.__version__}",),
        type=type,
        perplexity=perplexities[0],
        run_perplexity=perplexities[1],
    )


def _export_encoder(run: Run, checkpoint: Checkpoint, network: Model, path: Path, type: str) -> ExportResult:
    """Write an encoder or classifier in BERT's format. For an encoder without a head, include sentence-transformers' files."""
    model, objective = network.model, run.recipe.objective
    assert isinstance(model, EncoderSection)
    class_name = encoders.check_exportable(model, objective, run.has_head)
    with atomic_folder(path) as temporary:
        text = _encoder_text(run)
        name, parameters = run.recipe.name, network.parameter_count()
        readme = encoder_folders.model_card(name, parameters, class_name, run.recipe.to_yaml())
        encoder_folders.write(temporary, network, objective, run.tokenizer, readme, type, has_head=run.has_head)
        if not run.has_head:
            settings = SentenceSettings(model.context_length, run.environment.get(NORMALIZED) is True)
            encoder_folders.write_sentence_settings(temporary, settings, model.n_embd)
        rounded = huggingface.round_weights(network, type)
        difference, tokens = encoder_folders.check_export(temporary, rounded, run.tokenizer, text, has_head=run.has_head)
        size = _folder_size(temporary)
    import transformers

    return ExportResult(
        **_common_fields(run, checkpoint, "hf", path),
        bytes=size,
        architecture=class_name,
        custom_code_reasons=(),
        largest_difference=difference,
        tokens_compared=tokens,
        verified_with=(f"transformers {transformers.__version__}",),
        type=type,
    )


def _export_translator(run: Run, checkpoint: Checkpoint, path: Path, type: str) -> ExportResult:
    """Write an encoder-decoder for MarianMTModel."""
    import transformers

    translator = Translator.open(run, checkpoint.name, device="cpu")
    with atomic_folder(path) as temporary:
        readme = marian.model_card(run.recipe.name, translator.network.parameter_count(), run.recipe.to_yaml())
        marian.write(temporary, translator, readme, type)
        rounded = huggingface.round_weights(translator.network, type)
        assert isinstance(rounded, EncoderDecoder)
        difference, tokens = marian.check_folder(temporary, replace(translator, network=rounded), marian.sample_pairs(run))
        size = _folder_size(temporary)
    return ExportResult(
        **_common_fields(run, checkpoint, "hf", path),
        bytes=size,
        architecture=marian.CLASS,
        custom_code_reasons=(),
        largest_difference=difference,
        tokens_compared=tokens,
        verified_with=(f"transformers {transformers.__version__}",),
        type=type,
    )


def _encoder_text(run: Run) -> str:
    """Return the text on which to compare an encoder. For a classifier, this comes from its labeled held-out texts."""
    if isinstance(run.recipe.objective, ClassificationObjective) and (run.path / "heldout").exists():
        return "\n".join(run.tokenizer.decode(ids.tolist()) for ids in heldout_texts(run).documents()[:200])
    return verify.sample_text(run)


def _perplexities(network: Model, rounded: Model, tokenizer: Tokenizer, text: str) -> tuple[float, float]:
    """Return the perplexities of the rounded network and of the original network on `text`."""
    rows = verify.windows([tokenizer.end_of_text or 0, *tokenizer.encode(text)], network.model.context_length)
    return verify.perplexity(rounded, rows), verify.perplexity(network, rows)


def _export_gguf(run: Run, checkpoint: Checkpoint, path: Path, type: str, reporter: Reporter) -> ExportResult:
    network = run.network(checkpoint, torch.device("cpu"))
    architecture, _ = gguf.check_supported(network.model, run.tokenizer)
    with atomic_file(path) as temporary:
        gguf.write(temporary, network, run.tokenizer, type, run.recipe.name, run.chat_encoder)
        verification = gguf.check_export(temporary, network, run.tokenizer, verify.sample_text(run), type, reporter)
        size = temporary.stat().st_size
    return ExportResult(
        **_common_fields(run, checkpoint, "gguf", path),
        bytes=size,
        architecture=architecture,
        custom_code_reasons=(),
        largest_difference=verification.largest_difference,
        tokens_compared=verification.tokens,
        verified_with=verification.programs,
        type=type,
        perplexity=verification.perplexity,
        run_perplexity=verification.run_perplexity,
        same_greedy=verification.same_greedy,
    )


def _export_onnx(run: Run, checkpoint: Checkpoint, path: Path, type: str, reporter: Reporter) -> ExportResult:
    import onnxruntime

    network = run.network(checkpoint, torch.device("cpu"))
    with atomic_file(path) as temporary:
        onnx.write(temporary, network, run.recipe.name, has_head=run.has_head)
        difference, tokens = onnx.check_export(temporary, network, run.tokenizer, _encoder_text(run), has_head=run.has_head)
        size = temporary.stat().st_size
    return ExportResult(
        **_common_fields(run, checkpoint, "onnx", path),
        bytes=size,
        architecture="ONNX graph",
        custom_code_reasons=(),
        largest_difference=difference,
        tokens_compared=tokens,
        verified_with=(f"onnxruntime {onnxruntime.__version__}",),
    )


def _export_arpa(run: Run, checkpoint: Checkpoint, path: Path, type: str, reporter: Reporter) -> ExportResult:
    network = run.network(checkpoint, torch.device("cpu"))
    tables = arpa.tables_of(network)
    with atomic_file(path) as temporary:
        arpa.write(temporary, tables, arpa.words_of(run.tokenizer), run.tokenizer.end_of_text or 0)
        ids = [run.tokenizer.end_of_text or 0, *run.tokenizer.encode(verify.sample_text(run))]
        difference, programs = arpa.check_export(temporary, tables, run.tokenizer, ids)
        verify.check_logits(difference, "the export")
        size = temporary.stat().st_size
    return ExportResult(
        **_common_fields(run, checkpoint, "arpa", path),
        bytes=size,
        architecture=f"{tables.order}-gram model",
        custom_code_reasons=(),
        largest_difference=difference,
        tokens_compared=len(ids) - 1,
        verified_with=programs,
    )
