"""Start a headless Chromium to test HTML pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update"]


@contextmanager
def browser() -> Iterator[Any]:
    """Yield a Playwright browser. Skip the test if Playwright or Chromium is not available."""
    playwright = pytest.importorskip("playwright.sync_api", reason="requires playwright")
    path = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as session:
        try:
            started = session.chromium.launch(executable_path=path, args=_FLAGS)
        except playwright.Error as error:
            pytest.skip(f"could not start Chromium: {str(error).splitlines()[0]}")
        try:
            yield started
        finally:
            started.close()
