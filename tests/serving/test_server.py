"""The HTTP server, tested with OpenAI's client, with raw HTTP requests and with a browser."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.decoder import Decoder
from tinylm.tokenizer import Tokenizer

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
server = pytest.importorskip("tinylm.serving.server")

NAME = "tiny"
LIMITS = server.Limits(max_body_bytes=10_000, max_tokens=2000, rows=4, queue_size=80, timeout=60.0)


class _RunningServer:
    """A server on a free port, in a thread of this process."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, limits: Any) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        app = server.create_app(decoder, tokenizer, NAME, limits=limits, hosts=("127.0.0.1", "localhost"))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def complete(self, **body: Any) -> Any:
        return httpx.post(f"{self.address}/v1/completions", json=body, timeout=60)

    def wait_until_idle(self, timeout: float = 5.0) -> bool:
        """Wait until no sample is running or queued. Return False after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            load = httpx.get(f"{self.address}/health").json()
            if load["writing"] == load["waiting"] == 0:
                return True
            time.sleep(0.02)
        return False

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def running(decoder: Decoder, tokenizer: Tokenizer) -> Iterator[_RunningServer]:
    running = _RunningServer(decoder, tokenizer, LIMITS)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(running: _RunningServer) -> Any:
    return openai.OpenAI(base_url=f"{running.address}/v1", api_key="none", max_retries=0)


def _generate_locally(decoder: Decoder, tokenizer: Tokenizer, prompt: str, seed: int, tokens: int) -> str:
    options = SamplingOptions(max_new_tokens=tokens, temperature=1.0, top_k=None)
    return generate(decoder, tokenizer, prompt, options, seed=seed)[0].text


def test_openai_client_gets_the_same_text_as_the_library(client: Any, decoder: Decoder, tokenizer: Tokenizer) -> None:
    assert [model.id for model in client.models.list().data] == [NAME]
    response = client.completions.create(model=NAME, prompt="hello", max_tokens=12, seed=4, n=2)
    assert response.choices[0].text == _generate_locally(decoder, tokenizer, "hello", 4, 12)
    assert response.choices[0].text != response.choices[1].text
    assert response.usage.prompt_tokens == 5
    assert response.usage.total_tokens == 5 + response.usage.completion_tokens
    assert {choice.finish_reason for choice in response.choices} <= {"stop", "length"}


def test_a_streamed_response_equals_the_complete_response(client: Any) -> None:
    request = {"model": NAME, "prompt": ["one", "two"], "max_tokens": 15, "seed": 1, "logprobs": 2}
    complete = client.completions.create(**request)
    texts, tokens, reasons, usage = ["", ""], [[], []], [None, None], None
    for chunk in client.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in complete.choices]
    assert tokens == [choice.logprobs.tokens for choice in complete.choices]
    assert reasons == [choice.finish_reason for choice in complete.choices]
    assert usage == complete.usage


def test_logprobs_and_alternatives_match_the_logits(client: Any, decoder: Decoder, tokenizer: Tokenizer) -> None:
    [choice] = client.completions.create(model=NAME, prompt="ab", max_tokens=5, logprobs=3, temperature=0).choices
    with torch.no_grad():
        logprobs = decoder.network(torch.tensor([tokenizer.encode("ab")]))[0, -1].log_softmax(-1)
    assert choice.logprobs.token_logprobs[0] == pytest.approx(float(logprobs.max()), abs=1e-4)
    assert choice.logprobs.text_offset[0] == 0
    content = choice.logprobs.content[0]
    assert [token["id"] for token in content["top_logprobs"]] == logprobs.topk(3).indices.tolist()


def test_every_sampling_option_changes_the_text(running: _RunningServer) -> None:
    default = running.complete(prompt="x", max_tokens=20, temperature=0).json()["choices"][0]["text"]
    for extra in (
        {"temperature": 5.0, "seed": 1},
        {"logit_bias": {"70": 100}},
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"repetition_penalty": 5.0},
        {"forced_ids": [70, 71]},
        {"stop": [default[2]]},
    ):
        body = {"prompt": "x", "max_tokens": 20, "temperature": 0, **extra}
        assert running.complete(**body).json()["choices"][0]["text"] != default, extra
    high_temperature = {"prompt": "x", "max_tokens": 20, "temperature": 5.0, "seed": 1}
    texts = [
        running.complete(**high_temperature, **extra).json()["choices"][0]["text"]
        for extra in ({}, {"top_k": 1}, {"top_p": 0.01}, {"min_p": 0.9})
    ]
    assert texts[0] not in texts[1:]
    assert running.complete(prompt="x", regex="[0-9]{3}", max_tokens=9).json()["choices"][0]["text"].isdigit()
    assert running.complete(prompt="x", choice=["yes", "no"], max_tokens=9).json()["choices"][0]["text"] in ("yes", "no")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": [[999_999]]}, 400, "prompt"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": 10**9}, 400, "max_tokens"),
        ({"max_tokens": "5"}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n"),
        ({"n": 100, "prompt": ["a", "b"]}, 400, "n"),
        ({"logprobs": 99}, 400, "logprobs"),
        ({"stop": ""}, 400, "stop"),
        ({"logit_bias": {"cat": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, 400, "logit_bias"),
        ({"regex": "("}, 400, "regex"),
        ({"regex": r"(a)\1"}, 400, "regex"),
        ({"regex": "a{20}", "max_tokens": 5}, 400, "max_tokens"),
        ({"regex": "a", "stop": "b"}, 400, "stop"),
        ({"echo": True}, 400, "echo"),
        ({"model": "another"}, 404, "model"),
        ({"prompt": "x" * 20_000}, 413, None),
    ],
    ids=str,
)
def test_an_invalid_request_returns_an_error_that_names_the_key(
    running: _RunningServer, body: dict[str, Any], status: int, param: str | None
) -> None:
    response = running.complete(**body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert "\n" not in response.json()["error"]["message"]


def test_malformed_http_requests_are_rejected(running: _RunningServer) -> None:
    url = f"{running.address}/v1/completions"
    json_headers = {"content-type": "application/json"}
    assert httpx.post(url, content=b"{", headers=json_headers).status_code == 400
    assert httpx.post(url, content=b'{"prompt": "\\ud83d"}', headers=json_headers).status_code == 400
    assert httpx.post(url, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.get(url).status_code == 405
    assert httpx.get(f"{running.address}/v2").json()["error"]["message"] == "Not Found"
    assert httpx.get(running.address, headers={"host": "elsewhere.example"}).status_code == 400


def test_concurrent_clients_each_get_their_own_text(running: _RunningServer, decoder: Decoder, tokenizer: Tokenizer) -> None:
    expected = {seed: _generate_locally(decoder, tokenizer, f"client {seed}", seed, 10) for seed in range(64)}

    async def complete_all() -> list[str]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=64)) as clients:
            bodies = [{"prompt": f"client {seed}", "max_tokens": 10, "seed": seed} for seed in range(64)]
            responses = await asyncio.gather(*(clients.post(f"{running.address}/v1/completions", json=body) for body in bodies))
            return [response.json()["choices"][0]["text"] for response in responses]

    assert asyncio.run(complete_all()) == list(expected.values())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_disconnect_frees_the_rows(running: _RunningServer, stream: bool) -> None:
    assert running.wait_until_idle()
    body = json.dumps({"prompt": "x", "max_tokens": 2000, "n": 4, "logit_bias": {"0": -100}, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", int(running.address.rpartition(":")[2]))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        connection.sendall(head.encode() + body)
        while httpx.get(f"{running.address}/health").json()["writing"] == 0:
            time.sleep(0.01)
    assert running.wait_until_idle(timeout=5.0)


def test_a_full_queue_and_a_timeout_are_errors(decoder: Decoder, tokenizer: Tokenizer) -> None:
    busy = _RunningServer(decoder, tokenizer, server.Limits(max_tokens=10**6, rows=1, queue_size=2, timeout=0.5))
    try:
        end = str(tokenizer.end_of_text)
        assert busy.complete(prompt="x", n=4).status_code == 429
        long = {"prompt": "x", "max_tokens": 10**6, "logit_bias": {end: -100}}
        truncated = busy.complete(**long)
        assert (truncated.status_code, truncated.json()["choices"][0]["finish_reason"]) == (200, "length")
        assert truncated.json()["choices"][0]["text"], "the text that was generated before the timeout is returned"
        timed_out = busy.complete(**long, n=2)
        assert (timed_out.status_code, timed_out.json()["error"]["message"]) == (503, "timed out in the queue")
        assert busy.complete(prompt="x", max_tokens=1).status_code == 200
    finally:
        busy.stop()


def _start_browser() -> Any:
    """Start Playwright and Chromium. Skip the test if either is not available."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    session = playwright.sync_playwright().start()
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
    try:
        return session, session.chromium.launch(executable_path=path, args=flags)
    except playwright.Error as error:
        session.stop()
        pytest.skip(f"Chromium does not start: {str(error).splitlines()[0]}")


