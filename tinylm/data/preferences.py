"""The `preferences` data format: pairs of conversations that differ only in the last answer, chosen and rejected.

The encoded conversations of a split alternate: conversation 2 i has the chosen answer of pair i, and conversation 2 i + 1 has the
rejected answer.

Legend: `T` tokens in the longest conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from tinylm.cost.examples import ExampleSize
from tinylm.data.chat import (
    ConversationParts,
    EncodedConversations,
    PreparedChat,
    counted,
    encode_parts,
    fit,
    listed_places,
    no_fitting_conversation,
    open_chat,
    prepare_tokenizer,
    read_splits,
)
from tinylm.data.datasets import Dataset, Examples
from tinylm.data.framing import PADDING
from tinylm.data.order import epoch_key, permute
from tinylm.errors import InputError
from tinylm.recipe import Recipe
from tinylm.recipe.chat import PreferencesSection
from tinylm.reporting import Reporter
from tinylm.text.conversations import Preference, PreferenceFormat, read_preferences
from tinylm.text.sources import describe
from tinylm.tokenizer import Tokenizer

CONTEXT, ANSWER = 0, 1
"""The segment numbers of tokens that are only context, and of those whose probability is the probability of the answer."""
Pair = tuple[np.ndarray, np.ndarray]
"""The chosen and the rejected conversation, each int64 (2, length): token ids and segment numbers."""


def fit_pair(conversations: EncodedConversations, index: int, context_length: int) -> Pair | None:
    """Frame a pair, and truncate the shared prompt as for a conversation with the longer answer.

    Return None if that answer does not fit. Only the text and the end-of-turn token of the last answers are marked as `ANSWER`.
    """
    chosen, rejected = conversations[2 * index], conversations[2 * index + 1]
    longer = max(chosen, rejected, key=lambda turns: len(turns[-1].ids))
    fitted = fit(longer, conversations.shard.end_of_text, context_length)
    if fitted is None:
        return None
    prompt = fitted.ids[: len(fitted.ids) - len(longer[-1].ids)].tolist()
    first, second = (
        np.array([[*prompt, *answer.ids], [CONTEXT] * len(prompt) + [ANSWER if flag else CONTEXT for flag in answer.learned]])
        for answer in (chosen[-1], rejected[-1])
    )
    return first, second


def rows(pairs: Sequence[Pair], width: int) -> Examples:
    """Return `tokens` and `segments` (pairs, 2 T) for T = `width`. A row contains both conversations, each padded to T tokens."""
    padded = np.full((len(pairs), 2, 2, width), PADDING, dtype=np.int64)  # pair, side, tokens or segments, position
    for row, pair in enumerate(pairs):
        for side, conversation in enumerate(pair):
            padded[row, side, :, : conversation.shape[1]] = conversation
    return {"tokens": padded[:, :, 0].reshape(len(pairs), -1), "segments": padded[:, :, 1].reshape(len(pairs), -1)}


class PreferencePairs:
    """A dataset with one pair per example (see `rows`), in a different order in each epoch.

    Raises `InputError` if no pair fits into the context.
    """

    def __init__(self, conversations: EncodedConversations, context_length: int, seed: int = 0) -> None:
        self._seed = seed
        self.skipped: list[int] = []
        """The indexes of the pairs with an answer that does not fit into the context."""
        self.pairs: list[Pair] = []
        for index in range(len(conversations) // 2):
            pair = fit_pair(conversations, index, context_length)
            if pair is None:
                self.skipped.append(index)
            else:
                self.pairs.append(pair)
        if not self.pairs:
            raise no_fitting_conversation(context_length)
        self.lengths = [max(side.shape[1] for side in pair) for pair in self.pairs]
        self.examples_per_epoch = len(self.pairs)
        self.tokens_per_example = sum(side.shape[1] for pair in self.pairs for side in pair) / len(self.pairs)

    @property
    def example_size(self) -> ExampleSize:
        positions = 2 * max(self.lengths)
        return ExampleSize(self.tokens_per_example, positions, positions)

    def examples(self, start: int, count: int) -> Examples:
        """Return the pairs at positions [start, start + count)."""
        chosen = []
        for position in range(start, start + count):
            epoch, within = divmod(position, len(self.pairs))
            chosen.append(self.pairs[permute(np.array([within]), len(self.pairs), epoch_key(self._seed, epoch))[0]])
        return rows(chosen, max(self.lengths))


class PreferencesFormat:
    """The data format for prompts with a chosen and a rejected answer."""

    def prepare(self, recipe: Recipe, reporter: Reporter, workers: int) -> PreparedChat:
        data = recipe.data
        assert isinstance(data, PreferencesSection)
        splits = read_splits(data, partial(_read, data), "preference", reporter)
        parts = ConversationParts({part: [side for item in items for side in item.conversations] for part, items in splits.items()})
        tokenizer = prepare_tokenizer(parts, recipe, reporter)
        prepared = open_chat(*encode_parts(data.format, parts, tokenizer, reporter), tokenizer)
        skipped = PreferencePairs(prepared.train, recipe.model.context_length).skipped
        if skipped:
            places = listed_places(skipped, [item.where for item in splits["train"]])
            reporter.warn(
                f"skipped {counted(len(skipped), 'preference')} with an answer that is longer than the context ({places})"
            )
        return prepared

    def open(self, recipe: Recipe, folder: Path, fingerprint: str, tokenizer_json: str) -> PreparedChat:
        return open_chat(folder, fingerprint, Tokenizer.from_text(tokenizer_json))

    def dataset(self, recipe: Recipe, prepared: PreparedChat) -> Dataset:
        return PreferencePairs(prepared.train, recipe.model.context_length, recipe.seed)


def _read(data: PreferencesSection, sources: Sequence[str]) -> list[Preference]:
    preferences = list(read_preferences(sources, PreferenceFormat(errors=data.errors)))
    if not preferences:
        raise InputError("there are no preferences", where=describe(sources))
    return preferences
