"""Replays of the bandit on existing labels."""
