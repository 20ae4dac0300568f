"""Conversations are read from all record layouts, and errors include the line number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conversations import additions, exchange

from tinylm.errors import InputError
from tinylm.text.conversations import ASSISTANT, USER, Conversation, ConversationFormat, Message, choose, read_conversations

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def read(path: Path, *records: Any, name: str = "a.jsonl", **options: Any) -> list[Conversation]:
    file = path / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(read_conversations([str(file)], ConversationFormat(**options)))


def messages(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_all_layouts_produce_the_same_conversation(tmp_path: Path) -> None:
    expected = (Message(USER, "a\n\nx"), Message(ASSISTANT, "b"))
    [plain] = read(tmp_path, messages((USER, "a\n\nx"), (ASSISTANT, "b")))
    [named] = read(tmp_path, {"chat": messages((USER, "a\n\nx"), (ASSISTANT, "b"))["messages"]}, messages="chat")
    [pair] = read(tmp_path, {"q": "a\n\nx", "a": "b"}, layout="prompt_response", prompt="q", response="a")
    [alpaca] = read(tmp_path, {"instruction": "a", "input": "x", "output": "b"}, layout="alpaca")
    assert {item.messages for item in (plain, named, pair, alpaca)} == {expected}
    assert plain.where == f"{tmp_path / 'a.jsonl'}:1"
    [without_input] = read(tmp_path, {"instruction": "a", "output": "b"}, layout="alpaca")
    assert without_input.messages[0].content == "a"


def test_a_table_has_one_question_and_answer_per_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,response\nhi,hello\n")
    [item] = read_conversations([str(tmp_path / "a.csv")], ConversationFormat(layout="prompt_response"))
    assert [message.content for message in item.messages] == ["hi", "hello"]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (messages((USER, "a"), (ASSISTANT, "")), "message 2: the content of the assistant message is empty"),
        (messages((USER, "a"), (ASSISTANT, " \n")), "message 2: the content of the assistant message is empty"),
        (messages((USER, ""), (ASSISTANT, "b")), "message 1: the content of the user message is empty"),
        ({"messages": [{"content": "a"}]}, "message 1: has no role (its keys are content)"),
        ({"messages": [{"role": "user"}]}, "message 1: has no content (its keys are role)"),
        (messages(("human", "a")), "message 1: unknown role 'human' (the roles are system, user, assistant)"),
        (messages((["user"], "a")), "message 1: unknown role ['user']"),
        (messages((USER, "a"), ("tool", "b")), "message 2: unknown role 'tool' (tools are not supported)"),
        (messages(("system", "a")), "there is only a system message"),
        (messages((ASSISTANT, "a")), "message 1: must have the role user, not assistant"),
        (messages((USER, "a"), (USER, "b")), "message 2: must have the role assistant, not user"),
        (messages((USER, "a"), (ASSISTANT, "b"), (ASSISTANT, "c")), "message 3: must have the role user, not assistant"),
        (messages((USER, "a"), ("system", "b")), "message 2: must have the role assistant, not system"),
        (messages(("system", "s"), ("system", "b")), "message 2: must have the role user, not system"),
        (messages((USER, "a"), (ASSISTANT, "b"), (USER, "c")), "the last message must have the role assistant, not user"),
        ({"messages": []}, "there are no messages"),
        ({"messages": "hi"}, "messages must be a list of {role, content}, not 'hi'"),
        ({"messages": ["hi"]}, "message 1: must be an object with role and content, not 'hi'"),
        (messages((USER, 3)), "message 1: field 'content' must be text, not 3"),
        (messages((USER, None)), "message 1: field 'content' must be text, not null"),
        (messages((USER, [{"type": "image_url"}])), "message 1: content must be text; images, audio and files are not supported"),
        (messages((USER, "\ud800"), (ASSISTANT, "b")), "message 1: field 'content' contains an unpaired surrogate"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "message 1: tool_calls is not supported"),
        ({"messages": [{"role": "user", "content": "a", "weight": 0}]}, "message 1: weight is not supported"),
        ({"conversations": []}, "no field 'messages'; fields: conversations"),
        (["a"], "not a JSON object"),
        (3, "not a JSON object"),
    ],
)
def test_an_invalid_record_is_reported_with_its_line_number(tmp_path: Path, record: Any, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, GOOD, GOOD, record)
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}:3: {problem}"), str(caught.value)


def test_other_file_types_and_invalid_json_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(InputError, match=r"a\.txt: not a file with conversations"):
        list(read_conversations([str(tmp_path / "a.txt")], ConversationFormat()))
    (tmp_path / "b.jsonl").write_text(json.dumps(GOOD) + '\n{"messages": [\n')
    with pytest.raises(InputError, match=r"b\.jsonl:2: not JSON"):
        list(read_conversations([str(tmp_path / "b.jsonl")], ConversationFormat()))


def test_surrogates_are_replaced_on_request(tmp_path: Path) -> None:
    [item] = read(tmp_path, messages((USER, "a\ud800"), (ASSISTANT, "b")), errors="replace")
    assert item.messages[0].content == "a\ufffd"


def test_equal_conversations_are_in_the_same_split_and_no_split_is_empty() -> None:
    conversations = [Conversation(tuple(messages)) for messages in additions(20)]
    repeated = [*conversations, *[Conversation(tuple(exchange("again", "yes")))] * 5]
    parts = choose(repeated, {"heldout": 0.1, "test": 0.04})
    assert sum(map(len, parts.values())) == 25
    keys = [{item.key for item in items} for items in parts.values()]
    assert not keys[0] & keys[1] | keys[0] & keys[2] | keys[1] & keys[2]
    assert all(parts.values())
    assert choose(repeated, {"heldout": 0.1, "test": 0.04}) == parts
