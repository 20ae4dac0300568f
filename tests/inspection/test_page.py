"""The inspection page works offline, with the keyboard, in both themes and on small screens, and it escapes all text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inspected import HOSTILE

from tinylm.errors import InputError
from tinylm.inspection.encoding import encode
from tinylm.inspection.heldout import heldout_windows
from tinylm.inspection.learning import select_checkpoints, view_checkpoints
from tinylm.inspection.overview import Inspection
from tinylm.inspection.page import PageOptions, render
from tinylm.run import Run

PARTS = (
    "tokens",
    "embeddings",
    "attention",
    "residual",
    "neurons",
    "lens",
    "attribution",
    "sampling",
    "effects",
    "learning",
    "formulas",
)


@pytest.fixture(scope="module")
def page_file(hostile: Inspection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = hostile.run
    ids = [token.id for token in hostile.tokens]
    [last] = view_checkpoints(run, ids, select_checkpoints(run, "all"), pattern_tokens=8)
    views = [replace(last, step=10), last]
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(render(hostile, views, PageOptions(corrupt=HOSTILE.replace("DATA", "BATA"), ablation_tokens=64)))
    return path


def _data(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    data: dict[str, Any] = json.loads(match[1])
    return data


def test_the_page_is_one_file_without_references_to_other_files(page_file: Path) -> None:
    page = page_file.read_text()
    assert page.count("</script>") == 2
    assert not re.search(r"(src|href)=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page)
    assert "{{DATA}}" in _data(page)["tokens"]["rows"][0]["text"] + "".join(row["text"] for row in _data(page)["tokens"]["rows"])


def test_arrays_survive_encoding() -> None:
    values = torch.tensor([[0.0, 0.25], [0.5, 1.0]])
    for kind, dtype in (("f4", "<f4"), ("f2", "<f2")):
        stored = encode(values, kind)  # type: ignore[arg-type]
        assert stored["shape"] == [2, 2]
        assert np.frombuffer(_bytes(stored["data"]), dtype).tolist() == [0.0, 0.25, 0.5, 1.0]
    assert np.frombuffer(_bytes(encode(values, "u1")["data"]), "u1").tolist() == [0, 64, 128, 255]
    assert np.frombuffer(_bytes(encode(values, "u2")["data"]), "<u2").tolist() == [0, 16384, 32768, 65535]
    assert np.frombuffer(_bytes(encode(torch.tensor([-1, 70000]), "i4")["data"]), "<i4").tolist() == [-1, 70000]


def _bytes(text: str) -> bytes:
    import base64

    return base64.b64decode(text)


def test_a_corrupt_text_of_a_different_length_is_rejected(hostile: Inspection) -> None:
    with pytest.raises(InputError, match=r"--corrupt: has 1 tokens, but the text has 32"):
        render(hostile, [], PageOptions(corrupt="a", ablation_tokens=0))


def test_held_out_windows_contain_the_text_in_order(tiny_run: Run) -> None:
    windows = heldout_windows(tiny_run, 256)
    tokens = np.asarray(tiny_run.heldout().tokens)
    assert windows.inputs.shape == (8, 32)
    for inputs, targets in zip(windows.inputs.numpy(), windows.targets.numpy(), strict=True):
        row = [*inputs.tolist(), int(targets[-1])]
        starts = [start for start in range(len(tokens) - 32) if tokens[start : start + 33].tolist() == row]
        assert starts or targets[-1] == -1
        assert [b if b >= 0 else None for b in targets[:-1]] == [
            b if b != tiny_run.tokenizer.end_of_text else None for b in inputs[1:].tolist()
        ]
    scored = windows.targets[windows.targets >= 0].tolist()
    assert (windows.scored, windows.bytes) == (len(scored), sum(len(tiny_run.tokenizer.token_bytes[id]) for id in scored))


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_the_page_works_in_a_browser(width: int, scheme: str, chromium: Any, page_file: Path) -> None:
    problems: list[str] = []
    with chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme) as page:
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
        page.on("request", lambda request: problems.append(request.url) if not request.url.startswith("file:") else None)
        page.goto(page_file.as_uri())
        _check_parts(page)
        _check_keyboard(page)
        _check_numbers(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
        assert page.evaluate("document.querySelectorAll('#tokens b, #words b').length") == 0, "the text was parsed as HTML"
    assert problems == []


def _check_parts(page: Any) -> None:
    """Check that every section has content and that hostile characters are shown as escapes."""
    for part in PARTS:
        assert len(page.inner_text(f"#p-{part}")) > 100, part
    shown = page.inner_text("#tokens")
    assert "<" in shown
    assert "\\u{0}" in shown
    assert "\\u{202e}" in page.text_content("#words")
    assert "\u202e" not in page.text_content("body main")


def _check_keyboard(page: Any) -> None:
    """Check that the Tab and arrow keys reach tokens, heads, lens cells, sliders and menus."""
    page.locator("#tokens .t").first.click()
    assert page.inner_text("#current").startswith("token 0 of 32")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#current").startswith("token 2 of 32")
    reached = set()
    for _ in range(90):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('section')?.id"))
    assert {"p-attention", "p-neurons", "p-lens", "p-attribution", "p-sampling", "p-learning"} <= reached
    page.locator(".heads button").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".heads .selected").get_attribute("aria-label").startswith("layer 0 head 1")
    page.locator("#looks .t").nth(3).focus()
    assert page.inner_text("#looks-text").startswith("Token 3 ")
    page.locator("#slider-top-k").focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#distribution").startswith("1 of ")
    page.locator("#checkpoint-slider").focus()
    page.keyboard.press("Home")
    assert page.locator("#checkpoint-slider").get_attribute("aria-valuetext") == "step 10"
    page.locator("#parts").focus()
    page.select_option("#parts", "p-lens")
    assert page.evaluate("document.activeElement.id") == "p-lens"


def _check_numbers(page: Any) -> None:
    """Check that the bars add up to the logit and that the attention weight computed by hand matches the model's."""
    remainder = re.search(r"remainder (\S+)\. The", page.inner_text("#attribution-sum"))
    assert remainder is not None
    assert abs(float(remainder[1])) < 1e-3
    page.locator("#by-hand summary").click()
    steps = page.inner_text("#by-hand ol")
    by_hand, model = re.search(r"= (\d\.\d{4})\n", steps), re.search(r"the model computed (\d\.\d+)", steps)
    assert by_hand is not None
    assert model is not None
    assert float(by_hand[1]) == pytest.approx(float(model[1]), abs=2e-3)
