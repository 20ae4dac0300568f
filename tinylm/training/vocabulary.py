"""A run with tokens added to its vocabulary or taken out: a new run folder with the changed tokenizer and embedding rows.

The row of an added token is the mean of the rows of the pieces that it was before; rows of removed tokens are dropped. The
held-out text is encoded anew, so that the run can be measured at once. What only resuming needs is left behind.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinylm.data import prepare
from tinylm.errors import InputError
from tinylm.paths import write_whole
from tinylm.recipe.schema import FileTokenizer
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Run, claim, seal
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.editing import Edited


def apply(run: Run, edited: Edited, out: Path, *, checkpoint: str | None = None, reporter: Reporter = SILENT) -> Run:
    """Write the run folder `out`: one checkpoint of `run` with the vocabulary of `edited`.

    Raises `InputError` when `out` is taken, the checkpoint is damaged, or ids would change that the model's n-gram tables know.
    """
    claim(out, resume=False, overwrite=False)
    chosen = run.checkpoint(checkpoint)
    problem = chosen.problem(only=("model.safetensors", "state.json"))
    if problem is not None:
        raise InputError(f"damaged: {problem}", where=str(chosen.path), hint="name another with --checkpoint")
    _check_ngrams(run, edited, reporter)
    tokenizer = edited.tokenizer
    folder = out / "checkpoints" / chosen.name
    folder.mkdir(parents=True)
    weights = load_file(chosen.path / "model.safetensors")
    save_file(resized(weights, run.tokenizer.vocab_size, edited.sources), folder / "model.safetensors", {"format": "pt"})
    state = {**chosen.state, "fingerprints": {**chosen.state["fingerprints"], "tokenizer": tokenizer.fingerprint}}
    write_whole(folder / "state.json", json.dumps(state, indent=1) + "\n")
    seal(folder)
    for name in ("best", "last"):
        write_whole(out / "checkpoints" / name, chosen.name + "\n")
    tokenizer.save(out / "tokenizer.json")
    if (run.path / "heldout").exists():  # imported runs have none
        _encode_heldout(run, tokenizer, out, reporter)
    for name in ("metrics.jsonl", "samples.md", "environment.json"):
        if (run.path / name).exists():
            shutil.copyfile(run.path / name, out / name)
    section = FileTokenizer(kind="file", path=os.path.abspath(out / "tokenizer.json"))
    write_whole(out / "recipe.yaml", run.recipe.model_copy(update={"tokenizer": section, "name": out.name}).to_yaml())
    return Run.open(out)


def resized(weights: dict[str, Tensor], vocab_size: int, sources: list[list[int]]) -> dict[str, Tensor]:
    """Every tensor with a row for each of `vocab_size` tokens gets one for each of `sources`: the mean of those old rows."""
    changed = {}
    for name, tensor in weights.items():
        if name.rsplit(".", 2)[-2] in ("embedding", "head", "value_embedding") and tensor.shape[0] == vocab_size:
            rows = torch.tensor([old[0] if old else 0 for old in sources])
            tensor = tensor[rows].clone()
            for row, old in enumerate(sources):
                if len(old) != 1:
                    tensor[row] = weights[name][old].mean(0) if old else weights[name].mean(0)
        changed[name] = tensor.contiguous()
    return changed


def _check_ngrams(run: Run, edited: Edited, reporter: Reporter) -> None:
    if not run.recipe.model.ngram_embeddings:
        return
    if any(old != [new] for new, old in enumerate(edited.sources[: run.tokenizer.vocab_size])):
        raise InputError(
            "this model's n-gram tables know tokens by their ids, which removing would change", where=str(run.path), hint="add only"
        )
    reporter.warn("the first few positions of each context meet other rows of the n-gram tables than before")


def _encode_heldout(run: Run, tokenizer: Tokenizer, out: Path, reporter: Reporter) -> None:
    shard = run.heldout()

    def pieces() -> Iterator[Piece]:
        for start, end in shard.documents():
            yield Piece(run.tokenizer.decode(shard.tokens[start:end].tolist()), True)

    with reporter.progress("encoding held-out text", shard.counts.characters, "B") as advance:
        prepare.encode(out / "heldout", "heldout", pieces(), tokenizer, advance)
