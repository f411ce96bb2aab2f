"""Caches of the integration tests live in a folder of their own; runs that several tests read."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tiny_runs import run_tiny


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Encoded examples do not land in the user's cache, and none are found there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a finished tiny run with some overrides, made once; only to be read."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in made:
            made[overrides] = run_tiny(tmp_path_factory.mktemp("whole") / "run", *overrides).path
        return made[overrides]

    return run
