"""The `pairs` data format: sentence pairs are split by document, encoded, and read in batches of similar length."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.data.bucketed_pairs import BucketedPairs, PairFraming, language_token
from tinylm.data.prepare import EncodePieces, digest, load_or_train_tokenizer, open_or_encode
from tinylm.data.prepared import PART_ADJECTIVES, PreparedData
from tinylm.data.shards import Shard, open_shard
from tinylm.data.workers import encode_in_parallel
from tinylm.errors import InputError
from tinylm.paths import atomic_write_text, cache_folder, sha256
from tinylm.recipe import Recipe
from tinylm.recipe.pairs import AlignedFiles, PairShare, PairSources, PairsSection
from tinylm.recipe.schema import LearnedTokenizer, TokenizerSection
from tinylm.reporting import Reporter
from tinylm.text import pairs as pair_texts
from tinylm.text.cutting import cut_into_pieces
from tinylm.text.pairs import SentencePair, normalized
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer

_CACHE_VERSION = 1
_SIDES = ("source", "target")
SOURCE_TOKENIZER = "source-tokenizer.json"
"""The file that contains the source tokenizer if the two sides have separate vocabularies."""


@dataclass(frozen=True)
class EncodedPairs:
    """The pairs in one split as text and as tokens. The shards contain one document per pair."""

    pairs: tuple[SentencePair, ...]
    source: Shard
    target: Shard

    def __len__(self) -> int:
        return len(self.pairs)

    def ids(self, framing: PairFraming) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the framed source and target ids of each pair."""
        sources = [np.asarray(self.source.tokens[start:end]) for start, end in self.source.documents()]
        targets = [np.asarray(self.target.tokens[start:end]) for start, end in self.target.documents()]
        framed = [framing.source(ids, pair.language) for ids, pair in zip(sources, self.pairs, strict=True)]
        return framed, [framing.target(ids) for ids in targets]


@dataclass(frozen=True)
class PreparedPairs(PreparedData):
    """The tokenizers and the sentence pairs in all splits. `tokenizer` is the target tokenizer."""

    source_tokenizer: Tokenizer
    """The same object as `tokenizer` if the vocabulary is shared."""
    train: EncodedPairs
    heldout: EncodedPairs
    test: EncodedPairs | None

    @property
    def heldout_files(self) -> tuple[str, ...]:
        parts = ("heldout",) if self.test is None else ("heldout", "test")
        own = () if self.source_tokenizer is self.tokenizer else (SOURCE_TOKENIZER,)
        shards = tuple(f"{part}-{side}.{suffix}" for part in parts for side in _SIDES for suffix in ("npy", "json"))
        return (*shards, *(name for part in parts for name in (pairs_file(part), checksum_file(part))), *own)

    def fill_in(self, recipe: Recipe) -> Recipe:
        """Fill in `objective.source_vocab_size` if the source side has a separate vocabulary.

        Raises `InputError` if the recipe sets it to another size.
        """
        given, actual = getattr(recipe.objective, "source_vocab_size", None), self.source_tokenizer.vocab_size
        if given not in (None, actual):
            problem = f"must be {actual:,}, the size of the source vocabulary, not {given:,}"
            raise InputError(problem, where="objective.source_vocab_size", hint="remove it: training sets it")
        if self.source_tokenizer is self.tokenizer:
            return recipe
        objective = recipe.objective.model_copy(update={"source_vocab_size": actual})
        return recipe.model_copy(update={"objective": objective})

    def framing(self, context_length: int) -> PairFraming:
        return PairFraming(self.source_tokenizer, self.tokenizer, context_length)


def pairs_file(part: str) -> str:
    """Return the name of the file that contains the text of a split."""
    return f"{part}-pairs.jsonl"


def checksum_file(part: str) -> str:
    """Return the name of the file that contains the SHA-256 of `pairs_file`."""
    return f"{part}-pairs.sha256"


