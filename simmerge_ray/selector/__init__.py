"""Learned choice of the merge operator: signals of a pair and a task in, one utility per arm out.

data/        signals joined with labels (`dataset`, read by `files`), rewards, task encodings, folds (`splits`), and how
             choices of arms are scored (`scoring`)
models/      predictors behind one interface, in numpy; the selector around them and its artifact (`model`); when to
             leave the best fixed arm (`policy`), pairs unlike the training data (`novelty`), what moves a prediction
             (`influence`); `train` fits and calibrates all of it
assessment/  the report on checkpoints left out of the training: folds, baselines, bench, cross-validation, ablations
planning/    the arms for a pair (`recommender`), and plans over a catalogue: `request` assembles a ranking of a `space`
             on `tasks`, `search` and `scorer` compute it
default/     the selector in the package
"""
