"""Benchmarks of generated code: problems, answers, and how many of them pass their tests."""
