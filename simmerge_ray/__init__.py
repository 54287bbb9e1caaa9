"""Predict which merge of language model checkpoints will work, and make it.

The package follows one flow, left to right; a module imports only from what stands to its left (`layers.py` of the
test suite holds the list). Importing the package imports neither torch nor Ray: take what is needed from its module,
for example `from simmerge_ray.signals.compute import compute_signals`.
"""

__version__ = "0.1.0"
