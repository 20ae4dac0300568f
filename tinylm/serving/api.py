"""Validate the body of OpenAI's `/v1/completions`, and build responses in its format.

Supported in addition to OpenAI's keys: `top_k`, `min_p`, `repetition_penalty`, `regex`, `choice` and `forced_ids`. An unknown
key is an error.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinylm.errors import InputError
from tinylm.generation.constraint import Constraint
from tinylm.generation.engine import Request, Sample, TokenChoice, sample_seed
from tinylm.generation.sampling import MAX_LOGPROBS, SamplingOptions
from tinylm.tokenizer import Tokenizer

MAX_CHOICES = 128
Prompt = str | list[str] | list[int] | list[list[int]]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The JSON body of a request. Defaults are OpenAI's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: Prompt = ""
    max_tokens: Annotated[int, Field(ge=0)] = 16
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
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
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    regex: str | None = None
    choice: list[str] | None = None
    forced_ids: list[int] | None = None
    """Token ids with which the completion starts."""


class RequestError(Exception):
    """An error response: HTTP status, message, and the key of the request that caused it."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    def as_dict(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": None}}


@dataclass(frozen=True)
class ParsedRequest:
    """A valid request: its body, one pair (engine request, prompt ids) per sample, and fields of the response."""

    body: CompletionRequest
    requests: list[tuple[Request, list[int]]]
    prompt_tokens: int
    id: str
    created: int
    model: str


def parse_request(data: bytes, tokenizer: Tokenizer, model: str, max_tokens: int) -> ParsedRequest:
    """Parse and validate the body of a request. `model`: the name of the served model.

    Raises `RequestError` with status 400 or 404.
    """
    try:
        body = CompletionRequest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        # pydantic adds the type of the union that it tried, such as `list[int]`, to the location
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("str", "list", "function")))
        raise RequestError(400, f"{where + ': ' if where else ''}{first['msg']}", where or None) from None
    if body.model is not None and body.model != model:
        raise RequestError(404, f"unknown model {body.model!r}; this server serves {model!r}", "model")
    if body.max_tokens > max_tokens:
        raise RequestError(400, f"max_tokens: must be at most {max_tokens}", "max_tokens")
    if body.stream_options is not None and not body.stream:
        raise RequestError(400, "stream_options: can only be used with stream", "stream_options")
    prompts = _prompts(body.prompt, tokenizer)
    if len(prompts) * body.n > MAX_CHOICES:
        raise RequestError(400, f"n: the number of prompts times n must be at most {MAX_CHOICES}", "n")
    try:
        options, constraint = _options(body, tokenizer), _constraint(body, tokenizer)
    except InputError as error:
        name = (error.where or "").lstrip("-").replace("-", "_") or None
        raise RequestError(400, f"{name or 'request'}: {error.message}", name) from None
    if constraint is not None and constraint.min_tokens > body.max_tokens:
        problem = f"max_tokens: must be at least {constraint.min_tokens}, the length of the shortest match"
        raise RequestError(400, problem, "max_tokens")
    seed = body.seed % 2**63 if body.seed is not None else secrets.randbelow(2**31)
    requests = [
        (Request(text, options, sample_seed(seed, index), constraint), ids) for text, ids in prompts for index in range(body.n)
    ]
    id = f"cmpl-{secrets.token_hex(12)}"
    return ParsedRequest(body, requests, sum(len(ids) for _, ids in prompts), id, int(time.time()), model)


