"""Functions named by the suites' task files: they normalise data and score answers."""
