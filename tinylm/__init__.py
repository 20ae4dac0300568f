"""tinylm turns any text into a small language model whose every number can be trusted."""

__version__ = "0.1.0"
