"""Running a program of unknown origin, alone or many at once.

    outcome = run_program("def twice(x): return 2 * x", tests="assert twice(3) == 6")

A program passes when its own code and then its tests have run to their end without an exception.
The tests reach the interpreter only after the program's own code has ended.
"""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue
from typing import Literal

from fedllm_flwr.evaluation.sandbox.launcher import (
    DEFAULT_LIMITS,
    Limits,
    Outcome,
    Program,
    Watcher,
)

__all__ = [
    "Containment",
    "Limits",
    "Outcome",
    "Program",
    "containment",
    "run_program",
    "run_programs",
]


@dataclass(frozen=True)
class Containment:
    """What stands between a program and this machine; `kind` is "none" where none can be run."""

    kind: Literal["namespaces", "limits", "none"]
    detail: str


@cache
def containment() -> Containment:
    """What this machine allows, found out with a program that does nothing."""
    if not sys.platform.startswith("linux"):
        return Containment("none", f"contained programs need Linux, this is {sys.platform}")
    with closing(Watcher()) as watcher:
        first = watcher.run(Program(""), Limits(), "namespaces")
        if first.passed:
            return Containment("namespaces", "own files, processes, users and network")
        second = watcher.run(Program(""), Limits(), "limits")
    if second.passed:
        return Containment("limits", f"time and memory only, namespaces failed: {first.message}")
    return Containment("none", f"{first.message}; {second.message}")


def run_program(source: str, tests: str = "", limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Run one program and its tests; returns when nothing of it is left."""
    return run_programs([Program(source, tests)], limits, jobs=1)[0]


def run_programs(
    programs: Sequence[Program], limits: Limits = DEFAULT_LIMITS, jobs: int | None = None
) -> list[Outcome]:
    """Run many programs, `jobs` at a time (as many as there are cores); outcomes in their order."""
    possible = containment()
    if possible.kind == "none":
        return [Outcome("refused", possible.detail, "none") for _ in programs]
    kind = possible.kind
    jobs = min(jobs or os.cpu_count() or 1, len(programs))
    with ExitStack() as stack:
        idle: SimpleQueue[Watcher] = SimpleQueue()
        for _ in range(jobs):
            idle.put(stack.enter_context(closing(Watcher())))

        def run(program: Program) -> Outcome:
            watcher = idle.get()
            try:
                return watcher.run(program, limits, kind)
            finally:
                idle.put(watcher)

        with ThreadPoolExecutor(max(1, jobs)) as pool:
            return list(pool.map(run, programs))
