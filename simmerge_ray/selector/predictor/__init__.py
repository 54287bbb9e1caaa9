"""From what a candidate keeps to what it is worth: the utility of (candidate, task), learned from labels.

The operator is no input: a merge is known by what it keeps of its members' answers (`signals.candidates`), so that one
predictor serves recipes that it has never seen.

signals   inputs of one candidate on one task
answers   answers beside the tasks of a search, and the note of them in its label store
rows      labels joined with candidate signals
model     the artifact: numpy, safetensors and JSON
train     fits and calibrates it on checkpoints or bases that are left out
"""
