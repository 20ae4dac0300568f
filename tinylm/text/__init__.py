"""Read text from sources and split it into training and held-out text. Independent of tokenizers."""
