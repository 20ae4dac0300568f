"""Serving: a model behind HTTP, for programs that speak OpenAI's completions and for people with a browser."""
