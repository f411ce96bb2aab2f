"""``fedllm status``: one look at a run, a server, a site or a health server."""

import json
from collections.abc import Sequence
from pathlib import Path

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.status.federation import FederationStatus, federation_status, is_operators
from fedllm_flwr.status.health import check_health
from fedllm_flwr.status.run import RunStatus, run_status

NOT_WELL = 3  # exit status, as that of `systemctl status` for what does not run


def status(directory: str | None, health: Sequence[str], as_json: bool) -> int:
    """Print how things stand.

    Args:
        directory: of a run, of ``fedllm server init`` or of ``fedllm site init``.
        health: ``host:port`` of health servers to ask.

    Returns:
        0 if the run goes on or has finished and every process serves, else `NOT_WELL`.

    Raises:
        FedLLMError: the directory is none of these, or cannot be read.
    """
    if directory is None and not health:
        raise ConfigError(
            "nothing to look at; give the directory of a run, a server or a site, or "
            "--health host:port"
        )
    checks = [check_health("health", address) for address in health]
    found = None if directory is None else _look(Path(directory).expanduser())
    well = not any(check.problem for check in checks) and (found is None or found.is_well)
    if as_json:
        answers = [{"address": check.address, "problem": check.problem} for check in checks]
        about = {} if found is None else found.as_json()
        print(json.dumps({"well": well, **({"checks": answers} if checks else {}), **about}))
    else:
        lines = [check.line for check in checks] + ([] if found is None else found.lines())
        print("\n".join(lines))
    return 0 if well else NOT_WELL


def _look(folder: Path) -> RunStatus | FederationStatus:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such directory; give that of a run, a server or a site")
    return federation_status(folder.resolve()) if is_operators(folder) else run_status(folder)
