"""Text generation: sampling, beam search and constraints."""
