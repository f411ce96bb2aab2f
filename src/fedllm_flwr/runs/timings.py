"""Timings of a run by phase."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Timings:
    """Seconds by phase, over all starts of a run.

    Args:
        earlier: timings of earlier starts of the run; empty for a new run.
    """

    def __init__(self, earlier: Mapping[str, float] | None = None) -> None:
        self.earlier = dict(earlier or {})
        self.seconds: dict[str, float] = defaultdict(float, self.earlier)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the duration of the block to a phase."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - started
