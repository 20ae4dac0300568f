"""The HTTP server for translation models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pairs import network

from tinylm.data.bucketed_pairs import PairFraming
from tinylm.recipe.schema import ByteTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import training
from tinylm.translation.search import SearchOptions
from tinylm.translation.translator import Translator

pytest.importorskip("httpx")
testclient = pytest.importorskip("starlette.testclient")
server = pytest.importorskip("tinylm.serving.server")
translation = pytest.importorskip("tinylm.serving.translation")


@pytest.fixture(scope="module")
def translator() -> Translator:
    tokenizer = training.train(ByteTokenizer(kind="byte"), iter([Piece("text", True)]), print)
    return Translator(network(vocab_size=tokenizer.vocab_size), PairFraming(tokenizer, tokenizer, 24))


@pytest.fixture(scope="module")
def client(translator: Translator) -> Iterator[Any]:
    limits = server.Limits(max_body_bytes=5000)
    with testclient.TestClient(translation.create_app(translator, "tiny", limits=limits)) as client:
        yield client


def test_the_server_returns_the_same_translations_as_the_library(client: Any, translator: Translator) -> None:
    texts = ["eins zwei", "", "drei"]
    response = client.post("/v1/translate", json={"text": texts, "beams": 2, "n": 2})
    assert response.status_code == 200, response.text
    expected = translator.translate(texts, SearchOptions(beams=2, n_best=2))
    actual = [[candidate["text"] for candidate in item["translations"]] for item in response.json()["data"]]
    assert actual == [[candidate.text for candidate in item.translations] for item in expected]
    assert response.json()["data"][1]["note"] == "empty"


def test_the_page_has_a_field_for_the_target_language_if_there_are_several(client: Any) -> None:
    assert 'id="to"' not in client.get("/").text
    tokenizer = training.train(ByteTokenizer(kind="byte", special_tokens=("<2de>", "<2fr>")), iter([Piece("text", True)]), print)
    multilingual = Translator(network(vocab_size=tokenizer.vocab_size), PairFraming(tokenizer, tokenizer, 24))
    with testclient.TestClient(translation.create_app(multilingual, "tiny")) as other:
        assert '<select id="to"><option>de</option><option>fr</option></select>' in other.get("/").text
        assert other.post("/v1/translate", json={"text": "eins", "to": "fr"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"text": 3}, 400),
        ({"text": "a", "beams": 0}, 400),
        ({"text": "a", "beams": 99}, 400),
        ({"text": "a", "n": 6}, 400),
        ({"text": "a", "to": "de"}, 400),
        ({"text": "a", "model": "other"}, 404),
        ({"text": ["a"] * 300}, 400),
        ({"text": "a" * 6000}, 413),
    ],
)
def test_invalid_requests_are_rejected(client: Any, body: dict[str, Any], status: int) -> None:
    response = client.post("/v1/translate", json=body)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_the_api_key_is_required_if_one_is_set(translator: Translator) -> None:
    app = translation.create_app(translator, "tiny", access=server.Access(api_key="secret"))
    with testclient.TestClient(app) as client:
        assert client.post("/v1/translate", json={"text": "a"}).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert client.post("/v1/translate", json={"text": "a", "beams": 1}, headers=headers).status_code == 200
        assert client.get("/").status_code == 200
        assert client.get("/health").json()["status"] == "ok"
