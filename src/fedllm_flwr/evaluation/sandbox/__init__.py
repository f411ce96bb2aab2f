"""Sandbox for generated programs.

    outcome = run_program("def twice(x): return 2 * x", tests="assert twice(3) == 6")

`bubblewrap` starts a fresh interpreter (`interpreter`) in its own namespaces, under a filter of
system calls (`seccomp`), enforces limits on time and memory, and kills every process at the end.
"""
