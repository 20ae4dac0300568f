"""Fixtures for the inspection pages: text designed to break the page, and a browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browser import browser
from inspected import HOSTILE

from tinylm.inspection.overview import Inspection, inspect_text
from tinylm.run import Run


@pytest.fixture(scope="session")
def hostile(tiny_run: Run) -> Inspection:
    """Inspect the first 32 tokens of `HOSTILE`, which fill the model's context."""
    return inspect_text(tiny_run, HOSTILE)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Yield a browser, which all tests of a module share."""
    with browser() as started:
        yield started
