"""``flwr run`` from the checkout: the same bits as ``fedllm run``, and failures that say why."""

import json
import shutil
import socket
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedllm_flwr.flower.names import is_http
from processes import BIN, environment, relatives
from tiny_runs import outcome, resume, run_tiny, tiny

CHECKOUT = Path(__file__).parents[2]
# flwr run of Flower 1.31 starts ten nodes.
TEN = ("federation.num_clients=10", "federation.sample_clients=2")
RAY_TOO_LATE = ("Timed out waiting for file", "The current node timed out during startup")
Flwr = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def flwr(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flwr]:
    """The command flwr, with a local SuperLink of its own that is ended afterwards."""
    home = tmp_path_factory.mktemp("flwr")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(BIN / "flwr"), *arguments],
            cwd=CHECKOUT,
            env=environment(
                home,
                FLWR_HOME=str(home),
                FLWR_LOCAL_CONTROL_API_PORT=port,
                FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=port,  # Flower 1.42's
                FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
                FLWR_TELEMETRY_ENABLED="0",
                FLWR_DISABLE_UPDATE_CHECK="1",
            ),
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    yield run
    started = relatives(home)
    for process in started:
        process.terminate()
    _, left = psutil.wait_procs(started, timeout=10)
    for process in left:
        process.kill()


def _run(flwr: Flwr, *overrides: str, federation: str = "") -> str:
    """What ``flwr run`` shows; it exits with 0 whatever becomes of the run."""
    text = " ".join(overrides)
    if not federation and is_http():  # since 1.32 Flower's simulation has two nodes by default
        federation = "num-supernodes=10"
    options = ["--federation-config", federation] if federation else []
    done = flwr("run", ".", "--stream", *options, "--run-config", f'overrides="{text}"')
    return done.stdout + done.stderr


def _statuses(flwr: Flwr) -> list[str]:
    """Of all runs, the newest first."""
    listed = flwr("list", "--format", "json").stdout
    return [run["status"] for run in json.loads(listed)["runs"]]


@pytest.mark.slow
def test_flwr_run_gives_the_bits_of_fedllm_run(flwr: Flwr, tmp_path: Path) -> None:
    for attempt in range(3):
        run = tmp_path / f"flwr-{attempt}"
        shown = _run(flwr, *tiny(*TEN, f"output_dir={run}"))
        # Ray gives its own processes 30 s to start, which a busy machine may exceed.
        if not any(words in shown for words in RAY_TOO_LATE):
            break
    assert "Finished in" in shown, shown
    assert outcome(run) == outcome(run_tiny(tmp_path / "fedllm", *TEN))


@pytest.mark.slow
def test_clients_keep_their_state_where_the_run_is(flwr: Flwr, tmp_path: Path) -> None:
    """So that another run of Flower can go on with it."""
    scaffold = (*TEN, "algorithm=scaffold")
    _run(flwr, *tiny(*scaffold, f"output_dir={tmp_path / 'flwr'}"))
    _run(flwr, f"resume={tmp_path / 'flwr'}", "federation.num_rounds=3")
    assert _statuses(flwr)[:2] == ["finished:completed", "finished:completed"]
    run_tiny(tmp_path / "fedllm", *scaffold)
    whole = resume(tmp_path / "fedllm", "federation.num_rounds=3")
    assert outcome(tmp_path / "flwr") == outcome(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "federation", "message"),
    [
        (["training.learning_rat=1"], "", "unknown key 'training.learning_rat'. Did you mean"),
        (["lora.target_modules=[nope]"], "", "lora.target_modules: nope matches no layer"),
        (
            [],
            "num-supernodes=8",
            "the data make 10 clients, but Flower's simulation has 8 nodes; run: flwr run .",
        ),
        ([], "num-supernodes=11", "--federation-config 'num-supernodes=10'"),
    ],
    ids=["typo", "model", "too few nodes", "too many nodes"],
)
def test_failed_run_says_why(
    overrides: list[str], federation: str, message: str, flwr: Flwr, tmp_path: Path
) -> None:
    output = f"output_dir={tmp_path / 'run'}"
    shown = _run(flwr, *tiny(*TEN, output, *overrides), federation=federation)
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, shown
    assert message in errors[0]
    assert "Traceback" not in shown
    assert _statuses(flwr)[0] == "finished:failed"


def test_bundle_is_small_and_holds_no_data(tmp_path: Path) -> None:
    """Flower refuses bundles above 10 MB; a site's data beside the code must not travel."""
    app = tmp_path / "app"
    app.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(CHECKOUT / name, app)
    for name in ("src", "conf", "evaluation", "tests", "docs"):
        shutil.copytree(CHECKOUT / name, app / name)
    for name in ("outputs/run/log.txt", ".venv/lib/a.py", "multirun/a.yaml", "mine.jsonl"):
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).touch()
    done = subprocess.run(
        [str(BIN / "flwr"), "build", "--app", str(app)],
        cwd=tmp_path,
        env=environment(tmp_path, FLWR_HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (bundle,) = tmp_path.glob("*.fab")
    assert bundle.stat().st_size < 2 * 2**20
    names = zipfile.ZipFile(bundle).namelist()
    assert "pyproject.toml" in names
    assert not [name for name in names if name.endswith((".jsonl", ".safetensors", ".png"))]
    assert not [name for name in names if name.startswith(("outputs/", ".venv/", "multirun/"))]
