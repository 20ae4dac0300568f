"""Data: turns text into tokens on disk, and positions in the data order into batches."""
