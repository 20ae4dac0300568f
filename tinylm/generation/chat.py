"""Chat with a model that was trained on conversations: build prompts that fit into the context, and generate answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from tinylm.errors import InputError
from tinylm.generation.engine import Request, Sample, generate_batch, sample_seed
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.decoder import as_decoder
from tinylm.model.state import DecodingModel
from tinylm.text.conversations import ASSISTANT, SYSTEM, USER, Message
from tinylm.tokenizer.chat_template import ChatEncoder, fit_turns

_RESERVED_DIVISOR = 4
"""Up to 1 / `_RESERVED_DIVISOR` of the context is reserved for the answer."""


@dataclass(frozen=True)
class ChatPrompt:
    """The token ids of a conversation that was truncated to fit into the context."""

    ids: list[int]
    left_out: int
    """Number of messages that were dropped from the beginning of the conversation."""
    new_tokens: int
    """Maximum number of tokens in the answer."""


def chat_prompt(messages: Sequence[Message], encoder: ChatEncoder, capacity: int | None, max_new_tokens: int) -> ChatPrompt:
    """Encode a conversation that ends with a user message. Drop the oldest exchanges if the conversation does not fit.

    `capacity` is the context length. Space is reserved for an answer of `max_new_tokens` tokens, but no more than a quarter of the
    context. Raises `InputError` if the system message and the last message leave no room for an answer.
    """
    turns = encoder.turns(messages)
    if capacity is None:
        return ChatPrompt(encoder.prompt(turns), 0, max_new_tokens)
    reserved = max(1, min(max_new_tokens, capacity // _RESERVED_DIVISOR))
    frame = len(encoder.prompt(()))
    kept, left_out = fit_turns(turns, capacity - reserved - frame)
    ids = encoder.prompt(kept)
    room = capacity - len(ids) + 1  # the last token of an answer is not fed back to the model
    if room < 1:
        problem = f"the message has {len(ids):,} tokens with its control tokens, but the model's context has only {capacity:,}"
        raise InputError(problem, hint="write a shorter message")
    return ChatPrompt(ids, left_out, min(max_new_tokens, room))


@dataclass
class ChatSession:
    """A conversation with a model. Each answer depends only on the seed, the previous messages and the turn number."""

    decoder: DecodingModel[Any]
    encoder: ChatEncoder
    options: SamplingOptions
    seed: int = 0
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    """The conversation so far, without the system message."""

    @property
    def conversation(self) -> list[Message]:
        """The conversation so far, including the system message."""
        system = [] if self.system is None else [Message(SYSTEM, self.system)]
        return [*system, *self.messages]

    def reset(self) -> None:
        """Forget all messages except the system message."""
        self.messages = []

    def ask(self, text: str, on_text: Callable[[str], None] | None = None) -> tuple[Sample, ChatPrompt]:
        """Generate the answer to a user message, and add both to the conversation. `on_text` streams the answer.

        Raises `InputError` and leaves the conversation unchanged if the message does not fit into the context.
        """
        asked = [*self.conversation, Message(USER, text)]
        prompt = chat_prompt(asked, self.encoder, self.decoder.capacity, self.options.max_new_tokens)
        options = replace(self.options, max_new_tokens=prompt.new_tokens, stop_ids=self.encoder.stop_ids)
        seed = sample_seed(self.seed, len(self.messages))
        request = Request(text, options, seed, on_text=on_text, ids=prompt.ids)
        sample = next(generate_batch(self.decoder, self.encoder.tokenizer, [request]))
        self.messages += [Message(USER, text), Message(ASSISTANT, sample.text)]
        return sample, prompt


def answer_all(
    model: nn.Module | DecodingModel[Any],
    encoder: ChatEncoder,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions = SamplingOptions(temperature=0.0, top_k=None),
) -> Iterator[Sample]:
    """Generate one answer for each prompt, in order. An answer ends when the context is full."""
    decoder = as_decoder(model)
    requests = []
    for ids in prompts:
        room = options.max_new_tokens if decoder.capacity is None else max(0, decoder.capacity - len(ids) + 1)
        limited = replace(options, max_new_tokens=min(options.max_new_tokens, room), stop_ids=encoder.stop_ids)
        requests.append(Request("", limited, ids=ids))
    yield from generate_batch(decoder, encoder.tokenizer, requests)
