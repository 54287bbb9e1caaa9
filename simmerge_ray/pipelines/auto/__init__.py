"""`simmerge auto`: from a catalogue and probes to one merge or to "keep this checkpoint"; labels, where there are any.

request    what is asked, and the answer without labels
find       answers, the choice among recipes, tuning of the best few
measure    the last word of labels
answer     checks before anything runs; the answer as files

The directory of a run gets `signatures` and `labels` (the only state: a run that was stopped goes on), `tuned` (the
same for tuning), `auto.json` (the answer and every figure), and where a merge is the answer its plan file `plan.json`
and the merge itself, `merged`.
"""
