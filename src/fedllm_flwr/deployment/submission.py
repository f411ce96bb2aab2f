"""Hand a run to a federation's server, show its log, and end with its outcome."""

import queue
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from typing import IO

from fedllm_flwr.deployment.flower import (
    DRY_RUN,
    flwr_command,
    flwr_environment,
    last_json,
    server_folder,
)
from fedllm_flwr.deployment.node import to_toml
from fedllm_flwr.errors import FederationError
from fedllm_flwr.runs.directory import RunDirectory, how_to_go_on
from fedllm_flwr.runs.lock import holder

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
        FederationError: the SuperLink does not take the run, or is gone for good, or the server's
            app has ended without a word.
    """
    folder = server_folder(directory)
    keys = {text.partition("=")[0] for text in overrides}
    asked = [*overrides, *([] if _ENGINE in overrides else [_ENGINE])]
    if not keys & _DECIDE_ON_SITES:
        asked.append(_ALL_SITES)
    output_dir = _check(folder, asked)
    run_id = _submit(folder, asked, dry_run)
    print(f"Submitted as run {run_id}.", flush=True)
    return _follow(folder, run_id, output_dir)


def _check(folder: Path, overrides: Sequence[str]) -> str | None:
    """Compose the configuration where the server's app will: paths are relative to `folder`.

    Returns:
        The run's directory, if the configuration names it.
    """
    from fedllm_flwr.config.compose import compose

    with chdir(folder):
        config = compose(overrides)
    return config.resume or config.output_dir


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


def _follow(folder: Path, run_id: str, output_dir: str | None) -> int:
    """Print the run's log to its end, over restarts of the SuperLink; its exit status.

    Raises:
        FederationError: the server's app has ended without a word, or the SuperLink is gone.
    """
    shown, heard, said_why = 0, time.monotonic(), False
    while True:
        number = 0
        for line in _log(folder, run_id):
            if line is None:
                _refuse_killed(folder, run_id, output_dir)
                continue
            heard = time.monotonic()
            number += 1
            if number > shown:  # each look starts at the beginning
                print(line, end="", flush=True)
                said_why = said_why or "error: " in line
                shown = number
        status = _status(folder, run_id)
        if status == "finished:completed":
            return 0
        if status.startswith("finished"):
            if not said_why:
                raise FederationError(_without_a_word(folder, run_id, output_dir, status))
            return 1
        _refuse_killed(folder, run_id, output_dir)
        if status:
            heard = time.monotonic()
        elif time.monotonic() - heard > _PATIENCE_S:
            raise FederationError(
                f"the SuperLink has not answered for {_PATIENCE_S:g} s; when it is back, "
                f"`flwr log {run_id}` shows what became of the run"
            )
        time.sleep(_PAUSE_S)


def _run_directory(folder: Path, run_id: str, output_dir: str | None) -> RunDirectory | None:
    """The directory whose lock names this run; None without one, as before the app has begun."""
    named = [folder / Path(output_dir).expanduser()] if output_dir is not None else []
    for path in named or (folder / "outputs").glob("*"):
        directory = RunDirectory(path.resolve())
        who = holder(directory)
        if who is not None and who.flower_run == run_id:
            return directory
    return None


def _refuse_killed(folder: Path, run_id: str, output_dir: str | None) -> None:
    """Say at once that the server's app was killed; Flower notices it after a minute.

    Raises:
        FederationError: it was; names the command that goes on with the run.
    """
    directory = _run_directory(folder, run_id, output_dir)
    who = None if directory is None else holder(directory)
    if directory is not None and who is not None and who.was_killed:
        raise FederationError(
            f"run {run_id}: the server's app (process {who.pid}) was killed or has crashed without "
            f"a word, out of memory perhaps; {_how_to_go_on(folder, directory)}"
        )


def _without_a_word(folder: Path, run_id: str, output_dir: str | None, status: str) -> str:
    directory = _run_directory(folder, run_id, output_dir)
    if directory is not None:
        kept = _how_to_go_on(folder, directory)
    else:
        kept = f"what start-superexec.sh has printed says more; runs are in {folder / 'outputs'}"
    return f"run {run_id} ended as {status}, and the server's app has not said why; {kept}"


def _how_to_go_on(folder: Path, directory: RunDirectory) -> str:
    command = f"fedllm server run {shlex.quote(str(folder))}"
    return how_to_go_on(directory, command) or "nothing was saved yet, start it anew"


def _log(folder: Path, run_id: str) -> Iterator[str | None]:
    """Lines of the run's log from its beginning, as they come, until it or the connection ends.

    None after each second without one.
    """
    lines: queue.Queue[str | None] = queue.Queue()

    def read(stream: IO[str]) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    with subprocess.Popen(
        flwr_command("log", run_id),
        env=flwr_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            while True:
                try:
                    line = lines.get(timeout=1.0)
                except queue.Empty:
                    yield None
                    continue
                if line is None:
                    return
                yield line
        finally:
            process.terminate()
            reader.join(5.0)


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
