"""A fixture that inspects text designed to break the page."""

from __future__ import annotations

import pytest
from inspected import HOSTILE

from tinylm.inspection.overview import Inspection, inspect_text
from tinylm.run import Run


@pytest.fixture(scope="session")
def hostile(tiny_run: Run) -> Inspection:
    """Inspect the first 32 tokens of `HOSTILE`, which fill the model's context."""
    return inspect_text(tiny_run, HOSTILE)
