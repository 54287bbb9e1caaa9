"""A predictor of several bases: small zoos of other seeds than the demo's, their merges measured, and the training.

`python -m simmerge_ray.research.predictor.make OUT` makes all of it, in an hour or two on one core; what is there is
kept.
"""
