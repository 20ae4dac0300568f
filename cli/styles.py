"""Colors for the command line. They are readable on light and dark backgrounds.

No distinction depends on color alone: without color (NO_COLOR), markers, labels and font styles make the same distinctions.
"""

from __future__ import annotations

TRAINING = "color(32)"
"""Blue: values on the training text."""
HELDOUT = "bold color(166)"
"""Orange: values on the held-out text."""
WARNING = "bold color(166)"
"""Orange: warnings, and notes that need attention."""
FRAME = "color(32)"
