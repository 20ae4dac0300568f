"""Train, query, evaluate, plot, import and export word and token vectors, and initialize models from them."""
