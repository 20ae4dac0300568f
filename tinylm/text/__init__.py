"""Text: where it comes from and how it is split. Nothing here knows tokens."""
