"""Training: the loop, its checkpoints, its numbers."""
