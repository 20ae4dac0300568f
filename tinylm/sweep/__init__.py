"""Sweeps: train one recipe with many settings, in separate processes, and compare the results.

This package does not import torch.
"""
