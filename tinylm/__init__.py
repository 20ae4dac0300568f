"""Train small language models on any text, with measurements you can trust."""

__version__ = "0.1.0"
