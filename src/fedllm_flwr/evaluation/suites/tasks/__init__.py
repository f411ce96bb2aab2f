"""Functions that the task files of the suites name: data into one shape, answers into scores."""
