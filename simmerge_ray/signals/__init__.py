"""Similarity signals of all pairs of checkpoints at once.

tokens       what every checkpoint is run over: probes, the base's continuation, sampled positions
collect      one forward pass: logits, hidden states and attention rows at the sampled positions, by hooks
signature    what is kept of one checkpoint, and the store of it
divergence   KL of next-token distributions, all pairs
cosines      cosine of activations and attention rows, all pairs
weights      Gram sums of weights and task vectors, blocks that add
samples      reading weights block by block for signatures and sums
pairs        signals of all pairs from the outputs of checkpoints
features     the SIGNALS table: names, groups, transforms; the feature columns of an ordered pair
pipeline     the same in stages of layers, for checkpoints that do not fit one worker
worker       units of work and what runs them
queue        units that wait for a worker
bounds       memory and disk of a run, before it starts
compute      which units are missing; from signatures to the table, whole or appended to
new_pairs    signals of new checkpoints with all others, from signatures alone
pair_blocks  rows of a table by columns, a block for what each checkpoint added
table_files  the first file of a table, and the parts that were appended to it
table        the table of pair signals
explain      the signals of a pair in words and numbers
"""