class PairsFormat:
    """The data format for sentences and their translations."""

    def prepare(self, recipe: Recipe, reporter: Reporter, workers: int) -> PreparedPairs:
        data = recipe.data
        assert isinstance(data, PairsSection)
        parts = read_parts(data, reporter)
        section = with_language_tokens(recipe.tokenizer, parts, data)
        separate = data.vocabulary == "separate"
        tokenizer = load_or_train_tokenizer(_Texts(parts, ("target",) if separate else _SIDES), section, reporter)
        source_tokenizer = load_or_train_tokenizer(_Texts(parts, ("source",)), section, reporter) if separate else tokenizer
        key = digest(
            "pairs", pair_texts.fingerprint(parts), tokenizer.fingerprint, source_tokenizer.fingerprint, str(_CACHE_VERSION)
        )
        folder = cache_folder("tokens", key)
        for part, pairs in reversed(parts.items()):
            for side, chosen in zip(_SIDES, (source_tokenizer, tokenizer), strict=True):
                encode: EncodePieces = partial(encode_in_parallel, chosen, workers=workers)
                name = f"{part}-{side}"
                open_or_encode(folder, name, _Texts({name: pairs}, (side,)), chosen, encode, reporter)
            _write_pairs(folder, part, pairs)
        if separate:
            source_tokenizer.save(folder / SOURCE_TOKENIZER)
        prepared = open_pairs(folder, key, tokenizer)
        _report(prepared, recipe.model.context_length, reporter)
        return prepared

    def open(self, recipe: Recipe, folder: Path, fingerprint: str, tokenizer_json: str) -> PreparedPairs:
        return open_pairs(folder, fingerprint, Tokenizer.from_text(tokenizer_json))

    def dataset(self, recipe: Recipe, prepared: PreparedPairs) -> BucketedPairs:
        sources, targets = prepared.train.ids(prepared.framing(recipe.model.context_length))
        assert isinstance(recipe.data, PairsSection)
        batch_size, batch_tokens = recipe.training.global_batch_size, recipe.data.batch_tokens
        return BucketedPairs(sources, targets, recipe.model.context_length, batch_size, recipe.seed, batch_tokens)


def open_pairs(folder: Path, fingerprint: str, tokenizer: Tokenizer) -> PreparedPairs:
    """Open prepared pairs. Raises `InputError` if they are missing or damaged."""
    own = folder / SOURCE_TOKENIZER
    source_tokenizer = Tokenizer.load(own) if own.exists() else tokenizer
    opened = {
        part: open_part(folder, part, source_tokenizer, tokenizer)
        for part in ("train", "heldout", "test")
        if (folder / pairs_file(part)).exists()
    }
    if not {"train", "heldout"} <= opened.keys():
        raise InputError("the prepared sentence pairs are incomplete", where=str(folder), hint="delete this folder and try again")
    return PreparedPairs(tokenizer, folder, fingerprint, source_tokenizer, opened["train"], opened["heldout"], opened.get("test"))


def open_part(folder: Path, part: str, source_tokenizer: Tokenizer, tokenizer: Tokenizer) -> EncodedPairs:
    """Open one split of prepared pairs, for example in a run folder. Raises `InputError` if it is missing or damaged."""
    pairs = _read_pairs(folder, part)
    shards = []
    for side, chosen in zip(_SIDES, (source_tokenizer, tokenizer), strict=True):
        shard = open_shard(folder, f"{part}-{side}")
        problem = shard.problem(chosen.vocab_size)
        if problem is None and shard.counts.documents != len(pairs):
            problem = f"{shard.counts.documents:,} sentences for {len(pairs):,} pairs"
        if problem is not None:
            raise InputError(f"the tokens are damaged: {problem}", where=str(folder / f"{part}-{side}.npy"))
        shards.append(shard)
    return EncodedPairs(pairs, *shards)


def _write_pairs(folder: Path, part: str, pairs: Sequence[SentencePair]) -> None:
    lines = [json.dumps([pair.source, pair.target, pair.document, pair.language], ensure_ascii=False) for pair in pairs]
    atomic_write_text(folder / pairs_file(part), "\n".join(lines) + "\n")
    atomic_write_text(folder / checksum_file(part), sha256(folder / pairs_file(part)) + "\n")


def _read_pairs(folder: Path, part: str) -> tuple[SentencePair, ...]:
    file = folder / pairs_file(part)
    try:
        if not file.is_file():
            raise ValueError("no such file")
        if (folder / checksum_file(part)).read_text(encoding="utf-8").strip() != sha256(file):
            raise ValueError("they have changed since they were saved")
        values = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
        if not all(isinstance(row, list) and len(row) == 4 and all(isinstance(text, str) for text in row) for row in values):
            raise ValueError("a line is not a sentence pair")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the sentence pairs are missing or damaged: {error}", where=str(file)) from None
    return tuple(SentencePair(*row) for row in values)


@dataclass(frozen=True)
class _Texts:
    """The sentences of one or both sides, as a text in which each sentence is a document."""

    parts: Mapping[str, Sequence[SentencePair]]
    sides: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        return digest(*self.sides, pair_texts.fingerprint(self.parts))

    @property
    def train_bytes(self) -> int:
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in self._sentences("train"))

    def _sentences(self, part: str) -> Iterator[str]:
        return (getattr(pair, side) for pair in self.parts[part] for side in self.sides)

    def pieces(self, part: str) -> Iterator[Piece]:
        for sentence in self._sentences(part):
            for number, text in enumerate(cut_into_pieces([sentence])):
                yield Piece(text, number == 0)

    def sizes(self, part: str) -> tuple[int, int]:
        return len(self.parts[part]), sum(map(len, self._sentences(part)))


