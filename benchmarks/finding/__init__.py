"""Proof of docs/finding.md: is choosing among merges worth it, and what does a choice without labels miss?

kept         results by key in append-only files, so that an interrupted run goes on
utilities    measured utility of any plan: labels of all items, which no choice may see
probing      signals of candidates: probed (merged, one forward pass), virtual (straight, curved)
grid         the fixed 48 candidates of each pair and who chooses among them
samplers     random, TPE and CMA-ES with the same candidates and 1 to 40 evaluations
statistics   means, intervals over checkpoints, rank correlations
"""
