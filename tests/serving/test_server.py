"""The HTTP server, tested with the openai client, raw HTTP requests and a browser."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
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
pytest.importorskip("uvicorn")
server = pytest.importorskip("tinylm.serving.server")
from running_server import NAME, RunningServer  # noqa: E402 - imports the optional packages checked above

LIMITS = server.Limits(max_body_bytes=10_000, max_tokens=2000, rows=4, queue_size=80, timeout=60.0)


@pytest.fixture(scope="module")
def running(decoder: Decoder, tokenizer: Tokenizer) -> Iterator[RunningServer]:
    running = RunningServer(decoder, tokenizer, LIMITS)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def openai() -> Any:
    """Return the openai package. Importing it takes a second, which test processes without these tests save."""
    return pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(running: RunningServer, openai: Any) -> Any:
    return openai.OpenAI(base_url=f"{running.address}/v1", api_key="none", max_retries=0)


def _generate_locally(decoder: Decoder, tokenizer: Tokenizer, prompt: str, seed: int, tokens: int) -> str:
    options = SamplingOptions(max_new_tokens=tokens, temperature=1.0, top_k=None)
    return generate(decoder, tokenizer, prompt, options, seed=seed)[0].text


def test_the_openai_client_receives_the_same_text_as_the_library(client: Any, decoder: Decoder, tokenizer: Tokenizer) -> None:
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


def test_every_sampling_option_changes_the_text(running: RunningServer) -> None:
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
        ({"suffix": "b"}, 400, "suffix"),
        ({"best_of": 2}, 400, "best_of"),
        ({"messages": []}, 400, "messages"),
        ({"temprature": 1}, 400, "temprature"),
        ({"echo": True, "logprobs": 1, "prompt": "x" * 66}, 400, "prompt"),
        ({"stop": ["a"] * 17}, 400, "stop"),
        ({"stop": "z" * 1001}, 400, "stop"),
        ({"choice": []}, 400, "choice"),
        ({"logit_bias": {"\u00b2": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"1" * 5000: 1}}, 400, "logit_bias"),
        ({"logit_bias": {str(id): 1 for id in range(301)}}, 400, "logit_bias"),
        ({"regex": "a{99999999999}"}, 400, "regex"),
        ({"regex": "(" * 3000 + "a" + ")" * 3000}, 400, "regex"),
        ({"model": "another"}, 404, "model"),
        ({"prompt": "x" * 20_000}, 413, None),
    ],
    ids=str,
)
def test_the_error_for_an_invalid_request_names_the_parameter(
    running: RunningServer, body: dict[str, Any], status: int, param: str | None
) -> None:
    response = running.complete(**body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert "\n" not in response.json()["error"]["message"]


def test_malformed_http_requests_are_rejected(running: RunningServer) -> None:
    url = f"{running.address}/v1/completions"
    json_headers = {"content-type": "application/json"}
    assert httpx.post(url, content=b"{", headers=json_headers).status_code == 400
    assert httpx.post(url, content=b'{"prompt": "\\ud83d"}', headers=json_headers).status_code == 400
    assert httpx.post(url, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.get(url).status_code == 405
    assert httpx.get(f"{running.address}/v2").json()["error"]["message"] == "Not Found"
    assert httpx.get(running.address, headers={"host": "elsewhere.example"}).status_code == 400


def test_concurrent_clients_each_get_their_own_text(running: RunningServer, decoder: Decoder, tokenizer: Tokenizer) -> None:
    expected = {seed: _generate_locally(decoder, tokenizer, f"client {seed}", seed, 10) for seed in range(64)}

    async def complete_all() -> list[str]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=64)) as clients:
            bodies = [{"prompt": f"client {seed}", "max_tokens": 10, "seed": seed} for seed in range(64)]
            responses = await asyncio.gather(*(clients.post(f"{running.address}/v1/completions", json=body) for body in bodies))
            return [response.json()["choices"][0]["text"] for response in responses]

    assert asyncio.run(complete_all()) == list(expected.values())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_disconnect_frees_its_batch_slots(running: RunningServer, stream: bool) -> None:
    assert running.wait_until_idle()
    body = json.dumps({"prompt": "x", "max_tokens": 2000, "n": 4, "logit_bias": {"0": -100}, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", int(running.address.rpartition(":")[2]))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        connection.sendall(head.encode() + body)
        while httpx.get(f"{running.address}/health").json()["generating"] == 0:
            time.sleep(0.01)
    assert running.wait_until_idle(timeout=5.0)


def test_a_full_queue_and_a_timeout_are_reported(decoder: Decoder, tokenizer: Tokenizer) -> None:
    busy = RunningServer(decoder, tokenizer, server.Limits(max_tokens=10**6, rows=1, queue_size=2, timeout=0.5))
    try:
        end = str(tokenizer.end_of_text)
        assert busy.complete(prompt="x", n=4).status_code == 400, "four samples never fit in the queue"
        long = {"prompt": "x", "max_tokens": 10**6, "logit_bias": {end: -100}}
        truncated = busy.complete(**long)
        assert (truncated.status_code, truncated.json()["choices"][0]["finish_reason"]) == (200, "length")
        assert truncated.json()["choices"][0]["text"], "text generated before the timeout must be returned"
        timed_out = busy.complete(**long, n=2)
        assert (timed_out.status_code, timed_out.json()["error"]["message"]) == (503, "timed out in the queue")
        assert busy.complete(prompt="x", max_tokens=1).status_code == 200
    finally:
        busy.stop()


def test_more_samples_than_rows_wait_and_more_than_can_wait_are_rejected(decoder: Decoder, tokenizer: Tokenizer) -> None:
    small = RunningServer(decoder, tokenizer, server.Limits(rows=1, queue_size=1))
    try:
        assert len(small.complete(prompt="x", max_tokens=2, n=2).json()["choices"]) == 2
        rejected = small.complete(prompt="x", max_tokens=2, n=3)
        assert (rejected.status_code, rejected.json()["error"]["param"]) == (400, "n")
        assert "must be at most 2" in rejected.json()["error"]["message"]
    finally:
        small.stop()


def test_null_and_neutral_values_are_accepted(running: RunningServer) -> None:
    plain = running.complete(prompt="The", max_tokens=2, seed=1).json()["choices"][0]["text"]
    nulls = dict.fromkeys(server.api.CompletionRequest.model_fields)
    neutral = {"echo": False, "best_of": 1, "suffix": "", "top_k": -1, "min_p": 0.0, "stop": [], "logit_bias": {}}
    for extra in (nulls, neutral):
        response = running.complete(**{**extra, "prompt": "The", "max_tokens": 2, "seed": 1})
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["text"] == plain


@pytest.mark.parametrize("stream", [False, True])
def test_echo_returns_the_prompt_with_its_logprobs(client: Any, decoder: Decoder, tokenizer: Tokenizer, stream: bool) -> None:
    arguments = {
        "model": NAME,
        "prompt": "ab c",
        "max_tokens": 2,
        "logprobs": 1,
        "seed": 1,
        "logit_bias": {str(tokenizer.end_of_text): -100},
    }
    expected = client.completions.create(**arguments).choices[0].text
    response = client.completions.create(**arguments, echo=True, stream=stream)
    choices = [chunk.choices[0] for chunk in (response if stream else [response])]
    assert "".join(choice.text for choice in choices) == "ab c" + expected
    values = [value for choice in choices for value in choice.logprobs.token_logprobs]
    offsets = [value for choice in choices for value in choice.logprobs.text_offset]
    ids = torch.tensor([tokenizer.encode("ab c")])
    with torch.no_grad():
        logprobs = decoder.network(ids)[0].log_softmax(-1)
    assert values[0] is None
    assert values[1:4] == pytest.approx(logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist(), abs=1e-4)
    assert len(values) == 6
    assert offsets[:5] == [0, 1, 2, 3, 4]


def test_an_error_in_one_request_does_not_abort_other_requests(running: RunningServer, tokenizer: Tokenizer) -> None:
    async def complete_both() -> list[Any]:
        async with httpx.AsyncClient(timeout=60) as clients:
            normal = {"prompt": "x", "max_tokens": 300, "logit_bias": {str(tokenizer.end_of_text): -100}, "seed": 1}
            banned = {"prompt": "x", "regex": "b*a", "logit_bias": {str(id): -100 for id in tokenizer.encode("ab")}}
            url = f"{running.address}/v1/completions"
            return await asyncio.gather(*(clients.post(url, json=body) for body in (normal, banned, normal)))

    first, failed, second = asyncio.run(complete_both())
    assert (failed.status_code, failed.json()["error"]["param"]) == (400, "logit_bias")
    assert first.status_code == second.status_code == 200
    assert first.json()["choices"][0]["text"] == second.json()["choices"][0]["text"]
    assert first.json()["usage"]["completion_tokens"] == 300


def test_a_client_that_closes_its_side_of_the_connection_still_receives_its_response(running: RunningServer) -> None:
    body = b'{"prompt": "x", "max_tokens": 3}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(running.address.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(head % len(body) + body)
        connection.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b" 200 OK" in received
    assert received.rstrip().endswith(b"}")


def test_slow_and_idle_connections_are_closed(decoder: Decoder, tokenizer: Tokenizer) -> None:
    limits = server.Limits(connections=server.ConnectionLimits(maximum=3, headers=0.3, body=0.3))
    slow = RunningServer(decoder, tokenizer, limits)
    address = ("127.0.0.1", int(slow.address.rpartition(":")[2]))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
    try:
        for beginning in (head, head + b"\r\n{"):
            with socket.create_connection(address, timeout=30) as connection:
                connection.sendall(beginning)
                assert connection.recv(100).startswith(b"HTTP/1.1 408")
        with socket.create_connection(address, timeout=30) as connection:
            assert connection.recv(100) == b"", "an idle connection must be closed"
        idle = [socket.create_connection(address, timeout=30) for _ in range(6)]
        assert slow.complete(prompt="x", max_tokens=1).status_code == 200, "idle connections must not block other clients"
        for connection in idle:
            connection.close()
    finally:
        slow.stop()


def test_the_models_tokenize_health_and_metrics_routes_respond(running: RunningServer, tokenizer: Tokenizer) -> None:
    get = lambda path: httpx.get(f"{running.address}{path}")  # noqa: E731
    assert get(f"/v1/models/{NAME}").json()["id"] == NAME
    assert get("/v1/models/a/b").status_code == 404
    tokens = httpx.post(f"{running.address}/tokenize", json={"prompt": "héllo"}).json()
    assert (tokens["tokens"], tokens["count"]) == (tokenizer.encode("héllo"), 6)
    assert httpx.post(f"{running.address}/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "héllo"}
    assert httpx.post(f"{running.address}/detokenize", json={"tokens": [999]}).status_code == 400
    assert get("/tokenizer_info").json()["eos_token"] == "<|endoftext|>"
    chat = httpx.post(f"{running.address}/v1/chat/completions", json={"messages": []})
    assert chat.status_code == 404
    assert "send a `prompt` to /v1/completions" in chat.json()["error"]["message"]
    health = get("/health").json()
    assert (health["status"], health["parsing"], health["compiling"]) == ("ok", 0, 0)
    running.complete(prompt="xyz", max_tokens=1)
    metrics = get("/metrics").text
    assert 'tinylm_responses_total{route="/v1/completions",status="200"}' in metrics
    assert "# TYPE tinylm_generated_tokens_total counter" in metrics


def test_an_api_key_is_required_except_for_the_page_and_health(decoder: Decoder, tokenizer: Tokenizer, openai: Any) -> None:
    locked = RunningServer(decoder, tokenizer, server.Limits(), api_key="secret")
    try:
        assert locked.complete(prompt="x").status_code == 401
        for path, status in (("/", 200), ("/health", 200), ("/metrics", 401), ("/v1/models", 401)):
            assert httpx.get(f"{locked.address}{path}").status_code == status
        wrong = {"Authorization": "Bearer secre"}
        assert httpx.get(f"{locked.address}/v1/models", headers=wrong).status_code == 401
        models = openai.OpenAI(base_url=f"{locked.address}/v1", api_key="secret", max_retries=0).models.list()
        assert [model.id for model in models.data] == [NAME]
    finally:
        locked.stop()


def _start_browser() -> Any:
    """Start Playwright and Chromium. Skip the test if either is unavailable."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    session = playwright.sync_playwright().start()
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
    try:
        return session, session.chromium.launch(executable_path=path, args=flags)
    except playwright.Error as error:
        session.stop()
        pytest.skip(f"could not start Chromium: {str(error).splitlines()[0]}")


