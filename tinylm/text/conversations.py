"""Read and validate conversations: an optional system message, then alternating messages from the user and the assistant."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

from tinylm.errors import InputError
from tinylm.recipe.values import has_surrogates, show
from tinylm.text.records import RecordFormat
from tinylm.text.sources import Corpus

SYSTEM, USER, ASSISTANT = ROLES = ("system", "user", "assistant")
_UNSUPPORTED_KEYS = ("tool_calls", "function_call", "tool_call_id", "weight")
"""Message keys that are rejected, because ignoring them would change the meaning of the message."""
ContentOf = Callable[[Mapping[str, object], str], str]
"""Takes a message and its location, and returns the content of the message."""
_HINT = "choose the fields with data.layout, data.messages, data.prompt and data.response"


@dataclass(frozen=True, slots=True)
class Message:
    """A message in a conversation."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A valid conversation, and the location that it was read from, such as `a.jsonl:3`."""

    messages: tuple[Message, ...]
    where: str = ""

    @property
    def key(self) -> bytes:
        """A hash of the messages."""
        return hashlib.sha256(json.dumps([message.as_dict() for message in self.messages]).encode()).digest()


@dataclass(frozen=True, slots=True)
class Preference:
    """A conversation that ends with a user message, two answers to it, and the location that it was read from."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    where: str = ""

    @property
    def conversations(self) -> tuple[Conversation, Conversation]:
        """The conversations with the chosen and with the rejected answer."""
        chosen, rejected = (Conversation((*self.prompt, answer), self.where) for answer in (self.chosen, self.rejected))
        return chosen, rejected

    @property
    def key(self) -> bytes:
        """A hash of the prompt, so that the same prompt is never in two splits."""
        return Conversation(self.prompt).key


class Keyed(Protocol):
    """An example with a hash. Examples with the same hash are in the same split."""

    @property
    def key(self) -> bytes: ...


Item = TypeVar("Item", bound=Keyed)


@dataclass(frozen=True)
class ConversationFormat(RecordFormat):
    """Converts a record to JSON text that contains a valid conversation and its location. The attributes are keys of `data:`."""

    layout: str = "messages"
    messages: str = "messages"
    prompt: str = "prompt"
    response: str = "response"

    @property
    def is_default(self) -> bool:
        return True  # `read_conversations` rejects plain files

    @property
    def _hint(self) -> str:
        return _HINT

    @cached_property
    def fields(self) -> list[str]:
        if self.layout == "alpaca":
            return ["instruction", "input", "output"]
        return [self.messages] if self.layout == "messages" else list(dict.fromkeys((self.prompt, self.response)))

    def text(self, record: object, where: str) -> str:
        if not isinstance(record, Mapping):
            raise InputError("not a JSON object", where=where)
        if self.layout == "alpaca" and record.get("input") is None:
            record = {**record, "input": ""}
        for name in self.fields:
            if name not in record:
                raise InputError(f"no field {name!r}; fields: {', '.join(map(str, record))}", where=where, hint=_HINT)
        messages = parse_messages(self._messages(record, where), where, self._content)
        check_turns(messages, where, answered=True)
        return json.dumps({"where": where, "messages": [message.as_dict() for message in messages]})

    def _messages(self, record: Mapping[str, object], where: str) -> object:
        if self.layout == "messages":
            return record[self.messages]
        if self.layout == "prompt_response":
            question, answer = self._value(record, self.prompt, where), self._value(record, self.response, where)
        else:
            instruction, details, answer = (self._value(record, name, where) for name in self.fields)
            question = f"{instruction}\n\n{details}" if details.strip() else instruction
        return [{"role": USER, "content": question}, {"role": ASSISTANT, "content": answer}]

    def _content(self, message: Mapping[str, object], where: str) -> str:
        return text_content(message, where) if isinstance(message["content"], list) else self._value(message, "content", where)


@dataclass(frozen=True)
class PreferenceFormat(ConversationFormat):
    """Converts a record to JSON text that contains a valid preference and its location."""

    @cached_property
    def fields(self) -> list[str]:
        return ["chosen", "rejected"]

    @property
    def _hint(self) -> str:
        return "a record has the fields prompt or messages, chosen and rejected"

    def text(self, record: object, where: str) -> str:
        if not isinstance(record, Mapping):
            raise InputError("not a JSON object", where=where)
        question = "messages" if "messages" in record else "prompt"
        for name in (question, *self.fields):
            if name not in record:
                raise InputError(f"no field {name!r}; fields: {', '.join(map(str, record))}", where=where, hint=self._hint)
        prompt = self._parse(record, question, USER, where)
        check_turns(prompt, where, answered=False)
        answers: list[Message] = []
        for name in self.fields:
            answer = self._parse(record, name, ASSISTANT, f"{where}: {name}")
            if [message.role for message in answer] != [ASSISTANT]:
                raise InputError("must be text, or a list with one assistant message", where=f"{where}: {name}")
            answers += answer
        if answers[0] == answers[1]:
            raise InputError("the chosen and the rejected answer are the same", where=where, hint="remove the record")
        messages = [message.as_dict() for message in (*prompt, *answers)]
        return json.dumps({"where": where, "messages": messages})

    def _parse(self, record: Mapping[str, object], name: str, role: str, where: str) -> tuple[Message, ...]:
        """Return the messages in a field, which is a list of messages or the text of one message with this role."""
        value = record[name]
        if not isinstance(value, list):
            text = self._value(record, name, where)
            if not text.strip():
                raise InputError(f"the {role} message is empty", where=where)
            return (Message(role, text),)
        return parse_messages(value, where, self._content)


def text_content(message: Mapping[str, object], where: str) -> str:
    """Return the content of a message. Raises `InputError` if the content is not text."""
    content = message["content"]
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if isinstance(content, list):
        kinds = sorted({str(part.get("type")) for part in content if isinstance(part, Mapping)} - {"text"})
        listed = f" (here: {', '.join(kinds)[:60]})" if kinds else ""
        raise InputError(f"content must be text; images, audio and files are not supported{listed}", where=where)
    if not isinstance(content, str):
        raise InputError(f"content must be text, not {show(content)}", where=where)
    if has_surrogates(content):
        raise InputError("content contains an unpaired surrogate", where=where)
    return content


def parse_messages(value: object, where: str, content_of: ContentOf = text_content) -> tuple[Message, ...]:
    """Parse a list of messages from JSON. `content_of` returns the content of a message.

    Raises `InputError` with the number of the first invalid message.
    """
    if not isinstance(value, list):
        raise InputError(f"messages must be a list of {{role, content}}, not {show(value)}", where=where)
    if not value:
        raise InputError("there are no messages", where=where)
    return tuple(_message(item, number, where, content_of) for number, item in enumerate(value, 1))


def _message(item: object, number: int, where: str, content_of: ContentOf) -> Message:
    place = f"{where}: message {number}"
    if not isinstance(item, Mapping):
        raise InputError(f"must be an object with role and content, not {show(item)}", where=place)
    for key in ("role", "content"):
        if key not in item:
            raise InputError(f"has no {key}", where=place, hint=f"its keys are {', '.join(map(str, item)) or 'none'}")
    role = item["role"]
    if role not in ROLES:
        hint = "tools are not supported" if role in ("tool", "function") else f"the roles are {', '.join(ROLES)}"
        raise InputError(f"unknown role {show(role)}", where=place, hint=hint)
    for key in _UNSUPPORTED_KEYS:
        if item.get(key) not in (None, []):
            raise InputError(f"{key} is not supported", where=place, hint="remove it")
    content = content_of(item, place)
    if not content.strip():
        raise InputError(f"the content of the {role} message is empty", where=place)
    return Message(role, content)


def check_turns(messages: Sequence[Message], where: str, *, answered: bool) -> None:
    """Check the order of the roles. The last message must be the assistant's if `answered` is true, and the user's otherwise.

    Raises `InputError` with the number of the first message that has the wrong role.
    """
    turns = messages[1:] if messages[0].role == SYSTEM else messages
    skipped = len(messages) - len(turns)
    if not turns:
        raise InputError("there is only a system message", where=where, hint="add a user message")
    for number, message in enumerate(turns):
        expected = (USER, ASSISTANT)[number % 2]
        if message.role != expected:
            place = f"{where}: message {number + skipped + 1}"
            hint = "after an optional system message, user and assistant take turns"
            raise InputError(f"must have the role {expected}, not {message.role}", where=place, hint=hint)
    last = ASSISTANT if answered else USER
    if turns[-1].role != last:
        problem = f"the last message must have the role {last}, not {turns[-1].role}"
        raise InputError(problem, where=where, hint="add the answer, or remove the last message" if answered else None)


def read_conversations(sources: Sequence[str], record_format: ConversationFormat) -> Iterator[Conversation]:
    """Yield the conversations in `sources` in order. Raises `InputError` with the line of the first invalid conversation."""
    for messages, where in _read(sources, record_format, "conversations", "use a .jsonl file with a field `messages`"):
        yield Conversation(messages, where)


def read_preferences(sources: Sequence[str], record_format: PreferenceFormat) -> Iterator[Preference]:
    """Yield the preferences in `sources` in order. Raises `InputError` with the line of the first invalid preference."""
    hint = "use a .jsonl file with the fields `prompt`, `chosen` and `rejected`"
    for messages, where in _read(sources, record_format, "preferences", hint):
        yield Preference(messages[:-2], messages[-2], messages[-1], where)


def _read(
    sources: Sequence[str], record_format: ConversationFormat, kind: str, hint: str
) -> Iterator[tuple[tuple[Message, ...], str]]:
    """Yield the messages and the location of each record."""
    with Corpus(sources, errors=record_format.errors, record_format=record_format) as corpus:
        for name, is_record, document in corpus.documents():
            if not is_record:
                raise InputError(f"not a file with {kind}", where=name, hint=hint)
            parsed = json.loads(document)
            yield tuple(Message(**message) for message in parsed["messages"]), parsed["where"]


def choose(conversations: Sequence[Item], shares: Mapping[str, float]) -> dict[str, list[Item]]:
    """Divide conversations or preferences into splits by their hash.

    `shares` maps the name of each split to its fraction of the conversations. The other conversations form the `train` split. Each
    split contains at least one conversation, and conversations with the same hash are in the same split.
    """
    groups: dict[bytes, list[int]] = {}
    for index, conversation in enumerate(conversations):
        groups.setdefault(conversation.key, []).append(index)
    ordered = iter(sorted(groups))
    parts: dict[str, list[int]] = {}
    for part, share in shares.items():
        chosen: list[int] = []
        while len(chosen) < max(1, round(share * len(conversations))):
            following = next(ordered, None)
            if following is None:
                break
            chosen += groups[following]
        parts[part] = chosen
    parts["train"] = [index for key in ordered for index in groups[key]]
    return {part: [conversations[index] for index in sorted(indexes)] for part, indexes in parts.items()}
