"""Encode the kept documents of a block to tokens, and join the tokens of all blocks.

The tokens of a block are ordinary shards (`tinylm.data.shards`). They are joined in the order of the text to one shard per part,
which is the format that training reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinylm.curation.analysis import final_text, open_analysis
from tinylm.curation.blocks import Block
from tinylm.curation.duplicates import HELDOUT, TRAIN
from tinylm.curation.settings import Settings
from tinylm.data.shards import Counts, Shard, concatenate, open_shard, write_shard
from tinylm.errors import InputError
from tinylm.paths import atomic_write_text
from tinylm.text.cutting import cut_into_pieces
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer

PARTS = {"train": TRAIN, "heldout": HELDOUT}
"""The code of the documents in each part of the result."""


@dataclass(frozen=True)
class EncodingJob:
    """Encodes blocks. Analyses are read from `analyses`, and tokens are written to `folder`."""

    settings: Settings
    analyses: Path
    folder: Path
    tokenizer: Tokenizer

    def run(self, item: tuple[Block, np.ndarray]) -> None:
        """Encode a block. The codes of its documents determine which of them are encoded. Skips a block that was already encoded.

        Raises `InputError` if the block has changed since it was analyzed.
        """
        block, codes = item
        check_unchanged(block, self.analyses)
        done = self.folder / f"{block.number:06}.json"
        if done.exists():
            return
        parts = [part for part, code in PARTS.items() if self._encode(block, codes == code, f"{block.number:06}-{part}")]
        atomic_write_text(done, json.dumps(parts))

    def _encode(self, block: Block, selected: np.ndarray, name: str) -> bool:
        """Encode the selected documents. Returns False if there are none."""
        if not selected.any():
            return False
        size = characters = 0

        def pieces() -> Iterator[Piece]:
            nonlocal size, characters
            for index in np.flatnonzero(selected).tolist():
                text = final_text(block.texts[index], self.settings, block.part)
                size += len(text.encode("utf-8"))
                characters += len(text)
                for number, piece in enumerate(cut_into_pieces([text])):
                    yield Piece(piece, number == 0)

        end_of_text = self.tokenizer.end_of_text
        assert end_of_text is not None
        write_shard(
            self.folder,
            name,
            self.tokenizer.encode_pieces(pieces()),
            vocab_size=self.tokenizer.vocab_size,
            end_of_text=end_of_text,
            unknown=self.tokenizer.unknown,
            sizes=lambda: (size, characters),
        )
        return True


def check_unchanged(block: Block, analyses: Path) -> None:
    """Raise `InputError` if a block has changed since it was analyzed."""
    if open_analysis(analyses, block.number).digest != block.digest():
        raise InputError("the text changed while it was read", where=block.sources[0][0], hint="run the command again")


def encoded_parts(folder: Path, blocks: int, part: str) -> Iterator[Shard]:
    """Yield the tokens of a part in each block that contains any."""
    for number in range(blocks):
        if part in json.loads((folder / f"{number:06}.json").read_text(encoding="utf-8")):
            yield open_shard(folder, f"{number:06}-{part}")


def join(folder: Path, blocks: int, part: str, target: Path, vocab_size: int) -> Counts:
    """Join the tokens of all blocks to `target/part.npy`."""
    return concatenate(target, part, lambda: encoded_parts(folder, blocks, part), vocab_size)