def test_the_web_page_generates_text_and_continues_from_an_alternative_token(running: RunningServer) -> None:
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
        page.fill("#max_tokens", "")
        page.click("#go")
        assert page.inner_text("#status") == "max tokens: enter a number"
        assert tokens.all_inner_texts() == before
        page.fill("#max_tokens", "30")
        assert not page.locator("#key_label").is_visible()
        tokens.nth(5).click()
        assert page.locator("#box th").all_inner_texts() == ["token", "model", "sampled"]
        alternative = page.locator("#box button").nth(1)
        alternative_text = alternative.locator("code").inner_text()
        alternative.click()
        page.wait_for_function("() => document.querySelectorAll('.t').length > 8")
        page.wait_for_selector("#stop:disabled")
        after = tokens.all_inner_texts()
        assert after[:5] == before[:5]
        assert alternative_text.strip() in (after[5].strip(), "(empty)", "\ufffd")
        assert page.locator(".t.branch").evaluate_all("all => all.map(item => item.dataset.i)") == ["5"]
        page.set_viewport_size({"width": 390, "height": 500})
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        tokens.last.click()
        bounds = page.locator("#box").bounding_box()
        assert bounds["y"] >= 0, "the list must stay inside the window"
        assert bounds["y"] + bounds["height"] <= 500
        assert not page.evaluate("document.documentElement.scrollWidth > innerWidth"), "the page must not scroll sideways"
        page.keyboard.press("Escape")
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
