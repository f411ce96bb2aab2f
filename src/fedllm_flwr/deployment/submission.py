"""Hand a run to a federation's server, show its log, and end with its outcome."""

import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir
from pathlib import Path

from fedllm_flwr.deployment.flower import (
    DRY_RUN,
    flwr_command,
    flwr_environment,
    last_json,
    server_folder,
)
from fedllm_flwr.deployment.node import to_toml
from fedllm_flwr.errors import FederationError

_ENGINE = "federation.engine=deployment"
_ALL_SITES = "federation.sample_fraction=1"  # unless the run says something of it
_DECIDE_ON_SITES = {
    *("federation.sample_clients", "federation.sample_fraction"),
    *("resume", "config", "experiment"),
}
_COMMAND_LIMIT_S = 180.0
_PAUSE_S = 3.0  # between two looks at a SuperLink that does not answer
_PATIENCE_S = 600.0  # for a SuperLink that is being started again


def run_on_server(directory: str | Path, overrides: Sequence[str], dry_run: bool = False) -> int:
    """Submit a run to the server of `directory` and print its log until it has ended.

    With `dry_run` the sites are asked and nothing is trained; 1 then says that it could not start.

    The run belongs to the SuperLink: it goes on if this process ends, and this process goes on
    while the SuperLink is started again.

    Returns:
        Exit status: 0 if the run has completed, 1 if it failed or was stopped.

    Raises:
        ConfigError: no server's directory, or overrides that cannot be.
        FederationError: the SuperLink does not take the run, or is gone for good.
    """
    folder = server_folder(directory)
    keys = {text.partition("=")[0] for text in overrides}
    asked = [*overrides, *([] if _ENGINE in overrides else [_ENGINE])]
    if not keys & _DECIDE_ON_SITES:
        asked.append(_ALL_SITES)
    _check(folder, asked)
    run_id = _submit(folder, asked, dry_run)
    print(f"Submitted as run {run_id}.", flush=True)
    return _follow(folder, run_id)


def _check(folder: Path, overrides: Sequence[str]) -> None:
    """Compose the configuration where the server's app will: paths are relative to `folder`."""
    from fedllm_flwr.config.compose import compose

    with chdir(folder):
        compose(overrides)


def _submit(folder: Path, overrides: Sequence[str], dry_run: bool) -> str:
    """Id of the new run."""
    with tempfile.TemporaryDirectory() as temporary:
        run_config = Path(temporary) / "run.toml"
        asked = {"overrides": joined(overrides), DRY_RUN: "yes" if dry_run else ""}
        run_config.write_text(to_toml(asked), "utf-8")
        command = flwr_command("run", str(folder / "app"))
        options = ["--run-config", str(run_config), "--format", "json"]
        done = _flwr(folder, [*command, *options])
    run_id = last_json(done.stdout).get("run-id")
    if run_id is None:
        said = str(last_json(done.stdout).get("error-message") or done.stderr or done.stdout)
        if "unavailable" in said.lower() or not said:
            raise FederationError(
                f"the SuperLink of {folder} does not answer; start {folder}/start.sh first"
            )
        raise FederationError(f"flwr run: {' '.join(said.split())}")
    return str(run_id)


def joined(overrides: Sequence[str]) -> str:
    """Overrides in one string, as `config.overrides.split_overrides` parts them."""
    return " ".join(map(_quoted, overrides))


def _quoted(text: str) -> str:
    """In single quotes, which have no escape: one inside stands between double quotes."""
    return '"\'"'.join(f"'{part}'" for part in text.split("'"))


def _follow(folder: Path, run_id: str) -> int:
    """Print the run's log to its end, over restarts of the SuperLink; its exit status."""
    shown, heard = 0, time.monotonic()
    while True:
        for number, line in enumerate(_log(folder, run_id)):
            heard = time.monotonic()
            if number >= shown:  # each look starts at the beginning
                print(line, end="", flush=True)
                shown = number + 1
        status = _status(folder, run_id)
        if status.startswith("finished"):
            return 0 if status == "finished:completed" else 1
        if status:
            heard = time.monotonic()
        elif time.monotonic() - heard > _PATIENCE_S:
            raise FederationError(
                f"the SuperLink has not answered for {_PATIENCE_S:g} s; when it is back, "
                f"`flwr log {run_id}` shows what became of the run"
            )
        time.sleep(_PAUSE_S)


def _log(folder: Path, run_id: str) -> Iterator[str]:
    """Lines of the run's log from its beginning, as they come, until it or the connection ends."""
    with subprocess.Popen(
        flwr_command("log", run_id),
        env=flwr_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield from process.stdout
        finally:
            process.terminate()


def _status(folder: Path, run_id: str) -> str:
    """Flower's status of the run, such as ``finished:completed``; "" without an answer."""
    done = _flwr(folder, [*flwr_command("list"), "--run-id", run_id, "--format", "json"])
    runs = last_json(done.stdout).get("runs")
    return str(runs[0]["status"]) if isinstance(runs, list) and runs else ""


def _flwr(folder: Path, command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            command,
            env=flwr_environment(folder),
            capture_output=True,
            text=True,
            timeout=_COMMAND_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "")
