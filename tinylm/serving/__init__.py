"""Serve a model over HTTP: an OpenAI-compatible completions API and a web page."""
