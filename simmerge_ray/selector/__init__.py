"""Learned choice of the merge operator: signals of a pair and a task in, one utility per arm out.

dataset     joins pair signals with labels
model       the selector: numpy inference, artifact on disk
train       fits the ensemble
baselines   best fixed arm, uniform
crossval    predictions for checkpoints that were not trained on
"""
