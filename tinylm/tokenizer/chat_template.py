"""The chat template converts a conversation to token ids, in the same way for training, chat, the server and exports.

A conversation consists of the end-of-text token and, for each message, the control token of its role, its text and the end-of-turn
token.
The ids are built from these pieces, so the text of a message is never encoded to a control token. Exports contain the same template
in Jinja, which renders the whole conversation as one text. In that text, a message that spells out a control token would be encoded
to the control token. Therefore, both versions insert a space after the first character of such a spelling (`< |user|>`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from tinylm.errors import InputError
from tinylm.text.conversations import ASSISTANT, ROLES, SYSTEM, Message
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.tokenizer.vocab_editing import EditedTokenizer, add

CHAT_TEMPLATE_FILE = "chat_template.json"
"""The file in a run folder that contains the template."""


@dataclass(frozen=True)
class ChatTemplate:
    """The control tokens of a conversation, by name."""

    system: str = "<|system|>"
    user: str = "<|user|>"
    assistant: str = "<|assistant|>"
    end_of_turn: str = "<|end_of_turn|>"

    @property
    def tokens(self) -> tuple[str, ...]:
        return (self.system, self.user, self.assistant, self.end_of_turn)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ChatTemplate:
        """Parse a template. Raises `InputError` if the text is not valid."""
        try:
            document = json.loads(text)
            if not isinstance(document, dict) or not all(isinstance(value, str) and value for value in document.values()):
                raise ValueError("it must be a JSON object whose values are non-empty strings")
            return cls(**document)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"not a chat template: {error}") from None


def add_control_tokens(tokenizer: Tokenizer, template: ChatTemplate = ChatTemplate()) -> EditedTokenizer:
    """Add the missing tokens of the template as control tokens.

    Raises `InputError` if one of them is already an ordinary token, because text could be encoded to it.
    """
    special = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special}
    missing = [token for token in template.tokens if token not in special]
    if not missing:
        return EditedTokenizer(tokenizer, [[id] for id in range(tokenizer.vocab_size)], [])
    for token in missing:
        if tokenizer.backend.token_to_id(token) is not None:
            problem = f"{token} is an ordinary token, so text could be encoded to it"
            raise InputError(problem, where="tokenizer", hint='set "special": true for this token under added_tokens')
    return add(tokenizer, missing, special=True)


@dataclass(frozen=True)
class Turn:
    """A message as token ids: the token of its role, the text, and the end-of-turn token."""

    role: str
    ids: list[int]

    @property
    def learned(self) -> list[bool]:
        """Whether each token is trained on: the assistant's text and end-of-turn token, but not its role token."""
        return [False] + [self.role == ASSISTANT] * (len(self.ids) - 1)


class ChatEncoder:
    """Encodes conversations with a template and a tokenizer. Raises `InputError` if the tokenizer lacks a token of the template."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.template, self.tokenizer = template, tokenizer
        ids = {token.content: id for id, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
        for token in template.tokens:
            if token not in ids:
                raise InputError(f"the tokenizer has no control token {token}", where="tokenizer")
        if tokenizer.end_of_text is None:
            raise InputError("the tokenizer has no end-of-text token", where="tokenizer", hint="add <|endoftext|> to it")
        names = (template.system, template.user, template.assistant)
        self._role_ids = {role: ids[name] for role, name in zip(ROLES, names, strict=True)}
        self.start = tokenizer.end_of_text
        """The id of the token before a conversation."""
        self.end_of_turn = ids[template.end_of_turn]
        self.added_ids = tuple(ids[token] for token in template.tokens)
        """The ids of the template's tokens."""
        self.stop_ids = (self.end_of_turn,)
        """The ids that end an answer, in addition to the end-of-text token."""

    @cached_property
    def control_tokens(self) -> list[str]:
        """The text of all control tokens of the tokenizer, longest first. `escape` rewrites them in messages.

        Raises `InputError` if one of them cannot be escaped with a space.
        """
        added = self.tokenizer.backend.get_added_tokens_decoder()
        names = {token.content for token in added.values() if token.special}
        names |= {str(self.tokenizer.backend.id_to_token(self.start))}
        short = sorted(name for name in names if len(name) < 2)
        if short:
            problem = f"the control token {short[0]!r} is a single character, so it cannot be escaped in a message"
            raise InputError(problem, where="tokenizer")
        unsafe = sorted(name for name in names if any(other in _escaped(name) for other in names))
        if unsafe:
            raise InputError(f"the control token {unsafe[0]!r} still contains a control token when escaped", where="tokenizer")
        return sorted(names, key=lambda name: (-len(name), name))

    def escape(self, text: str) -> str:
        """Insert a space after the first character of every control token in a text."""
        for name in self.control_tokens:
            text = text.replace(name, _escaped(name))
        return text

    def turn(self, message: Message) -> Turn:
        """Encode one message."""
        return Turn(
            message.role, [self._role_ids[message.role], *self.tokenizer.encode(self.escape(message.content)), self.end_of_turn]
        )

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        """Encode the messages of a conversation."""
        return [self.turn(message) for message in messages]

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Return the prompt ids for the assistant's next answer."""
        return [self.start, *(id for turn in turns for id in turn.ids), self._role_ids[ASSISTANT]]

    def jinja(self) -> str:
        """Return the template in Jinja, for `transformers` and llama.cpp. It renders a text that encodes to the same ids."""
        content = "message['content']" + "".join(
            f".replace({_quoted(name)}, {_quoted(_escaped(name))})" for name in self.control_tokens
        )
        start = str(self.tokenizer.backend.id_to_token(self.start))
        names = zip(ROLES, (self.template.system, self.template.user, self.template.assistant), strict=True)
        branches = "".join(
            f"{{%- {'if' if role == SYSTEM else 'elif'} message['role'] == '{role}' -%}}{{{{ {_quoted(name)} }}}}"
            for role, name in names
        )
        return (
            f"{{{{ {_quoted(start)} }}}}"
            "{%- for message in messages -%}"
            f"{branches}"
            "{%- else -%}{{ raise_exception('the roles are system, user and assistant') }}{%- endif -%}"
            f"{{{{ {content} }}}}{{{{ {_quoted(self.template.end_of_turn)} }}}}"
            "{%- endfor -%}"
            f"{{%- if add_generation_prompt -%}}{{{{ {_quoted(self.template.assistant)} }}}}{{%- endif -%}}"
        )


def _escaped(name: str) -> str:
    return f"{name[0]} {name[1:]}"


def _quoted(text: str) -> str:
    """Format a text as a Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def fit_turns(turns: Sequence[Turn], limit: int | None) -> tuple[list[Turn], int]:
    """Drop the oldest exchanges until at most `limit` tokens remain. Returns the remaining turns and the number of dropped turns.

    The last turn must be the user's. The last turn and the system message are kept even if they are longer than the limit.
    """
    system, rest = (turns[:1], turns[1:]) if turns and turns[0].role == SYSTEM else (turns[:0], turns)
    dropped = 0
    while limit is not None and len(rest) > 2 and sum(len(turn.ids) for turn in (*system, *rest)) > limit:
        rest, dropped = rest[2:], dropped + 2
    return [*system, *rest], dropped
