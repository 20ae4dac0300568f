"""The `chat` data format: conversations are split by a hash of their text, encoded turn by turn, and packed into sequences."""

from __future__ import annotations

import json
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from tinylm.data.batch import IGNORE_INDEX
from tinylm.data.datasets import Dataset, Examples, TokenStream
from tinylm.data.framing import PADDING
from tinylm.data.mixture import Mixture
from tinylm.data.ngrams import sample_ngrams
from tinylm.data.order import epoch_key, permute
from tinylm.data.prepare import PreparedText, digest, load_or_train_tokenizer, open_prepared, prepare
from tinylm.data.prepared import PART_ADJECTIVES, PreparedData
from tinylm.data.shards import Shard, open_shard, write_shard
from tinylm.data.training_text import TrainingText
from tinylm.errors import InputError
from tinylm.paths import atomic_file, atomic_write_text, cache_folder, cached_file
from tinylm.recipe import Recipe
from tinylm.recipe.chat import ChatSection, ConversationShare, ConversationSources, MixSection, PreferencesSection
from tinylm.recipe.mixture import MixtureShares
from tinylm.recipe.schema import CausalLMObjective, DataSection, DataVariant, FileTokenizer, HeldoutShare
from tinylm.reporting import Reporter
from tinylm.text.conversations import ROLES, SYSTEM, Conversation, ConversationFormat, Item, choose, read_conversations
from tinylm.text.cutting import cut_into_pieces
from tinylm.text.sources import Piece, describe
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.chat_template import ChatEncoder, ChatTemplate, Turn, add_control_tokens

_CACHE_VERSION = 1
_MIX_FILE = "mix.json"
_MAX_NAMED = 3


@dataclass(frozen=True)
class EncodedConversations:
    """Encoded conversations, each stored as one document, and their turns."""

    shard: Shard
    turns: np.ndarray
    """int64 (turns, 3): the conversation index, the index of the role in `ROLES`, and the number of tokens."""

    def __len__(self) -> int:
        return self.shard.counts.documents

    @cached_property
    def _spans(self) -> np.ndarray:
        return np.array(self.shard.documents(), dtype=np.int64).reshape(-1, 2)

    @cached_property
    def _first_turns(self) -> np.ndarray:
        """The index of the first turn in each conversation, (conversations + 1,)."""
        return np.searchsorted(self.turns[:, 0], np.arange(len(self) + 1))

    def __getitem__(self, index: int) -> list[Turn]:
        """Return the turns in a conversation."""
        start = int(self._spans[index, 0])
        turns = []
        for _, role, length in self.turns[self._first_turns[index] : self._first_turns[index + 1]].tolist():
            turns.append(Turn(ROLES[role], self.shard.tokens[start : start + length].tolist()))
            start += length
        return turns

    def problem(self, vocab_size: int) -> str | None:
        """Return how the data is damaged, or None if it is valid."""
        if (problem := self.shard.problem(vocab_size)) is not None:
            return problem
        lengths = np.bincount(self.turns[:, 0], weights=self.turns[:, 2], minlength=len(self)) if len(self.turns) else np.zeros(0)
        spans = np.array(self.shard.documents(), dtype=np.int64).reshape(-1, 2)
        if len(lengths) != len(spans) or (lengths != spans[:, 1] - spans[:, 0]).any():
            return "the turns do not match the conversations"
        return None


def turns_file(part: str) -> str:
    """Return the name of the file that contains the turns of a split."""
    return f"{part}-turns.npy"


def open_conversations(folder: Path, part: str, vocab_size: int) -> EncodedConversations:
    """Open the encoded conversations of a split. Raises `InputError` if they are missing or damaged."""
    shard, file = open_shard(folder, part), folder / turns_file(part)
    try:
        if not file.is_file():
            raise ValueError("no such file")
        turns = np.load(file, allow_pickle=False)
        valid = turns.ndim == 2 and turns.shape[1] == 3 and turns.dtype == np.int64
        last = (shard.counts.documents - 1, len(ROLES) - 1, len(shard))
        if not valid or (turns < (0, 0, 2)).any() or (turns > last).any() or (np.diff(turns[:, 0]) < 0).any():
            raise ValueError("an unexpected structure")
    except (OSError, EOFError, ValueError, SyntaxError) as error:
        raise InputError(f"the turns are missing or damaged: {error}", where=str(file)) from None
    conversations = EncodedConversations(shard, turns)
    problem = conversations.problem(vocab_size)
    if problem is not None:
        raise InputError(f"the conversations are damaged: {problem}", where=str(folder / f"{part}.npy"))
    return conversations


