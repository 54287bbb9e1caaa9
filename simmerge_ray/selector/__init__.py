"""Learned choice of the merge operator: signals of a pair and a task in, one utility per arm out.

data/        what it learns from: signals joined with labels, rewards, folds, and how choices of arms are scored
models/      predictors in numpy and the selector around them; `train` fits and calibrates all of it
assessment/  the report on checkpoints left out of the training: baselines, cross-validation, ablations
planning/    the arms for a pair (`recommender`), and plans over a catalogue (`request`, `search`, `scorer`)
default/     the selector in the package
"""
