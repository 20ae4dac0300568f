"""Standalone HTML pages fit a phone screen and load nothing from the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browser

from tinylm.embedding.plot import draw
from tinylm.embedding.vectors import Vectors
from tinylm.evaluation.evaluate_run import BreakdownOptions, evaluate_run
from tinylm.run import Run
from tinylm.tokenizer.explain import as_html, explain

PHONE = {"width": 390, "height": 700}
LONG = "https://example.org/" + "a_very_long_word" * 20


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


def _evaluation(file: Path, run: Run) -> None:
    text = file.with_name("text.txt")
    text.write_text(f"The for statement. {LONG} <script>fetch('http://example.org')</script>\n" * 3)
    evaluate_run(run, [str(text)], device="cpu", details=BreakdownOptions(html=file))


def _explanation(file: Path, run: Run) -> None:
    file.write_text(as_html(explain(run.tokenizer, f"The for statement. {LONG}"), "tokens"), encoding="utf-8")


def _map(file: Path, run: Run) -> None:
    names = [f"word{number}" for number in range(199)] + [LONG]
    draw(Vectors(names, np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)), file)


@pytest.mark.parametrize("write", [_evaluation, _explanation, _map])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fits_a_phone_screen_and_requests_nothing(
    write: Callable[[Path, Run], None], scheme: str, chromium: Any, tiny_run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    write(file, tiny_run)
    page = chromium.new_page(viewport=PHONE, color_scheme=scheme)
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.inner_text("body").strip()
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [file.as_uri()]
    assert errors == []
    page.close()
