"""Translate with an encoder-decoder: beam search, sampling, translation scores, and baselines for comparison."""
