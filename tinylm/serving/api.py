"""Validate the request bodies for OpenAI's `/v1/completions`, and for `/tokenize` and `/detokenize`.

The keys `top_k`, `min_p`, `repetition_penalty`, `regex`, `choice` and `forced_ids` are supported in addition to OpenAI's keys. A
key that is null has its default value. Unknown keys are errors.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinylm.errors import InputError, did_you_mean
from tinylm.generation.constraint import Constraint
from tinylm.generation.engine import Request, sample_seed
from tinylm.generation.option_ranges import MAX_LOGPROBS
from tinylm.generation.sampling import SamplingOptions
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.chat_template import ChatEncoder

MAX_CHOICES = 128
MAX_BIASES = 300
_ID = re.compile(r"[0-9]{1,10}", re.ASCII)
_OPTION_NAMES = {"--ban": "logit_bias", "--max-new-tokens": "max_tokens", "--force": "forced_ids"}
"""The request keys whose command-line options have a different name."""
_CHAT_KEYS = ("messages", "tools", "functions")
NO_CHAT = (
    "chat is not supported: the model was not trained on conversations and only continues text; send a `prompt` to /v1/completions"
)
USE_CHAT_ROUTE = "send messages to /v1/chat/completions"
Prompt = str | list[str] | list[int] | list[list[int]]
Body = TypeVar("Body", bound="RequestBody")


class RequestBody(BaseModel):
    """Base class for JSON bodies. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(RequestBody):
    """How to stream a response."""

    include_usage: bool = False


class CompletionRequest(RequestBody):
    """The JSON body of a completion request. The defaults match OpenAI's."""

    model: str | None = None
    prompt: Prompt = ""
    max_tokens: Annotated[int, Field(ge=0)] = 16
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Must equal `n`."""
    echo: bool = False
    suffix: str = ""
    """Must be empty: the model cannot insert text."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stop: str | list[str] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    user: str | None = None
    """Accepted for compatibility and ignored."""
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """0 and -1 sample from all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    regex: str | None = None
    choice: list[str] | None = None
    forced_ids: list[int] | None = None
    """Token ids with which the completion starts."""


class TokenizeRequest(RequestBody):
    """The JSON body of `/tokenize`."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = False
    """Has no effect: the tokenizer adds no special tokens."""

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """Return the ids of the prompt. A prompt that is exactly the name of the end-of-text token is encoded as this token."""
        if tokenizer.end_of_text is not None and self.prompt == end_of_text_name(tokenizer):
            return [tokenizer.end_of_text]
        return encode(self.prompt, tokenizer)


class DetokenizeRequest(RequestBody):
    """The JSON body of `/detokenize`."""

    model: str | None = None
    tokens: list[int]


class RequestError(Exception):
    """An error response: HTTP status, message, and the request key that caused the error."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    @classmethod
    def of(cls, error: InputError) -> RequestError:
        """Create an error response. Command-line options in the message are replaced with request keys."""
        param = _request_key(error.where) if error.where and error.where.startswith("--") else None
        text = str(InputError(error.message, hint=error.hint))
        message = re.sub(r"--[a-z][a-z-]*", lambda option: _request_key(option[0]), text)
        return cls(400, f"{param or 'request'}: {message}", param)

    def as_dict(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": None}}


def _request_key(option: str) -> str:
    return _OPTION_NAMES.get(option, option.lstrip("-").replace("-", "_"))


@dataclass(frozen=True)
class ServedModel:
    """A server's model: its name, its tokenizer, and the maximum number of tokens in its context (None: unlimited)."""

    name: str
    tokenizer: Tokenizer
    capacity: int | None
    chat: ChatEncoder | None = None
    """Encodes conversations, if the model was trained on them."""


@dataclass(frozen=True)
class ParsedRequest:
    """A valid request: its body, one pair (engine request, prompt ids) per sample, and fields for the response.

    `chat`: whether the response has the format of `/v1/chat/completions`.
    """

    body: CompletionRequest
    requests: list[tuple[Request, list[int]]]
    prompt_tokens: int
    id: str
    created: int
    model: str
    chat: bool = False

    def constrained(self, constraint: Constraint) -> ParsedRequest:
        """Return this request with a constraint. Raises `RequestError` if `max_tokens` is too small for the constraint."""
        if constraint.min_tokens > self.body.max_tokens:
            problem = f"max_tokens: must be at least {constraint.min_tokens}, the length of the shortest match"
            raise RequestError(400, problem, "max_tokens")
        return replace(self, requests=[(replace(request, constraint=constraint), ids) for request, ids in self.requests])