def encode_conversations(
    folder: Path, part: str, conversations: Sequence[Conversation], encoder: ChatEncoder, advance: Callable[[int], None]
) -> None:
    """Encode the conversations of a split and write them to `folder`."""
    turns: list[tuple[int, int, int]] = []
    sizes = [0, 0]

    def encoded() -> Iterator[tuple[np.ndarray, bool]]:
        for number, conversation in enumerate(conversations):
            ids: list[int] = []
            for message in conversation.messages:
                try:
                    turn = encoder.turn(message)
                except InputError as error:
                    raise InputError(error.message, where=conversation.where, hint=error.hint) from None
                turns.append((number, ROLES.index(turn.role), len(turn.ids)))
                ids += turn.ids
                sizes[0] += len(message.content.encode("utf-8"))
                sizes[1] += len(message.content)
            advance(sizes[1])
            yield np.array(ids, dtype=np.int64), True

    tokenizer = encoder.tokenizer
    write_shard(
        folder,
        part,
        encoded(),
        vocab_size=tokenizer.vocab_size,
        end_of_text=encoder.start,
        unknown=tokenizer.unknown,
        sizes=lambda: (sizes[0], sizes[1]),
    )
    with atomic_file(folder / turns_file(part)) as temporary, open(temporary, "wb") as file:
        np.save(file, np.array(turns, dtype=np.int64).reshape(-1, 3))


@dataclass(frozen=True)
class Fitted:
    """A conversation that fits into the context. `ids` starts with the end-of-text token. `learned` marks the training targets."""

    ids: np.ndarray
    learned: np.ndarray
    cut: bool

    def targets(self, mask_prompt: bool) -> np.ndarray:
        """Return the target for each id except the last one: the next id, or `IGNORE_INDEX` if it is not a training target."""
        targets: np.ndarray = np.where(self.learned[1:], self.ids[1:], IGNORE_INDEX) if mask_prompt else self.ids[1:]
        return targets


def fit(turns: Sequence[Turn], start: int, context_length: int) -> Fitted | None:
    """Frame a conversation for training, and truncate it from the left if it has more than `context_length` + 1 tokens.

    The oldest exchanges are dropped first. Then the last question is truncated from the left. Finally, the system message is
    dropped. Return None if the last answer does not fit.
    """
    limit = context_length + 1
    kept, cut = list(turns), False
    length = 1 + sum(len(turn.ids) for turn in kept)
    first = 1 if kept[0].role == SYSTEM else 0
    while length > limit and len(kept) > first + 2:
        length -= len(kept[first].ids) + len(kept[first + 1].ids)
        kept[first : first + 2], cut = [], True
    if length > limit:
        cut = True
        question = kept[-2]
        room = len(question.ids) - (length - limit)
        if room < 3 and first:  # A turn needs its role, one token and its end token.
            room += len(kept[0].ids)
            kept = kept[1:]
        if room < 3:
            return None
        if room < len(question.ids):
            kept[-2] = Turn(question.role, [question.ids[0], *question.ids[len(question.ids) - room + 1 :]])
    ids = np.array([start, *(id for turn in kept for id in turn.ids)], dtype=np.int64)
    learned = np.array([False, *(flag for turn in kept for flag in turn.learned)])
    return Fitted(ids, learned, cut)


