"""Names of what lies in a selector's directory beside the artifact itself, for the plan scorer."""

SHORTLIST = "shortlist"  # a second artifact, on the features of propagator `second_order`
PARENTS = "parents.json"  # measured utilities of the checkpoints as they are: task -> id -> utility