def parse_body(data: bytes, kind: type[Body], model: str) -> Body:
    """Parse a JSON object as `kind`. Raises `RequestError` with status 400, or 404 if the body is for another model."""
    try:
        document = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise RequestError(400, "the body must be a JSON object")
    _check_keys(document, kind)
    try:
        body = kind.model_validate({key: value for key, value in document.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # pydantic adds the union member that it tried, such as `list[int]`, to the location
        where = ".".join(str(part)[:40] for part in first["loc"] if not str(part).startswith(("str", "list", "function")))
        raise RequestError(400, f"{where + ': ' if where else ''}{first['msg']}", where or None) from None
    named = document.get("model")
    if named is not None and named != model:
        raise RequestError(404, f"unknown model {named[:100]!r}; this server serves {model!r}", "model")
    return body


def _check_keys(document: dict[str, Any], kind: type[RequestBody]) -> None:
    known = list(kind.model_fields)
    unknown = next((key for key in document if key not in known), None)
    if unknown is None:
        return
    if unknown in _CHAT_KEYS and kind is CompletionRequest:
        raise RequestError(400, f"{unknown}: {USE_CHAT_ROUTE}", unknown)
    shown = unknown[:40]
    suggestion = did_you_mean(shown, known)
    problem = f"unknown key{f'; {suggestion}' if suggestion else ''}; the known keys are {', '.join(known)}"
    raise RequestError(400, f"{shown}: {problem}", shown)


def parse_request(data: bytes, served: ServedModel, max_tokens: int) -> ParsedRequest:
    """Parse and validate the body of a completion request, except for its `regex` or `choice`.

    Raises `RequestError` with status 400 or 404.
    """
    body, tokenizer = parse_body(data, CompletionRequest, served.name), served.tokenizer
    _check_combinations(body)
    if body.max_tokens > max_tokens:
        raise RequestError(400, f"max_tokens: must be at most {max_tokens}", "max_tokens")
    prompts = _prompts(body.prompt, body.n, tokenizer)
    scored = body.echo and body.logprobs is not None
    if scored and served.capacity is not None and any(len(ids) > served.capacity + 1 for _, ids in prompts):
        problem = f"prompt: with echo and logprobs, must have at most {served.capacity + 1} tokens"
        raise RequestError(400, problem, "prompt")
    try:
        options = sampling_options(body, tokenizer)
    except InputError as error:
        raise RequestError.of(error) from None
    seed = body.seed % 2**63 if body.seed is not None else secrets.randbelow(2**31)
    requests = [
        (Request(text, options, sample_seed(seed, index), score_prompt=scored), ids)
        for text, ids in prompts
        for index in range(body.n)
    ]
    id = f"cmpl-{secrets.token_hex(12)}"
    return ParsedRequest(body, requests, sum(len(ids) for _, ids in prompts), id, int(time.time()), served.name)


def _check_combinations(body: CompletionRequest) -> None:
    constrained = body.regex is not None or body.choice is not None
    problems = (
        (body.stream_options is not None and not body.stream, "stream_options", "requires stream"),
        (body.best_of not in (None, body.n), "best_of", f"must equal n ({body.n}); rank the samples by their logprobs instead"),
        (bool(body.suffix), "suffix", "not supported: the model cannot insert text before a suffix"),
        (body.regex is not None and body.choice is not None, "regex", "cannot be combined with choice"),
        (constrained and bool(body.stop), "stop", "cannot be combined with regex or choice"),
        (constrained and bool(body.forced_ids), "forced_ids", "cannot be combined with regex or choice"),
        (body.choice == [], "choice", "must not be empty"),
    )
    for violated, key, problem in problems:
        if violated:
            raise RequestError(400, f"{key}: {problem}", key)


def _prompts(prompt: Prompt, n: int, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """Return (text, ids) for each prompt."""
    if isinstance(prompt, str):
        prompt = [prompt]
    elif prompt and isinstance(prompt[0], int):
        prompt = [prompt]
    if not prompt:
        raise RequestError(400, "prompt: the list must not be empty", "prompt")
    if len(prompt) * n > MAX_CHOICES:
        raise RequestError(400, f"n: the number of prompts times n must be at most {MAX_CHOICES}", "n")
    prompts: list[tuple[str, list[int]]] = []
    for item in prompt:
        if isinstance(item, str):
            prompts.append((item, encode(item, tokenizer)))
            continue
        ids = list(item) if isinstance(item, list) else [item]
        prompts.append((decode(ids, tokenizer, "prompt"), ids))
    return prompts


def end_of_text_name(tokenizer: Tokenizer) -> str | None:
    """Return the name of the end-of-text token, such as `<|endoftext|>`."""
    return None if tokenizer.end_of_text is None else tokenizer.backend.id_to_token(tokenizer.end_of_text)


def encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a prompt. Raises `RequestError` if the tokenizer cannot encode it."""
    try:
        return tokenizer.encode(text)
    except InputError as error:
        raise RequestError(400, f"prompt: {error}", "prompt") from None


def decode(ids: list[int], tokenizer: Tokenizer, param: str) -> str:
    """Decode ids to text. Raises `RequestError` for the key `param` if an id does not exist."""
    _check_ids(ids, tokenizer, param)
    return tokenizer.decode(ids)


def _check_ids(ids: list[int], tokenizer: Tokenizer, param: str) -> None:
    if any(not 0 <= id < tokenizer.vocab_size for id in ids):
        raise RequestError(400, f"{param}: ids must be between 0 and {tokenizer.vocab_size - 1}", param)


def sampling_options(body: CompletionRequest, tokenizer: Tokenizer, stop_ids: tuple[int, ...] = ()) -> SamplingOptions:
    """Return the options of a completion request. Raises `InputError` or `RequestError` if a value is out of range."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    forced = body.forced_ids or []
    _check_ids(forced, tokenizer, "forced_ids")
    return SamplingOptions(
        max_new_tokens=body.max_tokens,
        temperature=body.temperature,
        top_k=body.top_k if body.top_k is not None and body.top_k > 0 else None,
        top_p=body.top_p if body.top_p < 1 else None,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        stop=tuple(stop),
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=_logit_bias(body.logit_bias or {}, tokenizer),
        forced=tuple(forced),
        logprobs=body.logprobs,
        stop_ids=stop_ids,
    )


def _logit_bias(biases: dict[str, float], tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    if len(biases) > MAX_BIASES:
        raise RequestError(400, f"logit_bias: must have at most {MAX_BIASES} entries, not {len(biases)}", "logit_bias")
    if any(not _ID.fullmatch(id) for id in biases):
        raise RequestError(400, "logit_bias: keys must be token ids", "logit_bias")
    bias = tuple((int(id), value if value > -100 else float("-inf")) for id, value in biases.items())
    _check_ids([id for id, _ in bias], tokenizer, "logit_bias")
    return bias
