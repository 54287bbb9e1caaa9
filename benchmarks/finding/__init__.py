"""Choosing a merge without labels, measured."""