def _prompts(prompt: Prompt, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """Return (text, ids) of each prompt."""
    if isinstance(prompt, str):
        prompt = [prompt]
    elif prompt and isinstance(prompt[0], int):
        prompt = [prompt]
    if not prompt:
        raise RequestError(400, "prompt: the list must not be empty", "prompt")
    prompts: list[tuple[str, list[int]]] = []
    for item in prompt:
        if isinstance(item, str):
            if any("\ud800" <= character <= "\udfff" for character in item):
                raise RequestError(400, "prompt: must not contain lone surrogates", "prompt")
            prompts.append((item, tokenizer.encode(item)))
            continue
        ids = list(item) if isinstance(item, list) else [item]
        _check_ids(ids, tokenizer, "prompt")
        prompts.append((tokenizer.decode(ids), ids))
    return prompts


def _check_ids(ids: list[int], tokenizer: Tokenizer, param: str) -> None:
    if any(not 0 <= id < tokenizer.vocab_size for id in ids):
        raise RequestError(400, f"{param}: ids must be between 0 and {tokenizer.vocab_size - 1}", param)


def _options(body: CompletionRequest, tokenizer: Tokenizer) -> SamplingOptions:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    biases = body.logit_bias or {}
    if any(not id.isdigit() for id in biases):
        raise RequestError(400, "logit_bias: keys must be token ids", "logit_bias")
    bias = tuple((int(id), value if value > -100 else float("-inf")) for id, value in biases.items())
    _check_ids([id for id, _ in bias], tokenizer, "logit_bias")
    forced = body.forced_ids or []
    _check_ids(forced, tokenizer, "forced_ids")
    return SamplingOptions(
        max_new_tokens=body.max_tokens,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p if body.top_p < 1 else None,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        stop=tuple(stop),
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=bias,
        forced=tuple(forced),
        logprobs=body.logprobs,
    )


def _constraint(body: CompletionRequest, tokenizer: Tokenizer) -> Constraint | None:
    if body.regex is not None and body.choice is not None:
        raise RequestError(400, "regex: cannot be combined with choice", "regex")
    if (body.regex is not None or body.choice is not None) and (body.stop or body.forced_ids):
        raise RequestError(400, "stop: stop and forced_ids cannot be combined with regex or choice", "stop")
    if body.regex is not None:
        return Constraint(body.regex, tokenizer)
    return Constraint.choices(body.choice, tokenizer) if body.choice else None


def completion(parsed: ParsedRequest, samples: list[Sample], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the body of a non-streaming response."""
    choices = []
    for index, sample in enumerate(samples):
        logprobs = _logprobs(sample.choices, 0, tokenizer) if parsed.body.logprobs is not None else None
        choices.append(_choice(index, sample.text, logprobs, _finish_reason(sample)))
    return {**_envelope(parsed), "choices": choices, "usage": usage(parsed, samples)}


def completion_chunk(
    parsed: ParsedRequest,
    index: int,
    text: str,
    tokens: list[TokenChoice],
    offset: int,
    sample: Sample | None,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """Return one event of a streamed response.

    `tokens`: the tokens since the previous event of this choice; `offset`: the number of characters before them. `sample`: the
    complete sample, if this is the last event of the choice.
    """
    logprobs = _logprobs(tokens, offset, tokenizer) if parsed.body.logprobs is not None else None
    return {**_envelope(parsed), "choices": [_choice(index, text, logprobs, None if sample is None else _finish_reason(sample))]}


def usage(parsed: ParsedRequest, samples: list[Sample]) -> dict[str, int]:
    completion_tokens = sum(len(sample.token_ids) for sample in samples)
    return {
        "prompt_tokens": parsed.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": parsed.prompt_tokens + completion_tokens,
    }


def usage_chunk(parsed: ParsedRequest, samples: list[Sample]) -> dict[str, Any]:
    """Return the last event of a stream with `stream_options.include_usage`."""
    return {**_envelope(parsed), "choices": [], "usage": usage(parsed, samples)}


def _envelope(parsed: ParsedRequest) -> dict[str, Any]:
    return {"id": parsed.id, "object": "text_completion", "created": parsed.created, "model": parsed.model}


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _finish_reason(sample: Sample) -> str:
    return "length" if sample.finish_reason == "length" else "stop"


def _logprobs(choices: list[TokenChoice], offset: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return OpenAI's four lists, and `content` with ids and bytes, because different tokens can decode to the same text."""
    tokens = [tokenizer.decode([choice.id]) for choice in choices]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [choice.logprob for choice in choices],
        "top_logprobs": [{tokenizer.decode([id]): value for id, value in choice.alternatives} for choice in choices],
        "text_offset": offsets,
        "content": [
            {
                **_token_info(choice.id, choice.logprob, tokenizer),
                "top_logprobs": [_token_info(id, value, tokenizer) for id, value in choice.alternatives],
            }
            for choice in choices
        ],
    }


def _token_info(id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "id": id,
        "token": tokenizer.decode([id]),
        "bytes": list(tokenizer.token_bytes[id]),
        "logprob": max(logprob, -9999.0),  # JSON has no infinity
        "end": id == tokenizer.end_of_text,
    }
