"""The inspection of a text that is meant to break the page."""

from __future__ import annotations

import pytest
from inspected import HOSTILE

from tinylm.inspection.overview import Inspection, inspect_text
from tinylm.run import Run


@pytest.fixture(scope="session")
def hostile(tiny_run: Run) -> Inspection:
    """The inspection of the first 32 tokens of `HOSTILE`, a full context of the model."""
    return inspect_text(tiny_run, HOSTILE)
