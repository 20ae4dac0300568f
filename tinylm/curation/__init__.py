"""Prepare large texts for training: clean, filter and deduplicate documents, and encode them as tokens."""
