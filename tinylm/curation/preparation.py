"""Prepare a text for training in stages that several processes or machines can share.

1. `analyze`: apply the quality rules to each document, and hash the documents that pass. Any process can analyze any block.
2. `decide`: find duplicates, choose the held-out documents, and train the tokenizer. One process.
3. `encode`: encode the kept documents of each block. Any process can encode any block.
4. `finish`: join the tokens of all blocks, and write the manifest. One process.

All intermediate results are files in `DIR/work` that are written atomically. Running a stage again only computes what is missing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import numpy as np

import tinylm
from tinylm.curation.analysis import analyze, final_text, open_analysis
from tinylm.curation.blocks import Block, Documents
from tinylm.curation.duplicates import Decisions, decide
from tinylm.curation.encoding import PARTS, EncodingJob, check_unchanged, encoded_parts, join
from tinylm.curation.report import Report, build_report, write_removed
from tinylm.curation.settings import Settings
from tinylm.data.ngrams import sample_ngrams_of_parts, save_ngrams
from tinylm.data.prepare import NGRAMS_FILE, digest, load_or_train_tokenizer
from tinylm.data.prepared_folder import learned_settings
from tinylm.data.workers import isolate_worker, map_in_order
from tinylm.errors import InputError
from tinylm.file_kinds import PREPARED_FORMAT
from tinylm.paths import atomic_file, atomic_write_text
from tinylm.reporting import SILENT, Advance, Reporter
from tinylm.text.cutting import cut_into_pieces
from tinylm.text.sources import Piece, describe
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.training import sampling_interval

MANIFEST, REMOVED, TOKENIZER = "manifest.json", "removed.jsonl", "tokenizer.json"
_LOCK, _WORK = ".lock", "work"
UNFINISHED_FILES = frozenset({_LOCK, _WORK, "logs"})
"""What a preparation that was stopped leaves in a new folder. datatrove writes `logs`."""
_SHARDS = frozenset(f"{part}{suffix}" for part in PARTS for suffix in (".npy", ".json"))
FILES = UNFINISHED_FILES | _SHARDS | {MANIFEST, REMOVED, TOKENIZER, NGRAMS_FILE}
"""The files and folders that a preparation writes."""


@dataclass(frozen=True)
class Preparation:
    """The preparation of a text in a folder. An interrupted preparation continues where it stopped.

    `run` does everything. The other methods are its stages, which can be distributed over several processes or machines.
    """

    settings: Settings
    folder: Path
    reporter: Reporter = SILENT

    @property
    def analyses(self) -> Path:
        """The folder with the analysis of each block."""
        return self.folder / _WORK / f"analysis-{self.settings.analysis_key}"

    @property
    def tokens(self) -> Path:
        """The folder with the decisions, the tokenizer and the tokens of each block."""
        return self.folder / _WORK / f"tokens-{self.settings.key}"

    @property
    def is_complete(self) -> bool:
        """Whether the folder contains a prepared text."""
        return (self.folder / MANIFEST).exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold a lock on the folder. Raises `InputError` if another process holds it.

        After an error, finished work is kept for the next attempt. If there is none, everything that was created is removed.
        """
        is_new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.folder / _LOCK, blocking=False)
        try:
            with lock:
                try:
                    yield
                except BaseException:
                    self._remove_empty_folders(is_new)
                    raise
        except filelock.Timeout:
            hint = "wait for it, or use another folder"
            raise InputError("another process is preparing a text in this folder", where=str(self.folder), hint=hint) from None

    def _remove_empty_folders(self, is_new: bool) -> None:
        """Remove the folders for unfinished work that are empty, then the lock, and the output folder itself if it `is_new`."""
        with suppress(OSError):  # a folder is missing or not empty
            for folder in (self.analyses, self.folder / _WORK):
                folder.rmdir()
        if [path.name for path in self.folder.iterdir()] == [_LOCK]:
            with suppress(OSError):  # Windows does not remove a file that is open
                (self.folder / _LOCK).unlink()
                if is_new:
                    self.folder.rmdir()

    def remove_other_work(self) -> None:
        """Remove the unfinished work of preparations with other settings."""
        work = self.folder / _WORK
        for entry in work.iterdir() if work.is_dir() else ():
            if entry not in (self.analyses, self.tokens):
                shutil.rmtree(entry, ignore_errors=True)

    def report_skipped(self, documents: Documents) -> None:
        """Print a note for each file that is skipped because it is not text."""
        for path in documents.skipped:
            self.reporter.note(f"skipped {path}: not text")

    # Stage 1

    def analyze(self, documents: Documents, jobs: int = 1, rank: int = 0, world_size: int = 1) -> None:
        """Analyze every `world_size`-th block, starting with block `rank`."""
        self.analyses.mkdir(parents=True, exist_ok=True)
        run = partial(analyze, settings=self.settings, folder=self.analyses)
        with self.reporter.progress("analyzing", None, "B") as advance:
            mine = self._own_blocks(documents, rank, world_size, advance)
            if jobs == 1:
                for block in mine:
                    run(block)
            else:
                for _ in map_in_order(run, mine, jobs, isolate_worker, option="--jobs"):
                    pass

    def _own_blocks(self, documents: Documents, rank: int, world_size: int, advance: Advance) -> Iterator[Block]:
        """Yield every `world_size`-th block, starting with block `rank`, and store the number of all blocks."""
        count = characters = 0
        for block in documents.blocks():
            if block.number % world_size == rank:
                yield block
            count, characters = count + 1, characters + block.characters
            advance(characters)
        atomic_write_text(self.analyses / "blocks", str(count))

    @property
    def blocks(self) -> int:
        """The number of blocks in the text, which is known after stage 1."""
        return int((self.analyses / "blocks").read_text(encoding="utf-8"))

    # Stage 2

    def decide(self) -> Report:
        """Decide what happens to each document. Raises `InputError` if a part of the result would be empty."""
        decisions = decide(self.analyses, self.blocks, self.settings)
        self.tokens.mkdir(parents=True, exist_ok=True)
        for name, array in (("codes", decisions.codes), ("originals", decisions.originals)):
            with atomic_file(self.tokens / f"{name}.npy") as temporary, open(temporary, "wb") as file:
                np.save(file, array)
        return self.decided_report()

    def decided_report(self) -> Report:
        """Report the decisions."""
        decisions = self._decisions()
        hashes = [open_analysis(self.analyses, number).digest for number in range(self.blocks)]
        fingerprint = digest(self.settings.analysis_key, *hashes, hashlib.sha256(decisions.codes.data).hexdigest())
        return build_report(self.analyses, self.blocks, decisions, self.settings, fingerprint)

    def check(self, report: Report) -> None:
        """Raise `InputError` if no training or held-out text is left."""
        problem = self.problem(report)
        if problem is not None:
            raise problem

    def problem(self, report: Report) -> InputError | None:
        """Return the error if no training or held-out text is left, or None."""
        if not report.train.documents:
            hint = "use --without to switch off the rules that remove them"
            return InputError("all training documents were removed", where=describe(self.settings.sources), hint=hint)
        if report.heldout.documents:
            return None
        if self.settings.heldout:
            hint = "use another text, or --contaminated train"
            return InputError("no held-out documents are left", where="--heldout", hint=hint)
        kept = report.train.documents
        return InputError(
            f"no held-out documents are left: {report.documents - kept:,} of {report.documents:,} documents were removed, "
            f"and none of the remaining {kept:,} is held out with --heldout-share {self.settings.heldout_share:g}",
            where=describe(self.settings.sources),
            hint="use a larger --heldout-share, another text with --heldout, or --without to switch off rules",
        )

    def prepare_tokenizer(self, documents: Documents, report: Report) -> None:
        """Load the tokenizer, or train it on the kept training documents."""
        if not (self.tokens / TOKENIZER).exists():
            every = sampling_interval(self.settings.tokenizer, report.train.bytes, self.reporter.warn)
            text = _KeptText(self, documents, report, every)
            load_or_train_tokenizer(text, self.settings.tokenizer, self.reporter).save(self.tokens / TOKENIZER)

    def _decisions(self) -> Decisions:
        """Memory-map the decisions."""
        return Decisions(*(np.load(self.tokens / f"{name}.npy", mmap_mode="r") for name in ("codes", "originals")))

    def decided(self, documents: Documents) -> Iterator[tuple[Block, np.ndarray]]:
        """Yield each block with the codes of its documents. Raises `InputError` if the number of documents has changed."""
        codes, first = self._decisions().codes, 0
        for block in documents.blocks():
            last = first + len(block.texts)
            if last > len(codes) or block.number >= self.blocks:
                raise InputError("the text changed while it was read", where=block.sources[0][0], hint="run the command again")
            yield block, np.array(codes[first:last])
            first = last

    # Stage 3

    def encode(self, documents: Documents, jobs: int = 1, rank: int = 0, world_size: int = 1) -> None:
        """Encode every `world_size`-th block, starting with block `rank`."""
        tokenizer_json = (self.tokens / TOKENIZER).read_text(encoding="utf-8")
        with self.reporter.progress("encoding", None, "B") as advance:
            decided = _with_progress(self.decided(documents), advance)
            mine = (item for item in decided if item[0].number % world_size == rank)
            if jobs == 1:
                job = EncodingJob(self.settings, self.analyses, self.tokens, Tokenizer.from_text(tokenizer_json))
                for item in mine:
                    job.run(item)
            else:
                start = (self.settings, self.analyses, self.tokens, tokenizer_json)
                for _ in map_in_order(_encode, mine, jobs, _start_encoding, start, option="--jobs"):
                    pass

    # Stage 4

    def finish(self, report: Report) -> dict[str, Any]:
        """Write the tokens, the tokenizer, the list of removed documents and, last, the manifest. Returns the manifest.

        Until then, an earlier result in the folder is complete. Its manifest is removed first, and its other files are replaced.
        """
        tokenizer = Tokenizer.load(self.tokens / TOKENIZER)
        (self.folder / MANIFEST).unlink(missing_ok=True)
        counts = {part: join(self.tokens, self.blocks, part, self.folder, tokenizer.vocab_size) for part in PARTS}
        sample = sample_ngrams_of_parts(encoded_parts(self.tokens, self.blocks, "train"), counts["train"])
        save_ngrams(sample, self.folder / NGRAMS_FILE)
        tokenizer.save(self.folder / TOKENIZER)
        with atomic_file(self.folder / REMOVED) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
            write_removed(file, self.analyses, self.blocks, self._decisions())
        manifest = {
            "format": PREPARED_FORMAT,
            "version": tinylm.__version__,
            "sources": list(self.settings.sources),
            "heldout": list(self.settings.heldout),
            "settings": self.settings.as_dict(),
            **report_dict(report),
            "tokenizer": {
                "kind": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "fingerprint": tokenizer.fingerprint,
                "learned": learned_settings(self.settings.tokenizer),
            },
            "parts": {part: asdict(count) for part, count in counts.items()},
        }
        atomic_write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        shutil.rmtree(self.folder / _WORK)
        return manifest

    def run(self, jobs: int, show: Callable[[Report], None]) -> dict[str, Any]:
        """Run all stages with `jobs` processes and return the manifest. `show` is called with the report before text is encoded.

        Raises `InputError` if a source cannot be read, if no training or held-out text is left, or if another process is preparing
        a text in the folder.
        """
        with Documents(self.settings) as documents, self.locked():
            report = self.analyze_and_decide(documents, jobs)
            show(report)
            self.check(report)
            self.prepare_tokenizer(documents, report)
            self.encode(documents, jobs)
            return self.finish(report)

    def report(self, jobs: int) -> Report:
        """Report what a preparation would remove. Raises `InputError` if a source cannot be read."""
        with Documents(self.settings) as documents, self.locked():
            return self.analyze_and_decide(documents, jobs)

    def analyze_and_decide(self, documents: Documents, jobs: int) -> Report:
        """Run stage 1 and make the decisions of stage 2."""
        self.report_skipped(documents)
        self.remove_other_work()
        self.analyze(documents, jobs)
        return self.decide()


