"""Benchmarks of the bandit."""
