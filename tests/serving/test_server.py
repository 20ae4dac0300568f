"""Serving: what OpenAI's own client gets, what a person in a browser sees, and what happens to those who ask too much."""

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
from tiny import model

from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.decoder import Decoder
from tinylm.recipe.schema import ByteTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
server = pytest.importorskip("tinylm.serving.server")

NAME = "tiny"
LIMITS = server.Limits(body_bytes=10_000, tokens=2000, rows=4, waiting=80, seconds=60.0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return training.train(ByteTokenizer(kind="byte"), iter([Piece("text", True)]), print)


@pytest.fixture(scope="module")
def decoder(tokenizer: Tokenizer) -> Decoder:
    return Decoder(model("modern", vocabulary=tokenizer.vocab_size, context_length=64))


class _Running:
    """A server in a thread of this process, on a port of its own."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, limits: Any) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        app = server.application(decoder, tokenizer, NAME, limits=limits, hosts=("127.0.0.1", "localhost"))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def ask(self, **body: Any) -> Any:
        return httpx.post(f"{self.address}/v1/completions", json=body, timeout=60)

    def idle(self, within: float = 5.0) -> bool:
        """Whether nothing is being written or waits, within a few seconds."""
        until = time.monotonic() + within
        while time.monotonic() < until:
            load = httpx.get(f"{self.address}/health").json()
            if load["writing"] == load["waiting"] == 0:
                return True
            time.sleep(0.02)
        return False

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def running(decoder: Decoder, tokenizer: Tokenizer) -> Iterator[_Running]:
    one = _Running(decoder, tokenizer, LIMITS)
    yield one
    one.stop()


@pytest.fixture(scope="module")
def client(running: _Running) -> Any:
    return openai.OpenAI(base_url=f"{running.address}/v1", api_key="none", max_retries=0)


def _library(decoder: Decoder, tokenizer: Tokenizer, prompt: str, seed: int, tokens: int) -> str:
    options = SamplingOptions(max_new_tokens=tokens, temperature=1.0, top_k=None)
    return generate(decoder, tokenizer, prompt, options, seed=seed)[0].text


def test_openais_client_gets_what_the_library_writes(client: Any, decoder: Decoder, tokenizer: Tokenizer) -> None:
    assert [one.id for one in client.models.list().data] == [NAME]
    answer = client.completions.create(model=NAME, prompt="hello", max_tokens=12, seed=4, n=2)
    assert answer.choices[0].text == _library(decoder, tokenizer, "hello", 4, 12)
    assert answer.choices[0].text != answer.choices[1].text
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.total_tokens == 5 + answer.usage.completion_tokens
    assert {choice.finish_reason for choice in answer.choices} <= {"stop", "length"}


def test_a_stream_is_the_same_text_in_pieces_and_says_when_it_ends(client: Any) -> None:
    asked = {"model": NAME, "prompt": ["one", "two"], "max_tokens": 15, "seed": 1, "logprobs": 2}
    whole = client.completions.create(**asked)
    texts, tokens, reasons, usage = ["", ""], [[], []], [None, None], None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_probabilities_offsets_and_alternatives_are_those_of_the_text(client: Any, decoder: Decoder, tokenizer: Tokenizer) -> None:
    [choice] = client.completions.create(model=NAME, prompt="ab", max_tokens=5, logprobs=3, temperature=0).choices
    with torch.no_grad():
        logprobs = decoder.network(torch.tensor([tokenizer.encode("ab")]))[0, -1].log_softmax(-1)
    assert choice.logprobs.token_logprobs[0] == pytest.approx(float(logprobs.max()), abs=1e-4)
    assert choice.logprobs.text_offset[0] == 0
    content = choice.logprobs.content[0]
    assert [one["id"] for one in content["top_logprobs"]] == logprobs.topk(3).indices.tolist()


def test_every_option_has_its_effect(running: _Running) -> None:
    plain = running.ask(prompt="x", max_tokens=20, temperature=0).json()["choices"][0]["text"]
    for extra in (
        {"temperature": 5.0, "seed": 1},
        {"logit_bias": {"70": 100}},
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"repetition_penalty": 5.0},
        {"forced_ids": [70, 71]},
        {"stop": [plain[2]]},
    ):
        body = {"prompt": "x", "max_tokens": 20, "temperature": 0, **extra}
        assert running.ask(**body).json()["choices"][0]["text"] != plain, extra
    hot = {"prompt": "x", "max_tokens": 20, "temperature": 5.0, "seed": 1}
    texts = [
        running.ask(**hot, **extra).json()["choices"][0]["text"] for extra in ({}, {"top_k": 1}, {"top_p": 0.01}, {"min_p": 0.9})
    ]
    assert texts[0] not in texts[1:]
    assert running.ask(prompt="x", regex="[0-9]{3}", max_tokens=9).json()["choices"][0]["text"].isdigit()
    assert running.ask(prompt="x", choice=["yes", "no"], max_tokens=9).json()["choices"][0]["text"] in ("yes", "no")


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
def test_a_wrong_request_is_told_what_is_wrong(running: _Running, body: dict[str, Any], status: int, param: str | None) -> None:
    answer = running.ask(**body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert "\n" not in answer.json()["error"]["message"]


def test_what_is_no_request_at_all_is_refused_too(running: _Running) -> None:
    at = f"{running.address}/v1/completions"
    kind = {"content-type": "application/json"}
    assert httpx.post(at, content=b"{", headers=kind).status_code == 400
    assert httpx.post(at, content=b'{"prompt": "\\ud83d"}', headers=kind).status_code == 400
    assert httpx.post(at, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.get(at).status_code == 405
    assert httpx.get(f"{running.address}/v2").json()["error"]["message"] == "Not Found"
    assert httpx.get(running.address, headers={"host": "elsewhere.example"}).status_code == 400


def test_many_clients_at_once_each_get_their_own_text(running: _Running, decoder: Decoder, tokenizer: Tokenizer) -> None:
    expected = {seed: _library(decoder, tokenizer, f"client {seed}", seed, 10) for seed in range(64)}

    async def ask_all() -> list[str]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=64)) as clients:
            bodies = [{"prompt": f"client {seed}", "max_tokens": 10, "seed": seed} for seed in range(64)]
            answers = await asyncio.gather(*(clients.post(f"{running.address}/v1/completions", json=body) for body in bodies))
            return [answer.json()["choices"][0]["text"] for answer in answers]

    assert asyncio.run(ask_all()) == list(expected.values())


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_place(running: _Running, stream: bool) -> None:
    assert running.idle()
    body = json.dumps({"prompt": "x", "max_tokens": 2000, "n": 4, "logit_bias": {"0": -100}, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", int(running.address.rpartition(":")[2]))) as line:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        line.sendall(head.encode() + body)
        while httpx.get(f"{running.address}/health").json()["writing"] == 0:
            time.sleep(0.01)
    begun = time.monotonic()
    assert running.idle()
    assert time.monotonic() - begun < 5


def test_who_comes_too_many_or_takes_too_long_is_told(decoder: Decoder, tokenizer: Tokenizer) -> None:
    busy = _Running(decoder, tokenizer, server.Limits(tokens=10**6, rows=1, waiting=2, seconds=0.5))
    try:
        end = str(tokenizer.end_of_text)
        assert busy.ask(prompt="x", n=4).status_code == 429
        long = {"prompt": "x", "max_tokens": 10**6, "logit_bias": {end: -100}}
        cut = busy.ask(**long)
        assert (cut.status_code, cut.json()["choices"][0]["finish_reason"]) == (200, "length")
        assert cut.json()["choices"][0]["text"], "what was written in time is given"
        none_free = busy.ask(**long, n=2)
        assert (none_free.status_code, none_free.json()["error"]["message"]) == (503, "no free place in time")
        assert busy.ask(prompt="x", max_tokens=1).status_code == 200
    finally:
        busy.stop()


def _browser() -> Any:
    """Chromium, wherever it is, or the reason why the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    opened = playwright.sync_playwright().start()
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
    try:
        return opened, opened.chromium.launch(executable_path=path, args=quiet)
    except playwright.Error as error:
        opened.stop()
        pytest.skip(f"no Chromium that starts: {str(error).splitlines()[0]}")


def test_a_person_writes_opens_a_token_and_chooses_another(running: _Running) -> None:
    playwright, browser = _browser()
    try:
        page = browser.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
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
        assert all(name.startswith("t l") for name in tokens.evaluate_all("all => all.map(one => one.className)"))
        tokens.nth(5).click()
        chosen = page.locator("#box button").nth(1)
        wanted = chosen.locator("code").inner_text()
        chosen.click()
        page.wait_for_function("() => document.querySelectorAll('.t').length > 8")
        page.wait_for_selector("#stop:disabled")
        after = tokens.all_inner_texts()
        assert after[:5] == before[:5]
        assert wanted.strip() in (after[5].strip(), "(nothing)", "\ufffd")
        page.keyboard.press("Tab")
        tokens.nth(2).focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        assert page.locator(".t[aria-expanded=true]").get_attribute("data-i") == "3"
        page.keyboard.press("Escape")
        assert page.locator("#box").is_hidden()
        assert faults == []
    finally:
        browser.close()
        playwright.stop()
