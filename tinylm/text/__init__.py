"""Read text from sources and split it into training and held-out text. This package does not depend on tokenizers."""
