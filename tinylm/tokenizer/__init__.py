"""Tokenizers: text to ids and back, trained here or read from a tokenizer.json."""

from tinylm.tokenizer.tokenizer import END_OF_TEXT, StreamDecoder, Tokenizer

__all__ = ["END_OF_TEXT", "StreamDecoder", "Tokenizer"]
