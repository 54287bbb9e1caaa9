"""Signals of a *candidate*: what a merge keeps of its members' own answers on unlabeled probes.

answers      a member's greedy answers to its task's probes, and the tokens whose probabilities are kept there
scores       retention, nll, KL and entropy of whatever gave log-probabilities at the answers' positions
virtual      those log-probabilities by mixing: nothing merged, thousands of candidates a second
probed       those of a merge in memory: one forward pass, nothing generated
"""