class PackedConversations:
    """A dataset of conversations in which all examples have the same length.

    Each example contains one conversation, or several with `packing`. The same conversations are packed together in every epoch,
    but the order of the examples changes. Examples have `tokens` and `segments` (count, length) and `targets` (count, length - 1).
    Segments number the conversations, and padding is negative. Raises `InputError` if no conversation fits into the context.
    """

    def __init__(
        self,
        conversations: EncodedConversations,
        context_length: int,
        seed: int,
        *,
        mask_prompt: bool = True,
        packing: bool = True,
    ) -> None:
        self._conversations, self._context, self._seed, self._mask_prompt = conversations, context_length, seed, mask_prompt
        self.cut: list[int] = []
        """The indexes of the truncated conversations."""
        self.skipped: list[int] = []
        """The indexes of the conversations that are skipped because their last answer does not fit into the context."""
        self.learned = 0
        """Number of training targets in one epoch."""
        sizes: dict[int, int] = {}
        for index in range(len(conversations)):
            fitted = self._fit(index)
            if fitted is None:
                self.skipped.append(index)
                continue
            sizes[index] = len(fitted.ids) - 1
            self.learned += int((fitted.targets(mask_prompt) >= 0).sum())
            if fitted.cut:
                self.cut.append(index)
        if not sizes:
            raise no_fitting_conversation(context_length)
        self.rows = pack(sizes, context_length) if packing else [[index] for index in sizes]
        self._length = context_length if packing else max(sizes.values())
        self.examples_per_epoch = len(self.rows)
        self.tokens_per_example = sum(sizes.values()) / len(self.rows)
        self.tokens = sum(sizes.values())

    def _fit(self, index: int) -> Fitted | None:
        return fit(self._conversations[index], self._conversations.shard.end_of_text, self._context)

    def examples(self, start: int, count: int) -> Examples:
        """Return the examples at positions [start, start + count)."""
        tokens = np.full((count, self._length + 1), PADDING, dtype=np.int64)
        segments = np.full((count, self._length + 1), PADDING, dtype=np.int64)
        targets = np.full((count, self._length), IGNORE_INDEX, dtype=np.int64)
        for row, position in enumerate(range(start, start + count)):
            epoch, within = divmod(position, len(self.rows))
            chosen = permute(np.array([within]), len(self.rows), epoch_key(self._seed, epoch))[0]
            first = 0
            for number, index in enumerate(self.rows[chosen]):
                fitted = self._fit(index)
                assert fitted is not None  # only conversations that fit are packed
                last = first + len(fitted.ids) - 1
                tokens[row, first:last] = fitted.ids[:-1]  # the last token is only a target
                targets[row, first:last] = fitted.targets(self._mask_prompt)
                segments[row, first:last] = number
                first = last
        return {"tokens": tokens, "targets": targets, "segments": segments}


def fitting_lengths(conversations: Sequence[Conversation], encoder: ChatEncoder, context_length: int) -> dict[int, int]:
    """Map the index of each conversation that fits into a context to its number of inputs. Raises `InputError` if none fits."""
    lengths = {}
    for index, conversation in enumerate(conversations):
        fitted = fit(encoder.turns(conversation.messages), encoder.start, context_length)
        if fitted is not None:
            lengths[index] = len(fitted.ids) - 1
    if not lengths:
        raise no_fitting_conversation(context_length)
    return lengths


def no_fitting_conversation(context_length: int) -> InputError:
    problem = f"no conversation has an answer that fits into context_length {context_length}"
    return InputError(problem, where="model.context_length", hint="use a longer context")


