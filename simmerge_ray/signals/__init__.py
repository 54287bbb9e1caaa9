"""Similarity signals of all pairs of checkpoints at once.

collect      one forward pass: log-probabilities, hidden states, attention of the valid tokens
divergence   KL of next-token distributions, all pairs
cosines      cosine of activations and attention rows, all pairs, as moments that add
weights      Gram sums of weights and task vectors, blocks that add
features     the SIGNALS table: names, groups, transforms; the feature columns of an ordered pair
worker       units of work (one probe micro-batch, one tensor) and what they return
table        folds units in their fixed order into the table of pair signals, and stores it
"""
