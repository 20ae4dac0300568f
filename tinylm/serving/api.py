"""What a client may ask: the body of OpenAI's `/v1/completions`, checked, and answers in its shape.

Beside OpenAI's keys there are `top_k`, `min_p`, `repetition_penalty`, `regex`, `choice` and `forced_ids`; a key that is not
known is an error, and one that is known has its effect.
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
from tinylm.generation.sampling import MOST_LOGPROBS, SamplingOptions
from tinylm.tokenizer import Tokenizer

MOST_CHOICES = 128
Prompt = str | list[str] | list[int] | list[list[int]]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Body(BaseModel):
    """The request's JSON. Defaults are OpenAI's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: Prompt = ""
    max_tokens: Annotated[int, Field(ge=0)] = 16
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    stop: str | list[str] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    user: str | None = None
    """Taken and not used, as the client's own note."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    regex: str | None = None
    choice: list[str] | None = None
    forced_ids: list[int] | None = None
    """Tokens that the completion begins with."""


class Refused(Exception):
    """An answer that is an error: HTTP status, message, and the key to blame."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    def as_dict(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": None}}


@dataclass(frozen=True)
class Wanted:
    """A request that is fine: what to write, and how to answer."""

    body: Body
    requests: list[tuple[Request, list[int]]]
    prompt_tokens: int
    id: str
    created: int
    model: str


def read(data: bytes, tokenizer: Tokenizer, model: str, most_tokens: int) -> Wanted:
    """A request's body, understood. Raises `Refused` (400 or 404) with the key to blame."""
    try:
        body = Body.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("str", "list", "function")))
        raise Refused(400, f"{where + ': ' if where else ''}{first['msg']}", where or None) from None
    if body.model is not None and body.model != model:
        raise Refused(404, f"the model {body.model!r} is not here; {model!r} is", "model")
    if body.max_tokens > most_tokens:
        raise Refused(400, f"max_tokens: at most {most_tokens}", "max_tokens")
    if body.stream_options is not None and not body.stream:
        raise Refused(400, "stream_options: only means something with stream", "stream_options")
    prompts = _prompts(body.prompt, tokenizer)
    if len(prompts) * body.n > MOST_CHOICES:
        raise Refused(400, f"prompts times n: at most {MOST_CHOICES}", "n")
    try:
        options, constraint = _options(body, tokenizer), _constraint(body, tokenizer)
    except InputError as error:
        name = (error.where or "").lstrip("-").replace("-", "_") or None
        raise Refused(400, f"{name or 'request'}: {error.message}", name) from None
    if constraint is not None and constraint.fewest_tokens > body.max_tokens:
        raise Refused(400, f"max_tokens: what must match takes {constraint.fewest_tokens} tokens at least", "max_tokens")
    seed = body.seed % 2**63 if body.seed is not None else secrets.randbelow(2**31)
    requests = [
        (Request(text, options, sample_seed(seed, index), constraint), ids) for text, ids in prompts for index in range(body.n)
    ]
    made = f"cmpl-{secrets.token_hex(12)}"
    return Wanted(body, requests, sum(len(ids) for _, ids in prompts), made, int(time.time()), model)


