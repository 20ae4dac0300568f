"""Embeddings: vectors of words and tokens, how they are learned from counts and windows, asked, judged, drawn and reused."""
