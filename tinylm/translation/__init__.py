"""Translate with an encoder-decoder: beam search and sampling, scores of translations, and the baselines to compare them with."""
