"""Sites behind links with a delay and little bandwidth: every run starts, and finishes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deployments import rounds_of, running_federation
from processes import wait_for
from slow_link import slow_link

pytestmark = pytest.mark.slow

SITES = ("banking", "energy", "health")
MBIT = 1e6
RUNS = 5


@pytest.mark.parametrize("round_trip_s", [0.08, 0.3], ids=["80 ms", "300 ms"])
def test_five_of_five_runs_start_and_finish(tmp_path: Path, round_trip_s: float) -> None:
    """Three sites, each behind 2 Mbit/s; each run asks all of them who they are."""

    @contextmanager
    def link(port: int) -> Iterator[int]:
        with slow_link(port, round_trip_s, 2 * MBIT) as line:
            yield line.port
            assert min(line.num_bytes.values()) > 10_000  # the traffic went this way

    outcomes = []
    with running_federation(tmp_path, dict.fromkeys(SITES), link) as federation:
        assert wait_for(lambda: federation.nodes() == ["online"] * 3, 240)
        for number in range(RUNS):
            output = tmp_path / f"run-{number}"
            done = federation.run(
                *("fedllm", "server", "run", str(federation.folder), f"output_dir={output}"),
                *("federation.num_clients=3", "federation.num_rounds=2", "training.max_steps=1"),
                *("federation.start_timeout_s=200", "federation.round_timeout_s=100"),
                "evaluation.every=0",
            )
            outcomes.append((done.returncode, done.stdout[-2000:] + done.stderr[-2000:]))
            for record in rounds_of(output)[1:]:
                assert (sorted(record["clients"]), record["failures"]) == (list(SITES), {})
    assert [code for code, _ in outcomes] == [0] * RUNS, outcomes
