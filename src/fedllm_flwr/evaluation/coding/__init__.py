"""Benchmarks of generated code: problems, answers, and the rate at which they pass their tests."""
