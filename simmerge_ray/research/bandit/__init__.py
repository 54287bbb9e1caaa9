"""Replays of the bandit on labels that are there."""