def read_parts(data: PairsSection, reporter: Reporter) -> dict[str, list[SentencePair]]:
    """Read, split and clean the pairs, and report the size of each split. Raises `InputError` if a split is empty."""
    sections: dict[str, Any] = {"heldout": data.heldout, "test": data.test}
    shares = {part: (section.share, section.by) for part, section in sections.items() if isinstance(section, PairShare)}
    parts = pair_texts.split(pair_texts.read_pairs(data, data.train, reporter), shares)
    for part, section in sections.items():
        if isinstance(section, (AlignedFiles, PairSources)):
            parts[part] = pair_texts.read_pairs(data, section, reporter)
    parts = {part: parts[part] for part in ("train", "heldout", "test") if part in parts}
    _count_duplicates(parts, data, reporter)
    _count_overlap(parts, data, reporter)
    documents = {part: len({pair.document for pair in pairs}) for part, pairs in parts.items()}
    sizes = ", ".join(f"{part} {len(pairs):,} in {documents[part]:,} documents" for part, pairs in parts.items())
    reporter.note(f"sentence pairs: {sizes}")
    return parts


def _count_duplicates(parts: dict[str, list[SentencePair]], data: PairsSection, reporter: Reporter) -> None:
    unique = list({(pair.source, pair.target, pair.language): pair for pair in reversed(parts["train"])}.values())[::-1]
    repeated = len(parts["train"]) - len(unique)
    if repeated:
        dropped = data.duplicates == "drop"
        reporter.note(f"{repeated:,} duplicate training pairs {'were dropped' if dropped else 'are kept'} (data.duplicates)")
        if dropped:
            parts["train"] = unique


def _count_overlap(parts: dict[str, list[SentencePair]], data: PairsSection, reporter: Reporter) -> None:
    trained = {(normalized(pair.source), pair.language) for pair in parts["train"]}
    for part, pairs in parts.items():
        if part == "train":
            continue
        adjective = PART_ADJECTIVES[part]
        unseen = [pair for pair in pairs if (normalized(pair.source), pair.language) not in trained]
        overlap = len(pairs) - len(unseen)
        if overlap and data.overlap == "drop":
            if not unseen:
                hint = "set data.overlap to keep, or choose other held-out pairs"
                raise InputError(f"all {adjective} sentences also occur in the training pairs", where=f"data.{part}", hint=hint)
            where = "because their source also occurs in the training pairs (data.overlap)"
            reporter.note(f"dropped {overlap:,} of {len(pairs):,} {adjective} pairs, {where}")
            parts[part] = unseen
        elif overlap:
            seen = f"{overlap:,} of {len(pairs):,} {adjective} sentences also occur in the training pairs"
            reporter.warn(f"{seen}, so the scores will be too optimistic")


def with_language_tokens(
    section: TokenizerSection, parts: Mapping[str, Sequence[SentencePair]], data: PairsSection
) -> TokenizerSection:
    """Add a control token for each target language to the section of a tokenizer that has not been trained yet."""
    if data.language is None or not isinstance(section, LearnedTokenizer):
        return section
    tokens = sorted({language_token(pair.language) for pair in parts["train"]} - {*section.special_tokens})
    return section.model_copy(update={"special_tokens": (*tokens, *section.special_tokens)})


def _report(prepared: PreparedPairs, context_length: int, reporter: Reporter) -> None:
    framing = prepared.framing(context_length)
    for part, encoded in (("training", prepared.train), ("held-out", prepared.heldout), ("test", prepared.test)):
        if encoded is None:
            continue
        sources, targets = encoded.ids(framing)
        longer = sum(max(len(s), len(t)) > context_length for s, t in zip(sources, targets, strict=True))
        if longer:
            what = "are not used" if part == "training" else "are truncated"
            longest = f"longer than model.context_length {context_length}"
            reporter.warn(f"{longer:,} of {len(encoded):,} {part} pairs are {longest} and {what}")
    unknown = sum(shard.counts.unknown_tokens or 0 for shard in (prepared.heldout.source, prepared.heldout.target))
    if unknown:
        reporter.warn(f"{unknown:,} held-out tokens are unknown to the tokenizer (use a tokenizer of the kind bpe or byte)")
