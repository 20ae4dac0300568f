"""Sweeps: train one recipe with many settings, in separate processes, and compare the results. Does not import torch."""
