"""Estimate the cost of a training run before it starts: parameters, FLOPs, memory and time, on a CPU or on accelerators."""
