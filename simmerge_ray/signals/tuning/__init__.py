"""Coefficients of a merge by gradient on unlabeled probes: what every member would have said, said again.

groups       which tensors share a coefficient: all, a layer, a block of it, or each its own
vectors      task vectors of members, whole or low-rank: added to a tensor, and their product with its gradient
objective    KL, nll or entropy at the answers' positions
starts       coefficients to start from: equal, norm-matched, a recipe's
memory       stated before, and what keeps it small
tuner        Adam on the coefficients, with a pull to the start, held-out probes and an early stop
grams        Gram matrices of linear layers' inputs, for the operator regmean
run          one tuning from its inputs to its recipe, resumable
"""
