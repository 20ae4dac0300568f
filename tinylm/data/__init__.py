"""Prepare training data: encode text as tokens on disk, and read batches of examples in a reproducible order."""
