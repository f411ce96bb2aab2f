"""The other end of Flower's range, in an environment of its own: same bits, same federations."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from deployments import make_site, rounds_of, running_federation
from fedllm_flwr.config.compose import compose
from fedllm_flwr.data.sources import DEMO
from fedllm_flwr.flower.names import SEEN, is_http, version
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.server.run import run_simulation
from processes import BIN, environment, nothing_left, started, wait_for
from tiny_runs import ADAPTER, outcome, run_tiny, tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
OTHER = SEEN[0] if version().startswith(f"{SEEN[-1]}.") else SEEN[-1]
GIVEN = "FEDLLM_OTHER_FLOWER"  # prefix of an environment that is there already
SITES = ("banking", "energy", "health")  # desks of the embedded data
EACH = 24  # records of a site

# What is run there as a whole: each file starts servers, sites and clients of its own.
WHOLE = (
    "test_fedllm_run.py::test_ray_run",
    "test_fedllm_run.py::test_killed_run_ends_as_the_uninterrupted_one",
    "test_flwr_run.py::test_flwr_run_gives_the_bits_of_fedllm_run",
    "test_flwr_run.py::test_clients_keep_their_state_where_the_run_is",
    "test_three_sites.py::test_sites_train_as_simulated_clients_do[scaffold-10-rounds]",
    "test_deployment.py",
    "test_foreign_bundle.py",
    "test_faults_of_runs.py",
    "test_faults_at_sites.py",
    "test_faults_of_links.py",
    "test_flower_versions.py::test_server_with_sites_of_both_versions",
)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that has the other Flower, and all else from this one."""
    if GIVEN in os.environ:
        return Path(os.environ[GIVEN]) / "bin" / "python"
    folder = tmp_path_factory.mktemp("other") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python, [packages] = folder / "bin" / "python", folder.glob("lib/python3*/site-packages")
    [own] = (Path(sys.prefix) / "lib").glob("python3*/site-packages")
    (packages / "the-rest.pth").write_text(f"import site; site.addsitedir({str(own)!r})\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    flower = (f"flwr[simulation]=={OTHER}.*", "flwr-datasets>=0.6,<0.7", "grpcio<1.80")
    subprocess.run([*install, *flower], check=True)
    command = folder / "bin" / "fedllm"
    command.write_text(
        f"#!{python}\nfrom fedllm_flwr.commands.main import main\nraise SystemExit(main())\n"
    )
    command.chmod(0o755)
    return python


def test_it_is_the_other_one(other: Path) -> None:
    command = [str(other), "-c", "from fedllm_flwr.flower.names import version; print(version())"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.startswith(f"{OTHER}.")


def succeeds(command: list[str], place: Path) -> None:
    """Run a command to its end."""
    done = subprocess.run(
        command,
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_same_bits_in_simulation(other: Path, tmp_path: Path) -> None:
    """One process, and Flower's engine on Ray; `test_ray_run` compares the two under this one."""
    found = {}
    for engine in ("inprocess", "ray"):
        overrides = [*tiny("algorithm=scaffold"), f"federation.engine={engine}"]
        succeeds(
            [str(other.parent / "fedllm"), "run", *overrides, f"output_dir={tmp_path / engine}"],
            tmp_path,
        )
        found[engine] = outcome(tmp_path / engine)
    expected = outcome(run_tiny(tmp_path / "expected", "algorithm=scaffold"))
    assert found == dict.fromkeys(("inprocess", "ray"), expected)


def records_of(name: str) -> list[str]:
    lines = (DEMO / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    return [line for line in lines if json.loads(line)["desk"] == name][:EACH]


@pytest.fixture
def mixed(other: Path, tmp_path: Path) -> Iterator[Path]:
    """A server of this environment, a site of it, and one of the other; the server's directory.

    Where the server serves HTTP, too, there is a third, which speaks that.
    """
    [own, foreign, over_http] = SITES
    with running_federation(tmp_path, {own: records_of(own)}) as running, ExitStack() as stack:
        for name in SITES[1 : 3 if is_http() else 2]:
            port = running.ports["fleet"]
            site = make_site(tmp_path, name, port, running.folder / "ca.crt", records_of(name))
            command = [str(site / "start-supernode.sh")]
            if name == over_http:
                address = f"localhost:{running.ports['control']}"
                command += ["--http", "--superlink", address]
            elif name == foreign:
                for file in (site / "start-supernode.sh", *(site / "bin").iterdir()):
                    file.write_text(file.read_text().replace(str(BIN), str(other.parent)))
            key = str(site / f"{name}.pub")
            done = running.run("fedllm", "server", "register", str(running.folder), key)
            assert f"Registered {name}" in done.stdout, done.stderr
            stack.enter_context(started(command, tmp_path))
        online = ["online"] * (3 if is_http() else 2)
        assert wait_for(lambda: running.nodes() == online, 180)
        yield running.folder
    assert nothing_left(tmp_path) == []


def test_server_with_sites_of_both_versions(mixed: Path, tmp_path: Path) -> None:
    """The bits of one process."""
    names = SITES[: 3 if is_http() else 2]
    together = tmp_path / "together.jsonl"
    together.write_text("".join(line for name in names for line in records_of(name)), "utf-8")
    common = ["data=jsonl", "data.columns.label=output", f"data.eval_path={DEMO / 'test.jsonl'}"]
    common += ["algorithm=scaffold", "training.max_steps=1", "training.batch_size=4"]
    common += ["federation.num_rounds=2", "evaluation.every=0", "federation.sample_fraction=1.0"]
    output, expected = tmp_path / "run", tmp_path / "expected"
    own = ["data.path=at-the-sites", f"federation.num_clients={len(names)}"]
    command = [str(BIN / "fedllm"), "server", "run", str(mixed), *common, *own]
    succeeds([*command, "data.eval_max_samples=10", f"output_dir={output}"], tmp_path)
    assert [sorted(record["clients"]) for record in rounds_of(output)[1:]] == [list(names)] * 2
    assert all(record["failures"] == {} for record in rounds_of(output)[1:])

    simulated = ["federation.engine=inprocess", "partition=natural", "partition.column=desk"]
    simulated += [f"data.path={together}", "data.eval_max_samples=10", f"output_dir={expected}"]
    run_simulation(compose([*common, *simulated]), Console(quiet=True), 0.0)
    assert (output / ADAPTER).read_bytes() == (expected / ADAPTER).read_bytes()


@pytest.mark.parametrize("tests", WHOLE)
def test_runs_and_federations_of_the_other_one(other: Path, tests: str) -> None:
    """The same tests of real processes, under the other Flower."""
    command = [str(other), "-m", "pytest", "--numprocesses", "0", "-m", "slow", "-q"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", f"tests/system/{tests}"],
        cwd=ROOT,
        env={**os.environ, GIVEN: sys.prefix},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
