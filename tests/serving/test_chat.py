"""The server's chat route, tested with the openai client and with requests that it must reject."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from browser import browser
from running_server import NAME, RunningServer
from tiny import model

from tinylm.generation.chat import answer_all
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.decoder import Decoder
from tinylm.serving.server import Limits
from tinylm.text.conversations import Message
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.chat_template import ChatEncoder, ChatTemplate, add_control_tokens

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello <|end_of_turn|>"}]


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> ChatEncoder:
    return ChatEncoder(ChatTemplate(), add_control_tokens(tokenizer).tokenizer)


@pytest.fixture(scope="module")
def decoder(encoder: ChatEncoder) -> Decoder:
    return Decoder(model("modern", vocab_size=encoder.tokenizer.vocab_size, context_length=96))


@pytest.fixture(scope="module")
def server(decoder: Decoder, encoder: ChatEncoder) -> Iterator[RunningServer]:
    running = RunningServer(decoder, encoder.tokenizer, Limits(max_tokens=60), chat=encoder)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def post(server: RunningServer, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=60)


def error(server: RunningServer, **body: Any) -> str:
    response = post(server, **body)
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["message"])


def test_the_openai_client_receives_the_same_answer_as_the_library(client: Any, decoder: Decoder, encoder: ChatEncoder) -> None:
    reply = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=12, temperature=0)
    turns = encoder.turns([Message(**message) for message in MESSAGES])
    [sample] = answer_all(decoder, encoder, [encoder.prompt(turns)], SamplingOptions(12, temperature=0.0, top_k=None))
    [choice] = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", sample.text)
    assert choice.finish_reason == ("stop" if sample.finish_reason == "end" else "length")
    assert reply.object == "chat.completion"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(encoder.prompt(turns)), len(sample.token_ids))


def test_a_streamed_answer_starts_with_the_role_and_has_the_same_text(client: Any) -> None:
    arguments = {"model": NAME, "messages": MESSAGES, "max_tokens": 12, "seed": 3, "n": 2}
    whole = client.chat.completions.create(**arguments)
    texts, reasons, usage = ["", ""], {}, None
    started: set[int] = set()
    for chunk in client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert (choice.delta.role == "assistant") == (choice.index not in started)
            started.add(choice.index)
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_an_answer_ends_at_the_end_of_its_turn(server: RunningServer, encoder: ChatEncoder) -> None:
    bias = {str(encoder.end_of_turn): 100}
    choice = post(server, messages=MESSAGES[1:], logit_bias=bias, temperature=0).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")


def test_logprobs_have_the_chat_format(client: Any) -> None:
    reply = client.chat.completions.create(model=NAME, messages=MESSAGES[1:], max_tokens=4, logprobs=True, top_logprobs=2, seed=1)
    content = reply.choices[0].logprobs.content
    assert len(content) == reply.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in content)


def test_without_max_tokens_an_answer_can_fill_the_context(server: RunningServer, encoder: ChatEncoder) -> None:
    bias = {str(id): -100 for id in (encoder.end_of_turn, encoder.start)}
    long = [{"role": "user", "content": "x" * 60}]
    reply = post(server, messages=long, logit_bias=bias).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["total_tokens"] == 97
    assert post(server, messages=MESSAGES[1:], logit_bias=bias).json()["usage"]["completion_tokens"] == 60


def test_text_parts_are_joined(server: RunningServer) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    replies = [
        post(server, messages=[{"role": "user", "content": content}], seed=1, max_tokens=5).json() for content in (parts, "Hello")
    ]
    assert replies[0]["choices"] == replies[1]["choices"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages: there are no messages"),
        ({}, "messages: Field required"),
        ({"messages": [{"role": "user"}]}, "messages: message 1: has no content"),
        ({"messages": [{"content": "x"}]}, "messages: message 1: has no role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages: message 1: unknown role 'tool' (tools are not supported)"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages: message 1: unknown role 'robot'"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages: message 1: the content of the user message is empty"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages: there is only a system message"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages: message 1: must have the role user, not assistant"),
        ({"messages": [MESSAGES[1], MESSAGES[1]]}, "messages: message 2: must have the role assistant, not user"),
        (
            {"messages": [MESSAGES[1], {"role": "assistant", "content": "x"}]},
            "messages: the last message must have the role user, not assistant",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages: message 1: content must be text; images, audio and files are not supported (here: image_url)",
        ),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, "messages: 204 tokens do not fit into the model's context of 96"),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools: tools are not supported"),
        ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format: only {'type': 'text'} is supported"),
        ({"messages": MESSAGES, "max_tokens": 61}, "max_tokens: must be at most 60"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs: requires logprobs"),
        ({"messages": MESSAGES, "stream_options": {}}, "stream_options: requires stream"),
        ({"messages": MESSAGES, "temprature": 1}, "temprature: unknown key; did you mean temperature?"),
        ({"messages": MESSAGES, "prompt": "x"}, "prompt: send a prompt to /v1/completions"),
    ],
)
def test_invalid_requests_are_rejected_with_the_reason(server: RunningServer, body: dict[str, Any], message: str) -> None:
    assert message in error(server, **body)


def test_harmless_keys_sent_by_clients_are_accepted(server: RunningServer) -> None:
    body = {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "user": "u", "max_completion_tokens": 2}
    assert post(server, messages=MESSAGES, **body).status_code == 200


def test_the_error_for_messages_sent_to_completions_contains_the_chat_route(server: RunningServer) -> None:
    response = server.complete(messages=MESSAGES)
    assert response.status_code == 400
    assert "/v1/chat/completions" in response.json()["error"]["message"]


def test_the_page_is_a_chat_page_and_the_template_is_public(server: RunningServer, encoder: ChatEncoder) -> None:
    page = httpx.get(server.address).text
    assert "v1/chat/completions" in page
    assert httpx.get(f"{server.address}/tokenizer_info").json()["chat_template"] == encoder.jinja()


def test_the_page_streams_answers_and_remembers_the_conversation(server: RunningServer) -> None:
    with browser() as started:
        page = started.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        sent: list[Any] = []
        page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
        page.goto(server.address)
        page.evaluate("document.querySelector('details').open = true")
        page.fill("#system", "Be brief.")
        page.fill("#max_tokens", "4")
        page.fill("#seed", "1")
        for text in ("h\u00e9llo <b>", "more"):
            page.fill("#message", text)
            page.press("#message", "Enter")
            page.wait_for_selector("#go:enabled")
        shown = page.locator("#messages li").all_inner_texts()
        assert len(shown) == 4
        assert shown[0].endswith("h\u00e9llo <b>")
        assert [message["role"] for message in sent[1]["messages"]] == ["system", "user", "assistant", "user"]
        assert sent[1]["messages"][2]["content"] == page.locator("#messages li.assistant span").first.text_content()
        page.fill("#message", "x" * 300)
        page.click("#go")
        page.wait_for_selector("#status.bad")
        assert "the model's context of 96" in page.inner_text("#status")
        assert len(page.locator("#messages li").all()) == 4, "a rejected message must not join the conversation"
        assert page.input_value("#message") == "x" * 300
        page.click("#reset")
        assert page.locator("#messages li").count() == 0
        page.set_viewport_size({"width": 390, "height": 600})
        assert not page.evaluate("document.documentElement.scrollWidth > innerWidth"), "the page must not scroll sideways"
        assert errors == []
