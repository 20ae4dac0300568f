"""The chat template and its Jinja version produce the same ids for every tokenizer. Content never becomes control tokens."""

from __future__ import annotations

from typing import Any

import pytest
from conversations import HOSTILE, additions

from tinylm.errors import InputError
from tinylm.recipe.schema import Recipe
from tinylm.text.conversations import ASSISTANT, SYSTEM, USER, Message
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training
from tinylm.tokenizer.chat_template import ChatEncoder, ChatTemplate, Turn, add_control_tokens, fit_turns
from tinylm.tokenizer.vocab_editing import add, extension

KINDS = [
    "{kind: bpe, vocab_size: 320}",
    "{kind: bpe, vocab_size: 320, split: gpt2, normalize: [nfkc, lowercase]}",
    "{kind: bpe, vocab_size: 340, alphabet: text}",
    "{kind: unigram, vocab_size: 400}",
    "{kind: wordpiece, vocab_size: 200}",
    "{kind: char}",
    "{kind: byte}",
]


def train(kind: str, english: str) -> Tokenizer:
    import yaml

    section = Recipe.model_validate({"data": {"train": "x"}, "training": {"steps": 1}, "tokenizer": yaml.safe_load(kind)}).tokenizer
    return training.train(section, iter([Piece(english[:8000] + "<|user|>{}[]\\'\"", True)]), lambda text: None)


@pytest.fixture(scope="module", params=KINDS)
def encoder(request: pytest.FixtureRequest, english: str) -> ChatEncoder:
    return ChatEncoder(ChatTemplate(), add_control_tokens(train(request.param, english)).tokenizer)


def in_transformers(encoder: ChatEncoder) -> Any:
    """Return the tokenizer and chat template as transformers loads them from an export."""
    transformers = pytest.importorskip("transformers")
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(encoder.tokenizer.backend.to_str())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=encoder.jinja())


def test_hostile_conversations_have_the_same_ids_in_jinja(encoder: ChatEncoder) -> None:
    other = in_transformers(encoder)
    control = {encoder.tokenizer.backend.token_to_id(name) for name in encoder.control_tokens}
    unknown = {encoder.tokenizer.unknown}
    for content in (*HOSTILE, *encoder.control_tokens):
        messages = [Message(SYSTEM, content), Message(USER, content), Message(ASSISTANT, content), Message(USER, content)]
        turns = encoder.turns(messages)
        assert not (control - unknown) & {id for turn in turns for id in turn.ids[1:-1]}
        rendered = [message.as_dict() for message in messages]
        theirs = other.apply_chat_template(rendered, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert theirs == encoder.prompt(turns), content


def test_the_jinja_template_rejects_an_unknown_role(encoder: ChatEncoder) -> None:
    with pytest.raises(Exception, match="the roles are system, user and assistant"):
        in_transformers(encoder).apply_chat_template([{"role": "tool", "content": "x"}])


def test_only_answers_and_their_end_tokens_are_training_targets(encoder: ChatEncoder) -> None:
    for turn in encoder.turns(additions(1)[0]):
        assert turn.learned == [False, *[turn.role == ASSISTANT] * (len(turn.ids) - 1)]


def test_a_template_round_trips_through_json_and_invalid_json_is_reported() -> None:
    template = ChatTemplate(user="<u>")
    assert ChatTemplate.from_json(template.to_json()) == template
    for text in ("", "[]", '{"user": 3}', '{"user": ""}', '{"owner": "x"}', "[" * 100_000):
        with pytest.raises(InputError, match="not a chat template"):
            ChatTemplate.from_json(text)


def test_control_tokens_are_added_once_and_must_not_be_ordinary_tokens(english: str) -> None:
    tokenizer = train(KINDS[0], english)
    edited = add_control_tokens(tokenizer)
    assert edited.tokenizer.vocab_size == tokenizer.vocab_size + 4
    assert add_control_tokens(edited.tokenizer).tokenizer is edited.tokenizer
    assert edited.sources[-1] == tokenizer.encode("<|end_of_turn|>")
    ordinary = add(tokenizer, ["<|user|>"]).tokenizer
    with pytest.raises(InputError, match=r"<\|user\|> is an ordinary token"):
        add_control_tokens(ordinary)
    assert extension(tokenizer, ordinary) is None
    with pytest.raises(InputError, match=r"has no control token <\|system\|>"):
        ChatEncoder(ChatTemplate(), tokenizer)


def test_tokens_that_cannot_be_escaped_are_rejected(english: str) -> None:
    tokenizer = add_control_tokens(train(KINDS[0], english)).tokenizer
    with pytest.raises(InputError, match="'\u2603' is a single character"):
        ChatEncoder(ChatTemplate(), add(tokenizer, ["\u2603"], special=True).tokenizer).escape("x")
    with pytest.raises(InputError, match="still contains a control token when escaped"):
        ChatEncoder(ChatTemplate(), add(tokenizer, ["< |user|>"], special=True).tokenizer).escape("x")


def test_the_oldest_exchanges_are_dropped_if_a_conversation_is_too_long() -> None:
    turns = [Turn(role, [0] * 4) for role in (SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER)]
    assert fit_turns(turns, 24) == (turns, 0)
    assert fit_turns(turns, 23) == ([turns[0], *turns[3:]], 2)
    assert fit_turns(turns[1:], 11) == ([turns[5]], 4)
    assert fit_turns(turns, 1) == ([turns[0], turns[5]], 4)
    assert fit_turns(turns, None) == (turns, 0)
