"""Random request bodies get a 200 response, or a 4xx response with a JSON error. The server still answers normal requests."""

from __future__ import annotations

import itertools
import json
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import network
from tiny import model

from tinylm.data.bucketed_pairs import PairFraming
from tinylm.model.decoder import Decoder
from tinylm.serving.api import CompletionRequest, DetokenizeRequest, RequestBody, TokenizeRequest
from tinylm.serving.chat_api import ChatRequest
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.chat_template import ChatEncoder, ChatTemplate, add_control_tokens
from tinylm.translation.translator import Translator

testclient = pytest.importorskip("starlette.testclient")
server = pytest.importorskip("tinylm.serving.server")
translation = pytest.importorskip("tinylm.serving.translation")

FUZZ = settings(derandomize=True, deadline=None, database=None)
LIMITS = server.Limits(max_body_bytes=500_000, max_tokens=8, rows=8, queue_size=24)
NUMBERS = st.sampled_from(
    [0, -0.0, 1, -1, 2, 0.5, 16, 300, 10**18, 2**63, -(2**63), 10**400, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")]
)
TEXTS = st.text(max_size=8) | st.sampled_from(["", "a", "0", "²", "\0", "\ud800", "\u202e", "🙂", "é" * 300, "<|endoftext|>"])
SCALARS = st.none() | st.booleans() | st.integers() | NUMBERS | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
PATTERNS = st.sampled_from(
    ["a", "(", "", "[0-9]{1,3}", r"\w+", r"(a)\1", "(?:){4294967294}", "a{9999}", "[^\ud800]", "(?i)é|ß", "$", "a??b*+", "\\"]
)
IDS = st.lists(st.integers(-1, 300), max_size=4)
BIAS_KEYS = st.integers(0, 261).map(str) | st.sampled_from(["", "-1", " 1", "1e1", "²", "999", "1" * 5000])
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXTS}))
VALID: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just("tiny"),
    "prompt": TEXTS | IDS | st.lists(TEXTS, max_size=3) | st.lists(IDS, max_size=3),
    "messages": MESSAGES,
    "text": TEXTS | st.lists(TEXTS, max_size=3),
    "tokens": IDS,
    "stop": TEXTS | st.lists(TEXTS, max_size=17),
    "logit_bias": st.dictionaries(BIAS_KEYS, st.sampled_from([-100, -1, 0, 2.5, 100]), max_size=4),
    "regex": PATTERNS,
    "choice": st.lists(TEXTS, max_size=3),
    "forced_ids": IDS,
    "stream_options": st.just({"include_usage": True}),
    "suffix": st.just(""),
    "response_format": st.just({"type": "text"}),
}
"""Values of the right type for keys whose values are neither numbers nor booleans. Most of them are valid."""
ODD_VALUES: list[Any] = [
    *(None, True, 0, -1, 2, 0.5, 10**18, 2**63, 10**400, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")),
    *("", "a", "²", "\0", "\ud800", "1" * 5000, [], [[]], [""], [None], ["a", 1], [-1], [10**18], [[0], ["a"]]),
    *({}, {"": 0}, {"²": 1}, {"1" * 5000: 1}, {"0": -1e308}, {"a": {"b": []}}, [{}], [{"role": "user", "content": []}]),
]
CONTENT_TYPES = [b"application/json"] * 30 + [b"text/plain", b"application/json; charset=utf-16", b"text/\xe9", b""]
RAW_BODIES = ["", "null", "[]", "{", '{"prompt":', "[" * 90_000, '{"a":' * 90_000, "\ufeff{}", "9" * 90_000, '{"n": 1, "n": ""}']


@pytest.fixture(scope="module")
def chat_encoder(tokenizer: Tokenizer) -> ChatEncoder:
    return ChatEncoder(ChatTemplate(), add_control_tokens(tokenizer).tokenizer)


@pytest.fixture(scope="module")
def client(chat_encoder: ChatEncoder) -> Iterator[Any]:
    """A client for a server whose model supports completions and chat."""
    decoder = Decoder(model("modern", vocab_size=chat_encoder.tokenizer.vocab_size, context_length=64))
    app = server.create_app(decoder, chat_encoder.tokenizer, "tiny", limits=LIMITS, chat=chat_encoder)
    with testclient.TestClient(app) as client:
        yield client


@pytest.fixture(scope="module")
def translation_client(tokenizer: Tokenizer) -> Iterator[Any]:
    translator = Translator(network(vocab_size=tokenizer.vocab_size), PairFraming(tokenizer, tokenizer, 24))
    with testclient.TestClient(translation.create_app(translator, "tiny", limits=LIMITS)) as client:
        yield client


def _valid_values(key: str, field: Any) -> st.SearchStrategy[Any]:
    if key in VALID:
        return VALID[key]
    types = typing.get_args(field.annotation) or (field.annotation,)
    return st.booleans() if bool in types else st.integers(1, 8) if int in types else st.floats(0.01, 1)


def _bodies(kind: type[RequestBody], required: dict[str, Any]) -> st.SearchStrategy[str]:
    """Generate request bodies: JSON objects with known keys, often with one arbitrary key or value, and sometimes other text."""
    fields = kind.model_fields
    valid = st.lists(st.one_of(*(st.tuples(st.just(key), _valid_values(key, field)) for key, field in fields.items())), max_size=4)
    arbitrary = st.lists(st.tuples(st.sampled_from([*fields, "max_token", ""]), VALUES), max_size=1)
    objects = st.builds(lambda pairs, pair: json.dumps({**required, **dict(pairs), **dict(pair)}), valid, arbitrary)
    return st.integers(0, 19).flatmap(lambda number: objects if number else st.sampled_from(RAW_BODIES) | VALUES.map(json.dumps))


def _check_response(response: Any) -> None:
    """Check that a response is successful or reports a client error."""
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        documents = [json.loads(event) for event in events if event != "[DONE]"]
    else:
        documents = [response.json()]
    errors = [document["error"] for document in documents if "error" in document]
    assert response.status_code == 200 or errors
    for error in errors:
        assert error["message"]
        assert error["type"] == ("server_error" if response.status_code == 429 else "invalid_request_error"), error


def _fuzz(client: Any, route: str, kind: type[RequestBody], required: dict[str, Any], examples: int = 100) -> None:
    """Send each key with each odd value, and random bodies, and check each response.

    Check that a normal request gets the same response before and after.
    """

    def normal_response() -> Any:
        response = client.post(route, json=required)
        assert response.status_code == 200
        return {key: value for key, value in response.json().items() if key not in ("id", "created")}

    @settings(FUZZ, max_examples=examples)
    @given(body=_bodies(kind, required), content_type=st.sampled_from(CONTENT_TYPES))
    def send(body: str, content_type: bytes) -> None:
        content = body.encode("utf-8", "surrogatepass")
        _check_response(client.post(route, content=content, headers={b"Content-Type": content_type}))

    before = normal_response()
    for key, value in itertools.product(kind.model_fields, ODD_VALUES):
        _check_response(
            client.post(route, content=json.dumps({**required, key: value}), headers={"Content-Type": "application/json"})
        )
    send()
    assert normal_response() == before


def test_any_completion_request_body_gets_a_result_or_an_error(client: Any) -> None:
    _fuzz(client, "/v1/completions", CompletionRequest, {"prompt": "abc", "max_tokens": 4, "seed": 1})


def test_any_chat_request_body_gets_an_answer_or_an_error(client: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    _fuzz(client, "/v1/chat/completions", ChatRequest, {"messages": messages, "max_tokens": 4, "seed": 1})


def test_tokenize_and_detokenize_convert_or_reject_any_input(client: Any) -> None:
    _fuzz(client, "/tokenize", TokenizeRequest, {"prompt": "abc"})
    _fuzz(client, "/detokenize", DetokenizeRequest, {"tokens": [65, 66]})


def test_any_translation_request_body_gets_a_translation_or_an_error(translation_client: Any) -> None:
    _fuzz(translation_client, "/v1/translate", translation.TranslateRequest, {"text": "eins", "beams": 2}, examples=40)
