"""Tokenizers convert text to token ids and back. They are trained on text or loaded from a tokenizer.json."""

from tinylm.tokenizer.tokenizer import END_OF_TEXT, StreamDecoder, Tokenizer

__all__ = ["END_OF_TEXT", "StreamDecoder", "Tokenizer"]
