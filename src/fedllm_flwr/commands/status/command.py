"""``fedllm status``: the state of a run, a server, a site or a health server."""

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fedllm_flwr.commands.status.federation import FederationStatus, federation_status, is_operators
from fedllm_flwr.commands.status.health import check_health
from fedllm_flwr.commands.status.run import RunStatus, run_status
from fedllm_flwr.commands.status.several import SeveralStatus, holds_several, several_status
from fedllm_flwr.errors import ConfigError

NOT_WELL = 3  # exit status, like `systemctl status` of a stopped service


def status(
    directory: str | None, health: Sequence[str], as_json: bool, watch_s: float | None = None
) -> int:
    """Print the state once, or every `watch_s` seconds until the run has ended or Ctrl-C.

    Args:
        directory: directory of a run, a comparison, a sweep, ``fedllm server init`` or ``fedllm
            site init``.
        health: ``host:port`` of health servers to ask.

    Returns:
        0 if the run is running or has finished and every process serves, otherwise `NOT_WELL`.

    Raises:
        FedLLMError: the directory is none of these, or cannot be read.
    """
    if watch_s is None:
        return _print_state(directory, health, as_json)[0]
    if watch_s <= 0:
        raise ConfigError(f"--watch must be > 0 seconds, got {watch_s:g}.")
    code, may_change = NOT_WELL, True
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            if not as_json and sys.stdout.isatty():
                print("\033[H\033[2J", end="")
            code, may_change = _print_state(directory, health, as_json)
            sys.stdout.flush()
            if not may_change:
                break
            time.sleep(watch_s)
    return code


def _print_state(directory: str | None, health: Sequence[str], as_json: bool) -> tuple[int, bool]:
    """Print the state once; return the exit status, and whether the state may still change."""
    if directory is None and not health:
        raise ConfigError("give the directory of a run, a server or a site, or --health host:port")
    checks = [check_health("health", address) for address in health]
    found: RunStatus | SeveralStatus | FederationStatus | None = None
    if directory is not None:
        folder = Path(directory).expanduser()
        if not folder.is_dir():
            raise ConfigError(
                f"{folder}: no such directory; give that of a run, a server or a site"
            )
        if holds_several(folder):
            found = several_status(folder)
        elif is_operators(folder):
            found = federation_status(folder.resolve())
        else:
            found = run_status(folder)
    well = not any(check.problem for check in checks) and (found is None or found.is_well)
    if as_json:
        answers = [{"address": check.address, "problem": check.problem} for check in checks]
        about = {} if found is None else found.as_json()
        print(json.dumps({"well": well, **({"checks": answers} if checks else {}), **about}))
    else:
        lines = [check.line for check in checks] + ([] if found is None else found.lines())
        print("\n".join(lines))
    ends = isinstance(found, RunStatus | SeveralStatus) and found.state != "running"
    return 0 if well else NOT_WELL, not ends
