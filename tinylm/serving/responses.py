"""Build responses in the format of OpenAI's `/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

from typing import Any

from tinylm.generation.engine import Sample
from tinylm.generation.token_choice import TokenChoice
from tinylm.serving.api import ParsedRequest
from tinylm.tokenizer import Tokenizer

_MIN_LOGPROB = -9999.0  # JSON has no infinity


def completion(parsed: ParsedRequest, samples: list[Sample], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the body of a non-streaming response."""
    choices = []
    for index, sample in enumerate(samples):
        tokens = Tokens(parsed, index, tokenizer)
        logprobs = tokens.logprobs([*tokens.prompt(sample), *sample.choices, *tokens.end(sample)])
        choices.append(_choice(index, tokens.echoed_text + sample.text, logprobs, _finish_reason(sample)))
    return {**_envelope(parsed), "choices": choices, "usage": usage(parsed, samples)}


class Tokens:
    """The tokens in one choice of a response. Tracks the text offset of the next token.

    With `echo`, the response starts with the prompt and also lists the end-of-text token if it was generated.
    """

    def __init__(self, parsed: ParsedRequest, index: int, tokenizer: Tokenizer) -> None:
        request, self._prompt_ids = parsed.requests[index]
        self._enabled, self._echo = parsed.body.logprobs is not None, parsed.body.echo
        self.echoed_text = request.prompt if self._echo else ""
        self._tokenizer, self._offset = tokenizer, 0

    def prompt(self, sample: Sample) -> list[TokenChoice | int]:
        """Return the echoed prompt tokens. The first one is only an id, because no token precedes it."""
        return [*self._prompt_ids[:1], *sample.prompt_choices] if self._echo else []

    def end(self, sample: Sample) -> list[TokenChoice]:
        """Return the end-of-text token if it was generated and the response lists it."""
        return [sample.end_choice] if self._echo and sample.end_choice is not None else []

    def logprobs(self, choices: list[TokenChoice | int]) -> dict[str, Any] | None:
        """Return OpenAI's four lists, or None if the request does not set `logprobs`.

        The additional list `content` has ids and bytes, because different tokens can decode to the same text.
        """
        if not self._enabled:
            return None
        content = [self._content(choice) for choice in choices]
        offsets = []
        for token in content:
            offsets.append(self._offset)
            self._offset += len(token["token"])
        return {
            "tokens": [token["token"] for token in content],
            "token_logprobs": [token["logprob"] for token in content],
            "top_logprobs": [_by_text(token) for token in content],
            "text_offset": offsets,
            "content": content,
        }

    def _content(self, choice: TokenChoice | int) -> dict[str, Any]:
        if isinstance(choice, int):
            return {**self._token(choice), "logprob": None, "chance": None, "top_logprobs": None}
        chances = choice.alternative_chances or [None] * len(choice.alternatives)
        alternatives = [
            {**self._token(id), "logprob": max(logprob, _MIN_LOGPROB), "chance": chance}
            for (id, logprob), chance in zip(choice.alternatives, chances, strict=True)
        ]
        logprob = max(choice.logprob, _MIN_LOGPROB)
        return {**self._token(choice.id), "logprob": logprob, "chance": choice.chance, "top_logprobs": alternatives}

    def _token(self, id: int) -> dict[str, Any]:
        token_bytes = self._tokenizer.token_bytes[id]
        is_end = id == self._tokenizer.end_of_text
        return {"id": id, "token": self._tokenizer.decode([id]), "bytes": list(token_bytes), "end": is_end}


def _by_text(token: dict[str, Any]) -> dict[str, float] | None:
    """Map the texts of the alternatives and the token to log-probabilities. If texts are equal, use the most likely token."""
    if token["top_logprobs"] is None:
        return None
    logprobs: dict[str, float] = {}
    for alternative in [*token["top_logprobs"], token]:
        logprobs.setdefault(alternative["token"], alternative["logprob"])
    return logprobs


def completion_chunk(
    parsed: ParsedRequest, index: int, text: str, logprobs: dict[str, Any] | None, sample: Sample | None, *, first: bool
) -> dict[str, Any]:
    """Return one event in a streamed response. `sample`: the complete sample, if this is the choice's last event."""
    if parsed.chat:
        return _chat_chunk(parsed, index, text, logprobs, sample, first)
    return {**_envelope(parsed), "choices": [_choice(index, text, logprobs, None if sample is None else _finish_reason(sample))]}


def usage(parsed: ParsedRequest, samples: list[Sample]) -> dict[str, int]:
    """Return the token counts of a response."""
    completion_tokens = sum(len(sample.token_ids) for sample in samples)
    return {
        "prompt_tokens": parsed.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": parsed.prompt_tokens + completion_tokens,
    }


def usage_chunk(parsed: ParsedRequest, samples: list[Sample]) -> dict[str, Any]:
    """Return the last event in a stream with `stream_options.include_usage`."""
    return {**_envelope(parsed), "choices": [], "usage": usage(parsed, samples)}


def _envelope(parsed: ParsedRequest) -> dict[str, Any]:
    kind = "chat.completion.chunk" if parsed.chat else "text_completion"
    return {"id": parsed.id, "object": kind, "created": parsed.created, "model": parsed.model}


def chat_completion(parsed: ParsedRequest, samples: list[Sample], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the body of a non-streaming response to a chat request."""
    choices = []
    for index, sample in enumerate(samples):
        logprobs = _chat_logprobs(Tokens(parsed, index, tokenizer).logprobs([*sample.choices]))
        message = {"role": "assistant", "content": sample.text, "refusal": None}
        choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": _finish_reason(sample)})
    return {**_envelope(parsed), "object": "chat.completion", "choices": choices, "usage": usage(parsed, samples)}


def _chat_chunk(
    parsed: ParsedRequest, index: int, text: str, logprobs: dict[str, Any] | None, sample: Sample | None, first: bool
) -> dict[str, Any]:
    """Return one event in a streamed chat response. Only a choice's first event has the role."""
    delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
    reason = None if sample is None else _finish_reason(sample)
    choice = {"index": index, "delta": delta, "logprobs": _chat_logprobs(logprobs), "finish_reason": reason}
    return {**_envelope(parsed), "choices": [choice]}


def _chat_logprobs(logprobs: dict[str, Any] | None) -> dict[str, Any] | None:
    """Convert log-probabilities to the chat format, which has only the token list."""
    return None if logprobs is None else {"content": logprobs["content"], "refusal": None}


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _finish_reason(sample: Sample) -> str:
    return "length" if sample.finish_reason == "length" else "stop"
