"""Sandbox for generated programs.

    outcome = run_program("def twice(x): return 2 * x", tests="assert twice(3) == 6")

`bubblewrap` starts a fresh interpreter (`interpreter`) in a room of its own, under a filter of
system calls (`seccomp`), looks at the clock and at the memory, and ends whatever was started.
"""
