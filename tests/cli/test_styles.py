"""Test that colors are readable on black and on white. WCAG 2 requires a contrast of at least 3 for large shapes and bold text."""

from __future__ import annotations

import pytest
from rich.style import Style
from tinylm_cli import styles

NAMES = [name for name in vars(styles) if name.isupper()]


def luminance(style: str) -> float:
    color = Style.parse(style).color
    assert color is not None
    channels = [value / 255 for value in color.get_truecolor()]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", NAMES)
def test_every_color_is_readable_on_light_and_dark_backgrounds(name: str) -> None:
    value = luminance(getattr(styles, name))
    assert 1.05 / (value + 0.05) >= 3, "on white"
    assert (value + 0.05) / 0.05 >= 3, "on black"