def report_dict(report: Report) -> dict[str, Any]:
    """Return the entries of a report in the manifest and in the JSON output."""
    values = asdict(report)
    for step, entry in zip(report.steps, values["steps"], strict=True):
        entry["share"] = step.share
    return {
        "input": {"documents": report.documents, "bytes": report.bytes, "divided": report.divided},
        "steps": values["steps"],
        "output": {"train": values["train"], "heldout": values["heldout"]},
        "fingerprint": report.digest,
    }


class _KeptText:
    """Every `every`-th kept document, as a text on which a tokenizer can be trained."""

    def __init__(self, preparation: Preparation, documents: Documents, report: Report, every: int) -> None:
        self._preparation, self._documents, self._every = preparation, documents, every
        self.fingerprint = report.digest
        self.train_bytes = report.train.bytes // every

    def pieces(self, part: str) -> Iterator[Piece]:
        settings, kept = self._preparation.settings, 0
        for block, codes in self._preparation.decided(self._documents):
            indices = np.flatnonzero(codes == PARTS[part])
            sample = indices[-kept % self._every :: self._every]
            kept += len(indices)
            if len(sample):
                check_unchanged(block, self._preparation.analyses)
            for index in sample.tolist():
                for number, text in enumerate(cut_into_pieces([final_text(block.texts[index], settings, block.part)])):
                    yield Piece(text, number == 0)

    def sizes(self, part: str) -> tuple[int, int]:
        raise NotImplementedError  # only needed for encoding


def _with_progress(decided: Iterator[tuple[Block, np.ndarray]], advance: Advance) -> Iterator[tuple[Block, np.ndarray]]:
    characters = 0
    for block, codes in decided:
        yield block, codes
        characters += block.characters
        advance(characters)


_job: EncodingJob | None = None
"""The encoding job of a worker process."""


def _start_encoding(settings: Settings, analyses: Path, folder: Path, tokenizer_json: str) -> None:
    global _job
    isolate_worker()
    _job = EncodingJob(settings, analyses, folder, Tokenizer.from_text(tokenizer_json))


def _encode(item: tuple[Block, np.ndarray]) -> None:
    assert _job is not None
    _job.run(item)
