"""Proof of docs/finding.md: is choosing among merges worth it, and what does a choice without labels miss?

kept         results by key in append-only files, so that an interrupted run goes on
utilities    measured utility of any plan: labels of all items, which no choice may see
candidates   the fixed 48 of a pair, and the space of the samplers
probing      probed signals of any plan: merged, one forward pass, no label
grid         the fixed 48 of every pair, measured and probed; grid_report: who chooses among them
virtual      the same from signatures, straight and curved
choices      the choice without labels, by the product's functions
samplers     random, TPE and CMA-ES with 1 to 40 evaluations
tuned        coefficients by gradient, and controls
derived      members that are broken, the base, or half as good; situations: choices with them
statistics   means, intervals over checkpoints, rank correlations
predictor    utility from candidate signals, one arm family left out (a command of its own)
parts, rows, report    what is run, what must hold, and the tables
"""
