"""Choices of the configuration groups that this package adds."""
