"""Predict which merge of language model checkpoints will work, and make it.

A module imports only from its own folder and from the floors below it (tests/unit/test_layers.py lists the floors).
Importing the package imports neither torch nor Ray; take what you need from its module, for example
`from simmerge_ray.signals.compute import compute_signals`.
"""

__version__ = "0.2.0"
