"""Evaluation of adapters: held-out records, benchmark suites, judges, and privacy attacks."""
