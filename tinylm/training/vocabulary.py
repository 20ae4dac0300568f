"""Change the vocabulary of a trained run: write a new run folder with the edited tokenizer and resized embeddings.

The old tokenizer encodes the text of an added token as one or more tokens. The embedding of the added token is the mean of their
embeddings. The embeddings of removed tokens are dropped. The held-out text is encoded with the new tokenizer, so that the new run
can be evaluated. The optimizer state is not copied.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from tinylm.data.prepare import encode_to_shard
from tinylm.errors import InputError
from tinylm.model.init_from import resize_rows
from tinylm.paths import atomic_folder, atomic_write_text
from tinylm.recipe.schema import DecoderSection, FileTokenizer
from tinylm.recipe.values import run_name
from tinylm.reporting import SILENT, Reporter
from tinylm.run import MODEL_FILES, POINTERS, Checkpoint, Run, check_run_folder, write_manifest
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.chat_template import CHAT_TEMPLATE_FILE
from tinylm.tokenizer.vocab_editing import EditedTokenizer


def write_edited_run(
    run: Run, edited: EditedTokenizer, out: Path, *, checkpoint: str | None = None, reporter: Reporter = SILENT
) -> Run:
    """Write a new run folder `out` that contains one checkpoint of `run` with the edited vocabulary.

    Raises `InputError` if `out` contains a run, if the checkpoint is damaged, or if the model has n-gram tables and token ids would
    change.
    """
    check_run_folder(out, resume=False, overwrite=False)
    source = run.checkpoint(checkpoint)
    problem = source.problem(only=MODEL_FILES)
    if problem is not None:
        raise InputError(f"damaged: {problem}", where=str(source.path), hint="choose another with --checkpoint")
    _check_ngrams(run, edited, reporter)
    tokenizer = edited.tokenizer
    with atomic_folder(out) as temporary:
        _write_checkpoint(temporary, run, edited, source)
        tokenizer.save(temporary / "tokenizer.json")
        if (run.path / "heldout").exists():  # imported runs have no held-out text
            _encode_heldout(run, tokenizer, temporary, reporter)
        for name in (CHAT_TEMPLATE_FILE, "metrics.jsonl", "samples.md", "environment.json"):
            if (run.path / name).exists():
                shutil.copyfile(run.path / name, temporary / name)
        section = FileTokenizer(kind="file", path=os.path.abspath(out / "tokenizer.json"))
        recipe = run.recipe.model_copy(update={"tokenizer": section, "name": run_name(out.name, "run")})
        atomic_write_text(temporary / "recipe.yaml", recipe.to_yaml())
    return Run.open(out)


def _write_checkpoint(folder: Path, run: Run, edited: EditedTokenizer, source: Checkpoint) -> None:
    """Write an edited copy of the checkpoint `source` to the run folder `folder`, as its only checkpoint."""
    saved = folder / "checkpoints" / source.name
    saved.mkdir(parents=True)
    weights = load_file(source.path / "model.safetensors")
    weights = _resize_embeddings(weights, run.tokenizer.vocab_size, edited.sources)
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    state = {**source.state, "fingerprints": {**source.state["fingerprints"], "tokenizer": edited.tokenizer.fingerprint}}
    atomic_write_text(saved / "state.json", json.dumps(state, indent=1) + "\n")
    write_manifest(saved)
    for pointer in POINTERS:
        atomic_write_text(folder / "checkpoints" / pointer, source.name + "\n")


def _resize_embeddings(weights: dict[str, Tensor], vocab_size: int, sources: list[list[int]]) -> dict[str, Tensor]:
    """Resize every (V, C) tensor with one row per token to one row per entry in `sources`.

    Each entry is a list of old token ids. The new row is the mean of their rows, or of all rows if the list is empty.
    """
    resized = {}
    for name, tensor in weights.items():
        if name.rsplit(".", 2)[-2] in ("embedding", "head", "value_embedding") and tensor.shape[0] == vocab_size:
            tensor = resize_rows(tensor, sources)
        resized[name] = tensor.contiguous()
    return resized


def _check_ngrams(run: Run, edited: EditedTokenizer, reporter: Reporter) -> None:
    """If the model has n-gram tables, warn that the padding id changes. Raises `InputError` if other token ids would change."""
    model = run.recipe.model
    if not (isinstance(model, DecoderSection) and model.ngram_embeddings):
        return
    if any(old != [new] for new, old in enumerate(edited.sources[: run.tokenizer.vocab_size])):
        raise InputError(
            "removing tokens would change token ids, but the n-gram tables of this model are indexed by token ids",
            where=str(run.path),
            hint="only add tokens",
        )
    reporter.warn("the first few positions in each context now use different rows of the n-gram tables")


def _encode_heldout(run: Run, tokenizer: Tokenizer, out: Path, reporter: Reporter) -> None:
    shard = run.heldout()

    def pieces() -> Iterator[Piece]:
        for start, end in shard.documents():
            yield Piece(run.tokenizer.decode(shard.tokens[start:end].tolist()), True)

    with reporter.progress("encoding held-out text", shard.counts.characters, "B") as advance:
        encode_to_shard(out / "heldout", "heldout", pieces(), tokenizer, advance)
