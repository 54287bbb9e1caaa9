"""The choice of a merge without labels: what a candidate keeps of its members' own answers decides.

aim        one number from what is kept of every member; the bound on what may be forgotten
space      the recipes that are looked at: subsets, weights, scales, operators, and every checkpoint as it is
virtual    thousands of them scored from signatures, and the few that are worth a look
probed     these merged in memory and run over the probes, more of the probes for the better ones
choice     the three in a row
"""
