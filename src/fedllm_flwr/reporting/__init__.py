"""Reporting of runs: console output, metrics, figures, HTML reports, trackers, model cards."""
