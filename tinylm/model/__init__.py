"""The model: a transformer that a recipe configures. Knows no ranks, no files, no losses but its objective."""
