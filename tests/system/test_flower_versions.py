"""The other end of Flower's range, in an environment of its own: same bits, same federations."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from deployments import make_site, rounds_of, running_federation
from fedllm_flwr.flower.names import SEEN, version
from processes import BIN, environment, nothing_left, started, wait_for
from tiny_runs import ADAPTER, tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
OTHER = SEEN[0] if version().startswith(f"{SEEN[-1]}.") else SEEN[-1]
GIVEN = "FEDLLM_OTHER_FLOWER"  # an environment that is there already
SITES = ("amber", "birch")

# What is run there as a whole: each file starts servers, sites and clients of its own.
WHOLE = (
    "test_fedllm_run.py::test_ray_run",
    "test_flwr_run.py::test_flwr_run_gives_the_bits_of_fedllm_run",
    "test_three_sites.py::test_sites_train_as_simulated_clients_do[scaffold-10-rounds]",
    "test_deployment.py::test_run_goes_on_when_the_superlink_is_killed",
    "test_deployment.py",
    "test_foreign_bundle.py",
    "test_faults_of_runs.py::test_killed_server_app_is_resumed_to_the_same_bits",
    "test_faults_at_sites.py",
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


def test_same_bits_in_simulation(other: Path, tmp_path: Path) -> None:
    """One process, and Flower's engine on Ray."""
    digests = {}
    for python in (Path(sys.executable), other):
        for engine in ("inprocess", "ray"):
            output = tmp_path / f"{engine}-{len(digests)}"
            overrides = [*tiny("algorithm=scaffold"), f"federation.engine={engine}"]
            command = [str(python.parent / "fedllm"), "run", *overrides, f"output_dir={output}"]
            done = subprocess.run(
                command,
                env=environment(tmp_path),
                capture_output=True,
                text=True,
                timeout=400,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            content = (output / ADAPTER).read_bytes()
            digests[python, engine] = hashlib.sha256(content).hexdigest()
    assert len(digests) == 4
    assert len(set(digests.values())) == 1, digests


@pytest.fixture
def mixed(other: Path, tmp_path: Path) -> Iterator[Path]:
    """A server of this environment, a site of it and one of the other; the server's directory."""
    [own, foreign] = SITES
    with running_federation(tmp_path, {own: None}) as running, ExitStack() as stack:
        site = make_site(tmp_path, foreign, running.ports["fleet"], running.folder / "ca.crt")
        for file in (site / "start-supernode.sh", *(site / "bin").iterdir()):
            file.write_text(file.read_text().replace(str(BIN), str(other.parent)))
        done = running.run(
            "fedllm", "server", "register", str(running.folder), str(site / f"{foreign}.pub")
        )
        assert f"Registered {foreign}" in done.stdout, done.stderr
        stack.enter_context(started([str(site / "start-supernode.sh")], tmp_path))
        assert wait_for(lambda: running.nodes() == ["online", "online"], 180)
        yield running.folder
    assert nothing_left(tmp_path) == []


def test_server_and_site_of_different_versions(mixed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    overrides = ["federation.num_clients=2", "federation.num_rounds=2", "training.max_steps=1"]
    command = [str(BIN / "fedllm"), "server", "run", str(mixed), *overrides]
    done = subprocess.run(
        [*command, "evaluation.every=0", f"output_dir={output}"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [sorted(record["clients"]) for record in rounds_of(output)[1:]] == [list(SITES)] * 2
    assert all(record["failures"] == {} for record in rounds_of(output)[1:])


@pytest.mark.parametrize("tests", WHOLE)
def test_runs_and_federations_of_the_other_one(other: Path, tests: str) -> None:
    """The same tests of real processes, under the other Flower."""
    command = [str(other), "-m", "pytest", "--numprocesses", "0", "-m", "slow", "-q"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", f"tests/system/{tests}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
