"""Data: from text to tokens on disk, and from a position to a batch."""
