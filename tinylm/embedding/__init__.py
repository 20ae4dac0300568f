"""Vectors of words and tokens: train, query, evaluate, plot, import and export them, and initialize models from them."""
