"""Signals of steps that touch an intermediate merge, without evaluating it (and once, as the audit, by doing so).

interface     the Propagator class; intermediates and what identifies them
span          coefficient vectors over [base, task vectors]: merges that lie in the span of their sources
bound         the paper's convexity bounds, from the pair table
second_order  quadratic forms of the pair table
batch         the same for many plans at once
tensor_space  one tensor of all checkpoints: Gram matrix and coordinate sample
tensor_merges what merges make of one tensor, and the sums that weight signals are computed from
outputs       outputs of intermediates: mixed, and compared pair by pair
kernels       loops over samples and outputs
virtual       coefficient vectors and the coordinate sample, from signatures
halfway       one more pass for each checkpoint: the curve of its outputs (propagator `curved`)
merged        merges in memory, and what they do on the probes
exact         merge and run: the audit
evidence      what propagators work from
table         the PROPAGATORS table
"""
