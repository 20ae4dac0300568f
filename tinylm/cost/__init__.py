"""Estimate the parameters, FLOPs, memory and time of a training run before it starts, on a CPU or on accelerators."""
