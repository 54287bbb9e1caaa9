"""Learned choice of the merge operator: signals of a pair and a task in, one utility per arm out.

dataset     joins pair signals with labels
predictors  networks, ridge, nearest neighbours and forest behind one interface, in numpy (`forest`, `encoding`)
policy      when to leave the best fixed arm, intervals; `novelty`: which pairs are too far from the training data
model       the selector: all of these, and its artifact on disk
train       fits and calibrates it (`targets`, `fit_mlp`, `fit_sklearn`)
splits      what is left out; `evaluation`: how choices are measured
baselines   what a selector has to beat
crossval    the report on checkpoints that were not trained on (`trial`)
"""
