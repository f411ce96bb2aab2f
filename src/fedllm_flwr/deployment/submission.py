"""Submits a run to a federation's server, shows its log and returns its outcome."""

import queue
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass
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
from fedllm_flwr.runs.lock import Holder, holder

_ENGINE = "federation.engine=deployment"
_ALL_SITES = "federation.sample_fraction=1"  # unless the run's overrides set it
_DECIDE_ON_SITES = {
    *("federation.sample_clients", "federation.sample_fraction"),
    *("resume", "config", "experiment"),
}
_CONNECTED = "Using SuperLink: "  # what Flower 1.42 says before a run's log
_COMMAND_LIMIT_S = 180.0
_PAUSE_S = 3.0  # between two attempts to reach a SuperLink
_PATIENCE_S = 600.0  # to wait for a SuperLink to be restarted


def run_on_server(directory: str | Path, overrides: Sequence[str], dry_run: bool = False) -> int:
    """Submit a run to the server of `directory` and print its log until it has ended.

    With `dry_run` the sites are asked and nothing is trained; status 1 means that it could not
    start.

    The run belongs to the SuperLink: it continues if this process ends, and this process waits
    while the SuperLink is restarted.

    Returns:
        Exit status: 0 if the run has completed, 1 if it failed or was stopped.

    Raises:
        ConfigError: not a server directory, or an override is invalid.
        FederationError: the SuperLink rejects the run, or does not come back, or the server's app
            has ended without a message.
    """
    folder = server_folder(directory)
    asked = on_the_sites(overrides)
    from fedllm_flwr.config.compose import compose

    with chdir(folder):  # paths are relative to it, as for the server's app
        config = compose(asked)
    with tempfile.TemporaryDirectory() as temporary:
        run_config = Path(temporary) / "run.toml"
        values = {"overrides": joined(asked), DRY_RUN: "yes" if dry_run else ""}
        run_config.write_text(to_toml(values), "utf-8")
        command = flwr_command("run", str(folder / "app"))
        done = _flwr(folder, [*command, "--run-config", str(run_config), "--format", "json"])
    answer = last_json(done.stdout)
    if "run-id" not in answer:
        said = str(answer.get("error-message") or done.stderr or done.stdout)
        if "unavailable" in said.lower() or not said:
            raise FederationError(
                f"the SuperLink of {folder} does not answer; start {folder}/start.sh first"
            )
        raise FederationError(f"flwr run: {' '.join(said.split())}")
    print(f"Submitted as run {answer['run-id']}.", flush=True)
    return SubmittedRun(folder, str(answer["run-id"]), config.resume or config.output_dir).follow()


def on_the_sites(overrides: Sequence[str]) -> list[str]:
    """Overrides of a run on the sites: all sites take part, unless the run's overrides differ."""
    keys = {text.partition("=")[0] for text in overrides}
    engine = [] if _ENGINE in overrides else [_ENGINE]
    return [*overrides, *engine, *([] if keys & _DECIDE_ON_SITES else [_ALL_SITES])]


def joined(overrides: Sequence[str]) -> str:
    """Overrides in one string, the inverse of `config.overrides.split_overrides`.

    Each is in single quotes, which have no escape: an inner single quote is put in double quotes.
    """
    return " ".join("'" + text.replace("'", "'\"'\"'") + "'" for text in overrides)


@dataclass(frozen=True)
class SubmittedRun:
    """A run at the server of a directory, whose log is followed."""

    folder: Path
    run_id: str
    output_dir: str | None  # the run's directory, if the configuration names it

    def follow(self) -> int:
        """Print the run's log to its end, across restarts of the SuperLink; return its exit status.

        Raises:
            FederationError: the server's app has ended without a message, or the SuperLink does not
                come back.
        """
        shown, heard, said_why = 0, time.monotonic(), False
        while True:
            number = 0
            for line in self._log():
                if line is None:
                    self.check_not_killed()
                    continue
                heard = time.monotonic()
                number += 1
                if number > shown:  # each attempt reads the log from the beginning
                    print(line, end="", flush=True)
                    said_why = said_why or "error: " in line
                    shown = number
            command = [*flwr_command("list"), "--run-id", self.run_id, "--format", "json"]
            runs = last_json(_flwr(self.folder, command).stdout).get("runs")
            status = str(runs[0]["status"]) if isinstance(runs, list) and runs else ""
            if status == "finished:completed":
                return 0
            if status.startswith("finished") and said_why:
                return 1
            if status.startswith("finished"):
                kept = self._how_to_go_on() or (
                    "what start-superexec.sh has printed says more; runs are in "
                    f"{self.folder / 'outputs'}"
                )
                raise FederationError(
                    f"run {self.run_id} ended as {status}, and the server's app has not said why; "
                    f"{kept}"
                )
            self.check_not_killed()
            if status:
                heard = time.monotonic()
            elif time.monotonic() - heard > _PATIENCE_S:
                raise FederationError(
                    f"the SuperLink has not answered for {_PATIENCE_S:g} s; when it is back, "
                    f"`flwr log {self.run_id}` shows what became of the run"
                )
            time.sleep(_PAUSE_S)

    def _locked_by_run(self) -> tuple[RunDirectory, Holder] | None:
        """The directory whose lock names this run; None if there is none, as before the start."""
        named = [] if self.output_dir is None else [Path(self.output_dir).expanduser()]
        for path in named or (self.folder / "outputs").glob("*"):
            directory = RunDirectory((self.folder / path).resolve())
            who = holder(directory)
            if who is not None and who.flower_run == self.run_id:
                return directory, who
        return None

    def _how_to_go_on(self) -> str | None:
        if (found := self._locked_by_run()) is None:
            return None
        command = f"fedllm server run {shlex.quote(str(self.folder))}"
        return how_to_go_on(found[0], command) or "nothing was saved yet; start a new run"

    def check_not_killed(self) -> None:
        """Detect at once that the server's app was killed, which Flower notices after a minute.

        Raises:
            FederationError: it was killed; names the command that resumes the run.
        """
        found = self._locked_by_run()
        if found is not None and found[1].was_killed:
            raise FederationError(
                f"run {self.run_id}: the server's app (process {found[1].pid}) was killed or has "
                f"crashed without a word, out of memory perhaps; {self._how_to_go_on()}"
            )

    def _log(self) -> Iterator[str | None]:
        """Lines of the run's log from its beginning, until the log or the connection ends.

        Yields None after each second without a line.
        """
        lines: queue.Queue[str | None] = queue.Queue()

        def read(stream: IO[str]) -> None:
            for line in stream:
                if not line.startswith(_CONNECTED):
                    lines.put(line)
            lines.put(None)

        with subprocess.Popen(
            flwr_command("log", self.run_id),
            env=flwr_environment(self.folder),
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
