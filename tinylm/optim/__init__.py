"""Optimisers and schedules: how a gradient becomes an update."""
