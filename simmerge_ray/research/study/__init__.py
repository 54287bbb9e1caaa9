"""The study that says whether selection works: its zoo, the merges it labels, its power and its analysis."""