def test_web_page_generates_text_and_continues_from_an_alternative_token(running: _RunningServer) -> None:
    session, browser = _start_browser()
    try:
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(running.address)
        page.fill("#prompt", "héllo <b>\n")
        page.fill("#max_tokens", "30")
        page.fill("#seed", "7")
        page.click("#go")
        page.wait_for_selector(".t >> nth=12")
        page.wait_for_selector("#stop:disabled")
        tokens = page.locator(".t")
        before = tokens.all_inner_texts()
        assert page.inner_text("#text").startswith("héllo <b>")
        assert "tokens/s" in page.inner_text("#status")
        assert all(name.startswith("t l") for name in tokens.evaluate_all("all => all.map(item => item.className)"))
        tokens.nth(5).click()
        alternative = page.locator("#box button").nth(1)
        alternative_text = alternative.locator("code").inner_text()
        alternative.click()
        page.wait_for_function("() => document.querySelectorAll('.t').length > 8")
        page.wait_for_selector("#stop:disabled")
        after = tokens.all_inner_texts()
        assert after[:5] == before[:5]
        assert alternative_text.strip() in (after[5].strip(), "(empty)", "\ufffd")
        page.keyboard.press("Tab")
        tokens.nth(2).focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        assert page.locator(".t[aria-expanded=true]").get_attribute("data-i") == "3"
        page.keyboard.press("Escape")
        assert page.locator("#box").is_hidden()
        assert errors == []
    finally:
        browser.close()
        session.stop()
