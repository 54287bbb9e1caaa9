"""The predictor in the package: small zoos of other seeds than the demo's, their merges measured, and the training.

`python -m simmerge_ray.research.predictor.make OUT` makes it again, in hours on one core; what is there is kept.
"""
