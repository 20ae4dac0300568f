"""Read and fill the HTML templates in this package. In a template, `{{NAME}}` stands for a value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources


def read(name: str) -> str:
    """Return the contents of a file in this package."""
    return resources.files("tinylm.inspection").joinpath(name).read_text(encoding="utf-8")


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace all placeholders in one pass, so that placeholders inside values are not replaced."""
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: values[match[1]], template)
