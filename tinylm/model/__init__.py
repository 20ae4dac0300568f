"""The model: a transformer that a recipe configures. Knows no ranks, no files, no losses but its objective."""

from tinylm.device import settle_vector_math

settle_vector_math()  # before anything here computes
