"""Conversations: the `data:` sections of the formats `chat` and `preferences`, and the `dpo` objective."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Tag

from tinylm.recipe.base import DataVariant, ObjectiveVariant, Section
from tinylm.recipe.values import Flag, OpenShare, Positive, Sources


class ConversationShare(Section):
    """Set aside a share of the conversations, chosen by a hash of their text. Equal conversations stay together."""

    share: OpenShare = 0.1
    """The share of the conversations."""


class ConversationSources(Section):
    """Conversations in separate files."""

    sources: Sources
    """The conversations. The short form `heldout: b.jsonl` is equivalent."""


def _expand(value: object) -> object:
    if isinstance(value, (str, list, tuple)):
        return {"sources": value}
    return {"share": value} if isinstance(value, float) else value


def _choose(value: object) -> str:
    if value is None:
        return "none"
    return "sources" if isinstance(value, ConversationSources) or (isinstance(value, dict) and "sources" in value) else "share"


_SHARE = Annotated[ConversationShare, Tag("share")]
_SOURCES = Annotated[ConversationSources, Tag("sources")]
ConversationPart = Annotated[_SHARE | _SOURCES, Discriminator(_choose), BeforeValidator(_expand)]
OptionalConversationPart = Annotated[
    _SHARE | _SOURCES | Annotated[None, Tag("none")], Discriminator(_choose), BeforeValidator(_expand)
]


class UnusedShare(Section):
    """The part of the mixed-in text that is excluded from training."""

    share: OpenShare = 0.1
    """The share to exclude: of the characters with `by: tail`, or of the documents with `by: document`."""
    by: Literal["document", "tail"] = "tail"
    """How the excluded text is chosen, as in `data.heldout` of the run that was trained on this text."""


class MixSection(Section):
    """Mix sequences of plain text into training to reduce forgetting. The short form `mix: {SOURCE: SHARE}` is equivalent."""

    text: Sources
    """The text, usually the one that the model was pretrained on."""
    share: OpenShare = 0.2
    """The share of training sequences that are plain text. The loss includes every token in these sequences."""
    heldout: UnusedShare = UnusedShare()
    """The part of the text that is excluded from training, so that it can still measure forgetting."""


def _expand_mix(value: object) -> object:
    if isinstance(value, dict) and len(value) == 1:
        [(source, share)] = value.items()
        if source not in MixSection.model_fields and isinstance(share, (int, float)) and not isinstance(share, bool):
            return {"text": source, "share": share}
    return value


class ChatSection(DataVariant):
    """Conversations: .jsonl or .parquet files with one conversation per record, or tables with one question and answer per row.

    A conversation is an optional system message followed by alternating user and assistant messages. The control tokens <|system|>,
    <|user|>, <|assistant|> and <|end_of_turn|> are added to the tokenizer.
    """

    default_objective = "causal_lm"

    train: Sources
    """The conversations to train on."""
    heldout: ConversationPart = ConversationShare()
    """The conversations to evaluate on: a share of the conversations, or another SOURCE."""
    test: OptionalConversationPart = None
    """Conversations that training never uses, not even to choose the best checkpoint: a share, or another SOURCE. `tinylm eval
    --split test` evaluates on them. `null` means none."""
    layout: Literal["messages", "prompt_response", "alpaca"] = "messages"
    """The fields of a record. `messages`: a list of `{role, content}`. `prompt_response`: a question and an answer. `alpaca`:
    `instruction`, an optional `input`, and `output`."""
    messages: str = "messages"
    """With `layout: messages`, the field that contains the list of messages."""
    prompt: str = "prompt"
    """With `layout: prompt_response`, the field or column that contains the question."""
    response: str = "response"
    """With `layout: prompt_response`, the field or column that contains the answer."""
    packing: Flag = True
    """Pack several conversations into one sequence. Attention does not cross conversations, so packing does not change the loss."""
    mix: Annotated[MixSection | None, BeforeValidator(_expand_mix)] = None
    """Plain text to mix into training. `null` means none."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8. `strict` reports an error, and `replace` substitutes U+FFFD."""
    format: Literal["chat"] = "chat"
    """What the sources contain: `chat` means conversations."""

    def sources(self) -> dict[str, tuple[str, ...]]:
        others = {"heldout": self.heldout, "test": self.test}
        found = {
            "train": self.train,
            **{key: part.sources for key, part in others.items() if isinstance(part, ConversationSources)},
        }
        return found if self.mix is None else {**found, "mix": self.mix.text}

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield each problem that involves several keys of this section, as (key, message)."""
        used = {"messages": ("messages",), "prompt_response": ("prompt", "response"), "alpaca": ()}
        for layout, keys in used.items():
            for key in keys:
                if layout != self.layout and getattr(self, key) != type(self).model_fields[key].default:
                    yield key, f"has no effect with layout: {self.layout} (remove the key, or set layout: {layout})"
        shares = [part.share for part in (self.heldout, self.test) if isinstance(part, ConversationShare)]
        if sum(shares) >= 1:
            yield "test", f"the held-out share {shares[0]:g} and the test share {shares[1]:g} leave no conversations for training"


class PreferencesSection(DataVariant):
    """Preferences: .jsonl or .parquet files whose records contain a prompt, a better answer and a worse answer.

    The fields are `prompt` (a user message), `chosen` and `rejected`. Instead of `prompt`, a record can have `messages`, which is a
    conversation that ends with a user message.
    """

    default_objective = "dpo"

    train: Sources
    """The preferences to train on."""
    heldout: ConversationPart = ConversationShare()
    """The preferences to evaluate on: a share, chosen by a hash of the prompt, or another SOURCE."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8. `strict` reports an error, and `replace` substitutes U+FFFD."""
    format: Literal["preferences"] = "preferences"
    """What the sources contain: `preferences` means prompts with a chosen and a rejected answer."""

    def sources(self) -> dict[str, tuple[str, ...]]:
        heldout = {"heldout": self.heldout.sources} if isinstance(self.heldout, ConversationSources) else {}
        return {"train": self.train, **heldout}


class DPOObjective(ObjectiveVariant):
    """Direct preference optimization (Rafailov et al. 2023): raise the probability of chosen answers relative to rejected ones.

    Both probabilities are compared with those of the reference model, which is the run in `model.init_from`.
    """

    architectures = ("decoder",)
    data_formats = ("preferences",)

    name: Literal["dpo"] = "dpo"
    beta: Positive = 0.1
    """The reward of an answer is `beta` times the logarithm of its probability under the model divided by that under the reference
    model. A smaller value lets the model move further away from the reference model."""
