"""The model: a transformer configured by a recipe's `model:` section, its objective, and its decoder.

Code in this package does not read files or depend on the number of processes.
"""

from tinylm.device import warm_up_vector_math

warm_up_vector_math()  # before any computation in this package
