"""Merge operators: one file each. `specs` (names, parameters, ranges) needs no torch; `table` holds the functions."""
