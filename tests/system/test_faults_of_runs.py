"""Runs that cannot start as wished, or whose server ends: named, bounded, resumed bit by bit."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedllm_flwr
from breakable import Deployment, Run, deployed, fill
from fedllm_flwr import __version__
from fedllm_flwr.federation.tensor_files import load_params
from processes import nothing_left, wait_for
from tiny_runs import ADAPTER, outcome

pytestmark = pytest.mark.slow

SITES = ("amber", "birch", "cedar")
SCAFFOLD = ("algorithm=scaffold", "federation.num_rounds=3", "seed=3")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    root = tmp_path_factory.mktemp("runs")
    with deployed(root, SITES) as deployment:
        yield deployment
    assert nothing_left(root) == []


@pytest.fixture(scope="module")
def whole(federation: Deployment) -> Run:
    """A run that nothing has disturbed."""
    run = federation.submit(federation.root / "whole", *SCAFFOLD)
    assert finished(run), run.said()
    return run


def finished(run: Run, within_s: float = 500) -> bool:
    return wait_for(lambda: (run.output / "summary.json").exists(), within_s)


def ends_saying(run: Run, text: str, within_s: float = 400) -> bool:
    """Whether the run ends soon, and its log has these words."""
    return wait_for(lambda: run.stream.process.poll() is not None, within_s) and text in run.said()


def states(federation: Deployment, run: Run) -> list[tuple[str, str, bytes]]:
    """Every site's control variates after the run's last round."""
    last = f"round-{run.last_round():05d}.safetensors"
    found = [path for name in SITES for path in (federation.root / name).rglob(last)]
    return sorted((path.parent.name, path.parent.parent.name, values(path)) for path in found)


def values(path: Path) -> bytes:
    """A control variate's bits; files of the same differ in the order of their metadata."""
    control = load_params(path)[0]["control"]
    return b"".join(control[name].tobytes() for name in sorted(control))


def test_killed_server_app_is_resumed_to_the_same_bits(federation: Deployment, whole: Run) -> None:
    """The process that starts it dies too, and is started again by the server's script."""
    run = federation.submit(federation.root / "killed", *SCAFFOLD)
    assert run.reaches(1, 400), run.said()
    assert federation.kill("flwr-serverapp") + federation.kill("flower-superexec") == 2
    stopped_at = run.last_round()
    assert stopped_at < 3
    assert wait_for(lambda: bool(federation.processes("flower-superexec")), 180)

    resumed = federation.submit(run.output, f"resume={run.output}")
    assert finished(resumed), resumed.said()
    assert outcome(run.output) == outcome(whole.output)
    assert (run.output / ADAPTER).read_bytes() == (whole.output / ADAPTER).read_bytes()
    by_run: dict[str, set[bytes]] = {}
    for name, token, content in states(federation, run):
        by_run.setdefault(name, set()).add(content)
        assert token
    assert {name: len(contents) for name, contents in by_run.items()} == dict.fromkeys(SITES, 1)


def test_full_disk_of_the_server_keeps_the_checkpoint(federation: Deployment, whole: Run) -> None:
    disk = federation.root / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    is_root = os.geteuid() == 0 and shutil.which("mount") is not None
    if not is_root or subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        run = federation.submit(disk / "run", *SCAFFOLD)
        assert run.reaches(1, 400), run.said()
        fill(disk / "filler")
        said = "No space left on device"
        assert ends_saying(run, said), run.said()
        assert f"resume with: fedllm server run {federation.folder} resume={disk}/run" in run.said()
        (disk / "filler").unlink()
        resumed = federation.submit(disk / "run", f"resume={disk}/run")
        assert finished(resumed), resumed.said()
        assert outcome(disk / "run") == outcome(whole.output)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


WRONG = {
    "missing": (None, "its data file is missing"),
    "column": (
        '{"question": "SECRET", "output": "SECRET"}\n',
        "its data file lacks the column for data.columns.instruction",
    ),
    "broken": ('{"instruction": "SECRET", ', "a line of its data file is broken"),
}


@pytest.mark.parametrize("case", WRONG)
def test_site_with_wrong_data_is_named(case: str, federation: Deployment) -> None:
    content, why = WRONG[case]
    data = federation.root / "cedar.jsonl"
    before = data.read_text()
    data.unlink() if content is None else data.write_text(content)
    try:
        run = federation.submit(federation.root / case)
        said = f"2 of 3 clients can take part (all are needed). cedar cannot take part: {why}"
        assert ends_saying(run, said), run.said()
        assert "SECRET" not in run.said()
        assert str(data) not in run.said()
    finally:
        data.write_text(before)


def test_run_starts_without_a_site_that_cannot_take_part(federation: Deployment) -> None:
    data = federation.root / "cedar.jsonl"
    before = data.read_text()
    data.unlink()
    try:
        wanted = ("federation.min_clients=2", "federation.num_rounds=1")
        run = federation.submit(federation.root / "two", *wanted)
        assert finished(run), run.said()
    finally:
        data.write_text(before)
    start, last = run.records()
    assert start["refused"] == {"cedar": "its data file is missing; the site's log says more"}
    assert sorted(last["clients"]) == ["amber", "birch"]
    assert "warning: cedar cannot take part: its data file is missing" in run.said()
    assert "warning: starting with 2 of 3 clients" in run.said()


def test_too_few_sites_are_waited_for_and_not_for_ever(federation: Deployment) -> None:
    wanted = (
        "federation.num_clients=4",
        "federation.sample_clients=4",
        "federation.start_timeout_s=40",
    )
    run = federation.submit(federation.root / "few", *wanted)
    said = "3 of 4 clients connected within 40 s (amber, birch, cedar); start the missing ones"
    assert ends_saying(run, said), run.said()
    assert "3 of 4 clients are connected (amber, birch, cedar), waiting" in run.said()


def test_site_of_another_version_is_refused_with_both(federation: Deployment) -> None:
    other = federation.root / "other"
    shutil.copytree(
        Path(fedllm_flwr.__file__).parent,
        other / "fedllm_flwr",
        ignore=shutil.ignore_patterns("__pycache__", "conf"),
    )
    (other / "fedllm_flwr" / "__init__.py").write_text('__version__ = "0.0.7"\n')
    federation.add_site("dogwood", first=60)
    federation.start_site("dogwood", PYTHONPATH=str(other))
    try:
        run = federation.submit(federation.root / "skew")
        said = (
            "dogwood cannot take part: this site runs fedllm-flwr 0.0.7, the server "
            f"{__version__}; install one version on both: pip install fedllm-flwr=={__version__}"
        )
        assert ends_saying(run, said), run.said()
    finally:
        federation.kill_site("dogwood")
        del federation.sites["dogwood"]
        done = federation.run_command(
            "fedllm", "server", "unregister", str(federation.folder), "dogwood"
        )
    assert "Unregistered dogwood (node " in done.stdout, done.stderr
    assert sorted(federation.nodes()) == [*["online"] * 3, "unregistered"]
    again = federation.run_command(
        "fedllm",
        "server",
        "register",
        str(federation.folder),
        str(federation.root / "dogwood/dogwood.pub"),
    )
    assert again.returncode == 1
    assert "cannot come back" in again.stderr