def pack(sizes: dict[int, int], capacity: int) -> list[list[int]]:
    """Divide items among bins of the same capacity, largest item first. Each item goes into the fullest bin with enough room."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (remaining room, bin), sorted
    for item, size in sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0])):
        position = bisect_left(rooms, (size, 0))
        if position == len(rooms):
            bins.append([])
            room, number = capacity, len(bins) - 1
        else:
            room, number = rooms.pop(position)
        bins[number].append(item)
        insort(rooms, (room - size, number))
    return bins


@dataclass(frozen=True)
class PreparedChat(PreparedData):
    """A tokenizer with control tokens, the chat template, the conversations in all splits, and the mixed-in text."""

    template: ChatTemplate
    train: EncodedConversations
    heldout: EncodedConversations
    test: EncodedConversations | None
    mix: PreparedText | None

    @property
    def chat_template(self) -> str:
        return self.template.to_json()

    @property
    def encoder(self) -> ChatEncoder:
        return ChatEncoder(self.template, self.tokenizer)

    def training_texts(self, data: DataVariant) -> list[TrainingText]:
        """Return the training texts: the conversations and the mixed-in text."""
        sources = data.sources()
        texts = [TrainingText(sources["train"], sample_ngrams(self.train.shard), self.tokenizer)]
        if self.mix is not None:
            texts.append(TrainingText(sources["mix"], self.mix.ngrams, self.tokenizer))
        return texts

    @property
    def heldout_files(self) -> tuple[str, ...]:
        parts = ("heldout",) if self.test is None else ("heldout", "test")
        return tuple(name for part in parts for name in (f"{part}.npy", f"{part}.json", turns_file(part)))


class ChatFormat:
    """The data format for conversations between a user and an assistant."""

    def prepare(self, recipe: Recipe, reporter: Reporter, workers: int) -> PreparedChat:
        data = recipe.data
        assert isinstance(data, ChatSection)
        parts = read_parts(data, reporter)
        tokenizer = prepare_tokenizer(parts, recipe, reporter)
        mix = None if data.mix is None else _prepare_mix(data, data.mix, tokenizer, reporter, workers)
        mixed = () if mix is None else (mix.fingerprint,)
        folder, key = encode_parts(data.format, parts, tokenizer, reporter, mixed)
        if mix is not None:
            atomic_write_text(folder / _MIX_FILE, json.dumps({"folder": str(mix.folder), "fingerprint": mix.fingerprint}) + "\n")
        prepared = open_chat(folder, key, tokenizer)
        _report_lengths(recipe, prepared, parts, reporter)
        return prepared

    def open(self, recipe: Recipe, folder: Path, fingerprint: str, tokenizer_json: str) -> PreparedChat:
        return open_chat(folder, fingerprint, Tokenizer.from_text(tokenizer_json))

    def dataset(self, recipe: Recipe, prepared: PreparedChat) -> Dataset:
        data = recipe.data
        assert isinstance(data, ChatSection)
        packed = _packed(recipe, prepared)
        if data.mix is None or prepared.mix is None:
            return packed
        text = TokenStream(prepared.mix.train.tokens, recipe.model.context_length, recipe.seed)
        shares = MixtureShares.constant([1 - data.mix.share, data.mix.share])
        # One epoch is one epoch of the conversations.
        return Mixture([packed, text], shares, max(1, round(packed.examples_per_epoch / (1 - data.mix.share))))


def _packed(recipe: Recipe, prepared: PreparedChat) -> PackedConversations:
    data, objective = recipe.data, recipe.objective
    assert isinstance(data, ChatSection)
    assert isinstance(objective, CausalLMObjective)
    return PackedConversations(
        prepared.train, recipe.model.context_length, recipe.seed, mask_prompt=objective.mask_prompt, packing=data.packing
    )


def prepare_tokenizer(parts: ConversationParts, recipe: Recipe, reporter: Reporter) -> Tokenizer:
    """Train or load the tokenizer, and add the control tokens of the chat template."""
    tokenizer = add_control_tokens(load_or_train_tokenizer(parts, recipe.tokenizer, reporter), ChatTemplate()).tokenizer
    tokenizer.encoder.note = reporter.note
    return tokenizer


def encode_parts(
    kind: str, parts: ConversationParts, tokenizer: Tokenizer, reporter: Reporter, mixed: Sequence[str] = ()
) -> tuple[Path, str]:
    """Encode the conversations in all splits unless the cache contains them. Return the cache folder and the fingerprint."""
    template = ChatTemplate()
    key = digest(kind, parts.fingerprint, tokenizer.fingerprint, template.to_json(), str(_CACHE_VERSION), *mixed)
    folder, encoder = cache_folder("tokens", key), ChatEncoder(template, tokenizer)
    for part, conversations in reversed(parts.conversations.items()):
        if not _is_complete(folder, part, tokenizer.vocab_size, reporter):
            with reporter.progress(f"encoding {part}", parts.sizes(part)[1], "B") as advance:
                encode_conversations(folder, part, conversations, encoder, advance)
    return folder, key


def open_chat(folder: Path, key: str, tokenizer: Tokenizer) -> PreparedChat:
    """Open the conversations that `encode_parts` encoded."""
    opened = partial(open_conversations, folder, vocab_size=tokenizer.vocab_size)
    test = opened("test") if (folder / turns_file("test")).exists() else None
    mix = None
    if (folder / _MIX_FILE).exists():
        document = json.loads((folder / _MIX_FILE).read_text(encoding="utf-8"))
        mix = open_prepared(Path(document["folder"]), document["fingerprint"], tokenizer.backend.to_str())
    return PreparedChat(tokenizer, folder, key, ChatTemplate(), opened("train"), opened("heldout"), test, mix)


def _is_complete(folder: Path, part: str, vocab_size: int, reporter: Reporter) -> bool:
    """Return whether the cache contains a valid split. Warn if its files are damaged."""
    if not (folder / turns_file(part)).exists():
        return False
    try:
        open_conversations(folder, part, vocab_size)
    except InputError as error:
        reporter.warn(f"{error}; encoding the conversations again")
        return False
    return True


def _prepare_mix(data: ChatSection, mix: MixSection, tokenizer: Tokenizer, reporter: Reporter, workers: int) -> PreparedText:
    """Encode the mixed-in text with the tokenizer of the conversations, which has control tokens."""
    path = cached_file(cache_folder("tokenizers") / f"{tokenizer.fingerprint[:32]}.json", tokenizer.save)
    heldout = HeldoutShare(share=mix.heldout.share, by=mix.heldout.by)
    section = DataSection(train=mix.text, heldout=heldout, errors=data.errors)
    return prepare(section, FileTokenizer(kind="file", path=str(path)), reporter, workers)


@dataclass(frozen=True)
class ConversationParts:
    """The conversations in each split, in memory."""

    conversations: dict[str, list[Conversation]]

    @property
    def fingerprint(self) -> str:
        return digest(*(f"{part} {item.key.hex()}" for part, items in self.conversations.items() for item in items))

    @property
    def train_bytes(self) -> int:
        return sum(len(m.content.encode("utf-8")) for item in self.conversations["train"] for m in item.messages)

    def pieces(self, part: str) -> Iterator[Piece]:
        for item in self.conversations[part]:
            for message in item.messages:
                for number, text in enumerate(cut_into_pieces([message.content])):
                    yield Piece(text, number == 0)

    def sizes(self, part: str) -> tuple[int, int]:
        items = self.conversations[part]
        return len(items), sum(len(message.content) for item in items for message in item.messages)


def read_parts(data: ChatSection, reporter: Reporter) -> ConversationParts:
    """Read and split the conversations, and report how many there are. Raises `InputError` if a split is empty."""
    return ConversationParts(read_splits(data, partial(_read, data), "conversation", reporter))


def read_splits(
    data: ChatSection | PreferencesSection, read: Callable[[Sequence[str]], list[Item]], name: str, reporter: Reporter
) -> dict[str, list[Item]]:
    """Read and split conversations or preferences, which messages call `name`. Raises `InputError` if a split is empty."""
    sections = {"heldout": data.heldout, "test": data.test if isinstance(data, ChatSection) else None}
    shares = {part: section.share for part, section in sections.items() if isinstance(section, ConversationShare)}
    parts = choose(read(data.train), shares)
    for part, section in sections.items():
        if isinstance(section, ConversationSources):
            parts[part] = read(section.sources)
    ordered = {part: parts[part] for part in _PURPOSES if part in parts}
    for part, items in ordered.items():
        if not items:
            problem = f"the split leaves no {PART_ADJECTIVES[part]} {name}s"
            raise InputError(problem, where=f"data.{part}", hint=f"use more {name}s or a different share")
    sizes = [f"{counted(len(items), name)} {_PURPOSES[part]}" for part, items in ordered.items()]
    reporter.note(f"{data.format}: {', '.join(sizes)}")
    trained = {item.key for item in ordered["train"]}
    for part, items in list(ordered.items())[1:]:
        if repeated := sum(item.key in trained for item in items):
            reporter.warn(
                f"{repeated:,} of {counted(len(items), f'{PART_ADJECTIVES[part]} {name}')} also occur in the training data, "
                "so the scores will be too optimistic"
            )
    return ordered


_PURPOSES = {"train": "for training", "heldout": "held out", "test": "for testing"}


def _read(data: ChatSection, sources: Sequence[str]) -> list[Conversation]:
    record_format = ConversationFormat(
        errors=data.errors, layout=data.layout, messages=data.messages, prompt=data.prompt, response=data.response
    )
    conversations = list(read_conversations(sources, record_format))
    if not conversations:
        raise InputError("there are no conversations", where=describe(sources))
    return conversations


def _report_lengths(recipe: Recipe, prepared: PreparedChat, parts: ConversationParts, reporter: Reporter) -> None:
    """Report the number of sequences, the number of training targets, and the conversations that do not fit into the context."""
    packed, places = _packed(recipe, prepared), [item.where for item in parts.conversations["train"]]
    reporter.note(
        f"{counted(len(packed.rows), 'sequence')} of up to {recipe.model.context_length} tokens; "
        f"{packed.learned:,} of {packed.tokens:,} tokens are training targets ({packed.learned / packed.tokens:.0%})"
    )
    if packed.cut:
        reporter.note(
            f"dropped the beginning of {counted(len(packed.cut), 'conversation')} longer than the context "
            f"({listed_places(packed.cut, places)})"
        )
    if packed.skipped:
        reporter.warn(
            f"skipped {counted(len(packed.skipped), 'conversation')} whose last answer is longer than the context "
            f"({listed_places(packed.skipped, places)})"
        )


def listed_places(indexes: Sequence[int], places: Sequence[str]) -> str:
    """Return the locations of the first few of these conversations."""
    shown = ", ".join(places[index] for index in indexes[:_MAX_NAMED])
    return shown if len(indexes) <= _MAX_NAMED else f"{shown} and {len(indexes) - _MAX_NAMED} more"


def counted(number: int, name: str) -> str:
    """Return a number with the singular or plural of a name."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"
