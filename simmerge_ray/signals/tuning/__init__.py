"""Coefficients of a merge by gradient on unlabeled probes: what every member would have said, said again.

groups       which tensors share a coefficient: all, a layer, a block of it, or each its own
vectors      task vectors of members, whole or low-rank: added to a tensor, and their product with its gradient
objective    KL, nll or entropy at the answers' positions
tuner        Adam on the coefficients, with a pull to the start, held-out probes and an early stop
"""
