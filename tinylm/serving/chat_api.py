"""Validate the request bodies for OpenAI's `/v1/chat/completions`. The sampling keys are the same as for `/v1/completions`."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any

from pydantic import Field

from tinylm.errors import InputError
from tinylm.generation.engine import Request, sample_seed
from tinylm.generation.option_ranges import MAX_LOGPROBS
from tinylm.serving.api import (
    MAX_CHOICES,
    CompletionRequest,
    ParsedRequest,
    RequestBody,
    RequestError,
    ServedModel,
    StreamOptions,
    parse_body,
    sampling_options,
)
from tinylm.text.conversations import Message, check_turns, parse_messages

MAX_MESSAGES = 1000
_UNSUPPORTED = {
    "tools": "tools are not supported",
    "tool_choice": "tools are not supported",
    "functions": "tools are not supported",
    "function_call": "tools are not supported",
    "audio": "audio is not supported",
    "modalities": "only text is supported",
    "response_format": "only {'type': 'text'} is supported",
    "prompt": "send a prompt to /v1/completions, or messages to this route",
}
"""Keys that cannot be ignored, with the reasons for rejecting them."""


class ChatRequest(RequestBody):
    """The JSON body of a chat request. The defaults match OpenAI's."""

    model: str | None = None
    messages: list[Any]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stop: str | list[str] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    user: str | None = None
    """Accepted for compatibility and ignored."""
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    response_format: Any = None
    """Must be {"type": "text"}."""
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    prompt: Any = None


def parse_chat_request(data: bytes, served: ServedModel, max_tokens: int) -> ParsedRequest:
    """Parse and validate the body of a chat request. Raises `RequestError` with status 400 or 404.

    Without `max_tokens`, an answer can fill the rest of the context, up to the server's limit.
    """
    body = parse_body(data, ChatRequest, served.name)
    _check(body)
    ids, room = _prompt(body, served)
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if limit is not None and limit > max_tokens:
        raise RequestError(400, f"max_tokens: must be at most {max_tokens}", "max_tokens")
    new_tokens = min(max_tokens if limit is None else limit, max_tokens if room is None else room)
    completion = _as_completion(body, new_tokens)
    assert served.chat is not None
    try:
        options = sampling_options(completion, served.tokenizer, stop_ids=served.chat.stop_ids)
    except InputError as error:
        raise RequestError.of(error) from None
    seed = body.seed % 2**63 if body.seed is not None else secrets.randbelow(2**31)
    requests = [(Request("", options, sample_seed(seed, index)), ids) for index in range(body.n)]
    id = f"chatcmpl-{secrets.token_hex(12)}"
    return ParsedRequest(completion, requests, len(ids), id, int(time.time()), served.name, chat=True)


def _check(body: ChatRequest) -> None:
    for key, reason in _UNSUPPORTED.items():
        value = getattr(body, key)
        harmless = key == "response_format" and isinstance(value, dict) and value.get("type") == "text"
        harmless |= (key == "tool_choice" and value == "none") or (key == "modalities" and value == ["text"])
        if value not in (None, []) and not harmless:
            raise RequestError(400, f"{key}: {reason}", key)
    problems = (
        (body.stream_options is not None and not body.stream, "stream_options", "requires stream"),
        (body.top_logprobs is not None and not body.logprobs, "top_logprobs", "requires logprobs"),
        (len(body.messages) > MAX_MESSAGES, "messages", f"there must be at most {MAX_MESSAGES}"),
    )
    for violated, key, problem in problems:
        if violated:
            raise RequestError(400, f"{key}: {problem}", key)


def _prompt(body: ChatRequest, served: ServedModel) -> tuple[list[int], int | None]:
    """Return the ids of the conversation and the number of tokens left in the context for the answer."""
    assert served.chat is not None
    try:
        messages = parse_messages(body.messages, "messages")
        check_turns(messages, "messages", answered=False)
        ids = served.chat.prompt([served.chat.turn(Message(message.role, message.content)) for message in messages])
    except InputError as error:
        where = "" if error.where and error.where.startswith("messages") else "messages: "
        raise RequestError(400, f"{where}{error}", "messages") from None
    if served.capacity is None:
        return ids, None
    room = served.capacity - len(ids) + 1  # the model does not read the last token of an answer
    if room < 1:
        problem = f"messages: {len(ids)} tokens do not fit into the model's context of {served.capacity}; omit the oldest messages"
        raise RequestError(400, problem, "messages")
    return ids, room


def _as_completion(body: ChatRequest, max_tokens: int) -> CompletionRequest:
    """Return a completion request with the same sampling keys."""
    shared = {key: getattr(body, key) for key in CompletionRequest.model_fields if key in ChatRequest.model_fields}
    shared |= {"prompt": "", "max_tokens": max_tokens, "logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    return CompletionRequest.model_construct(**shared)
