"""Neural networks: the common `Model` interface, one module per architecture, and decoders for generation.

Code in this package does not read checkpoints or depend on the number of processes.
"""

from tinylm.device import warm_up_vector_math

warm_up_vector_math()  # before any computation in this package
