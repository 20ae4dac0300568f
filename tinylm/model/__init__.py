"""The models: the interface of all networks, the transformer that a recipe's `model:` section configures, and decoders.

Code in this package does not read files or depend on the number of processes.
"""

from tinylm.device import warm_up_vector_math

warm_up_vector_math()  # before any computation in this package
