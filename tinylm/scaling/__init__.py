"""Scaling laws: train a small grid of models, fit how the loss depends on size and training length, and predict longer runs."""