def _prompts(prompt: Prompt, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    if isinstance(prompt, str):
        prompt = [prompt]
    elif prompt and isinstance(prompt[0], int):
        prompt = [prompt]
    if not prompt:
        raise Refused(400, "prompt: an empty list", "prompt")
    found: list[tuple[str, list[int]]] = []
    for one in prompt:
        if isinstance(one, str):
            if any("\ud800" <= character <= "\udfff" for character in one):
                raise Refused(400, "prompt: half a character", "prompt")
            found.append((one, tokenizer.encode(one)))
            continue
        ids = list(one) if isinstance(one, list) else [one]
        _check_ids(ids, tokenizer, "prompt")
        found.append((tokenizer.decode(ids), ids))
    return found


def _check_ids(ids: list[int], tokenizer: Tokenizer, param: str) -> None:
    if any(not 0 <= id < tokenizer.vocab_size for id in ids):
        raise Refused(400, f"{param}: ids are below {tokenizer.vocab_size}", param)


def _options(body: Body, tokenizer: Tokenizer) -> SamplingOptions:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    biases = body.logit_bias or {}
    if any(not id.isdigit() for id in biases):
        raise Refused(400, "logit_bias: keys are ids", "logit_bias")
    bias = tuple((int(id), value if value > -100 else float("-inf")) for id, value in biases.items())
    _check_ids([id for id, _ in bias], tokenizer, "logit_bias")
    forced = body.forced_ids or []
    _check_ids(forced, tokenizer, "forced_ids")
    return SamplingOptions(
        body.max_tokens,
        body.temperature,
        body.top_k,
        body.top_p if body.top_p < 1 else None,
        body.min_p,
        body.repetition_penalty,
        tuple(stop),
        body.frequency_penalty,
        body.presence_penalty,
        bias,
        tuple(forced),
        body.logprobs,
    )


def _constraint(body: Body, tokenizer: Tokenizer) -> Constraint | None:
    if body.regex is not None and body.choice is not None:
        raise Refused(400, "regex and choice: one of them", "regex")
    if (body.regex is not None or body.choice is not None) and (body.stop or body.forced_ids):
        raise Refused(400, "stop and forced_ids do not go together with regex or choice", "stop")
    if body.regex is not None:
        return Constraint(body.regex, tokenizer)
    return Constraint.choices(body.choice, tokenizer) if body.choice else None


def completion(wanted: Wanted, samples: list[Sample], tokenizer: Tokenizer) -> dict[str, Any]:
    """The whole answer at once."""
    choices = []
    for index, sample in enumerate(samples):
        logprobs = _logprobs(sample.choices, 0, tokenizer) if wanted.body.logprobs is not None else None
        choices.append(_choice(index, sample.text, logprobs, _reason(sample)))
    return {**_frame(wanted), "choices": choices, "usage": usage(wanted, samples)}


def chunk(
    wanted: Wanted, index: int, text: str, tokens: list[TokenChoice], offset: int, sample: Sample | None, tokenizer: Tokenizer
) -> dict[str, Any]:
    """A piece of a streamed answer; the one with the sample is the choice's last."""
    logprobs = _logprobs(tokens, offset, tokenizer) if wanted.body.logprobs is not None else None
    return {**_frame(wanted), "choices": [_choice(index, text, logprobs, None if sample is None else _reason(sample))]}


def usage(wanted: Wanted, samples: list[Sample]) -> dict[str, int]:
    written = sum(len(sample.token_ids) for sample in samples)
    return {
        "prompt_tokens": wanted.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": wanted.prompt_tokens + written,
    }


def last_chunk(wanted: Wanted, samples: list[Sample]) -> dict[str, Any]:
    """What `stream_options.include_usage` asks for."""
    return {**_frame(wanted), "choices": [], "usage": usage(wanted, samples)}


def _frame(wanted: Wanted) -> dict[str, Any]:
    return {"id": wanted.id, "object": "text_completion", "created": wanted.created, "model": wanted.model}


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _reason(sample: Sample) -> str:
    return "length" if sample.finish_reason == "length" else "stop"


def _logprobs(choices: list[TokenChoice], offset: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """OpenAI's four lists, and `content` with ids and bytes, which tell apart what looks the same as text."""
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
                **_content(choice.id, choice.logprob, tokenizer),
                "top_logprobs": [_content(id, value, tokenizer) for id, value in choice.alternatives],
            }
            for choice in choices
        ],
    }


def _content(id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "id": id,
        "token": tokenizer.decode([id]),
        "bytes": list(tokenizer.token_bytes[id]),
        "logprob": max(logprob, -9999.0),
        "end": id == tokenizer.end_of_text,
    }
