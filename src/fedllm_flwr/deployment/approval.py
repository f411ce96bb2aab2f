"""Approval of runs at a site: requests that wait for its operator, and the decisions."""

import contextlib
import fcntl
import getpass
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedllm_flwr.config import Config
from fedllm_flwr.config.names import shown
from fedllm_flwr.deployment.audit import settings_digest
from fedllm_flwr.deployment.node import flat
from fedllm_flwr.errors import ApprovalDeclined, ApprovalPending, ConfigError, FederationError
from fedllm_flwr.files import write_atomically

EVERY_RUN, NEW_SETTINGS, AUTOMATIC = RULES = ("every-run", "new-settings", "automatic")
APPROVED, DECLINED = "approved", "declined"
_ID_DIGITS = 12  # hexadecimal: too many for a server to find another request with the same id
_SHORTEST_ID = 4
_MOST_WAITING = 100  # requests; a server cannot fill the disk with more
SILENT_S = 60.0  # a server that has not asked for this long no longer waits
_SERVERS_OWN = ("start_timeout_s",)  # keys of the section federation that need no approval


@dataclass(frozen=True)
class ApprovalRequest:
    """A server's request to run with certain settings, and the decision of the site's operator.

    ``id`` is derived from the run and its settings, so a decision applies only to these settings.
    """

    id: str
    run: str  # Flower's id of the run
    server: str  # host:port
    digest: str  # of the settings
    settings: dict[str, Any]
    asked: str  # time of the first message, UTC
    last_asked: str
    decision: str = ""  # "" while it waits, then approved or declined
    decided: str = ""
    by: str = ""

    @property
    def is_undecided(self) -> bool:
        """Whether no decision has been made."""
        return not self.decision

    @property
    def is_waiting(self) -> bool:
        """Whether a server is waiting for the decision: it then asks every few seconds."""
        since = datetime.now(UTC) - datetime.fromisoformat(self.last_asked)
        return self.is_undecided and since.total_seconds() <= SILENT_S


class Requests:
    """The requests of a site, one file each, shared by its processes and its operator."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def require(self, rule: str, config: Config, run: str, server: str, site: str) -> None:
        """Return if the run is approved; otherwise record a request.

        Args:
            rule: approval rule of the site's policy: every-run, new-settings or automatic.
            config: as the server sent it.
            run: Flower's id of the run.

        Raises:
            ApprovalPending: it waits for the site's operator.
            ApprovalDeclined: the operator has declined it.
        """
        if rule == AUTOMATIC:
            return
        settings = asdict(config)
        federation = {k: v for k, v in settings["federation"].items() if k not in _SERVERS_OWN}
        digest = settings_digest({**settings, "federation": federation})
        with self._locked():
            known = self.all()
            mine = next((r for r in known if (r.run, r.digest) == (run, digest)), None)
            if mine is None:
                # Undecided, and the server has stopped asking, as after a dry run.
                silent = [r for r in known if r.is_undecided and not r.is_waiting]
                for request in silent:
                    (self.folder / f"{request.id}.json").unlink(missing_ok=True)
                known = [request for request in known if request not in silent]
                same = [r for r in known if r.digest == digest and r.decision]
                if rule == NEW_SETTINGS and same and same[-1].decision == APPROVED:
                    return
                if sum(request.is_undecided for request in known) >= _MOST_WAITING:
                    raise ApprovalPending(f"{_MOST_WAITING} requests wait for approval at {site}")
                identity = f"{run} {digest}".encode()
                name = hashlib.sha256(identity).hexdigest()[:_ID_DIGITS]
                mine = ApprovalRequest(name, run, server, digest, settings, _now(), _now())
            elif mine.is_undecided:
                mine = replace(mine, last_asked=_now())
            if mine.is_undecided:
                self._write(mine)
        if mine.decision == DECLINED:
            raise ApprovalDeclined(f"the operator of {site} has declined this run")
        if mine.is_undecided:
            raise ApprovalPending(f"waiting for approval at {site}")

    def all(self) -> list[ApprovalRequest]:
        """Every request, the oldest first.

        Raises:
            FederationError: a file is not a readable request.
        """
        requests = []
        for file in self.folder.glob("*.json"):
            try:
                requests.append(ApprovalRequest(**json.loads(file.read_bytes())))
            except (OSError, ValueError, TypeError) as error:
                raise FederationError(
                    f"{file}: no request for approval ({error}); remove the file"
                ) from error
        return sorted(requests, key=lambda request: (request.asked, request.id))

    def decide(self, name: str, decision: str) -> ApprovalRequest:
        """Approve or decline the request `name`.

        Args:
            name: first digits of its id, or Flower's id of its run if that run has one request.

        Raises:
            ConfigError: no request of this name, or several.
        """
        try:
            user = getpass.getuser()
        except (OSError, KeyError):  # a container's user id without a name
            user = "unknown"
        with self._locked():
            made = replace(self.find(name), decision=decision, decided=_now(), by=user)
            self._write(made)
        return made

    def find(self, name: str) -> ApprovalRequest:
        """The request `name`, as in `decide`.

        Raises:
            ConfigError: no request of this name, or several.
        """
        known = self.all()
        found = [
            request
            for request in known
            if request.run == name
            or (len(name) >= _SHORTEST_ID and request.id.startswith(name.lower()))
        ]
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(request.id for request in found)
            raise ConfigError(f"{shown(name)}: several requests; name one of {ids}")
        waiting = ", ".join(request.id for request in known if request.is_waiting)
        raise ConfigError(f"{shown(name)}: no request of this id; waiting: {waiting or 'none'}")

    def _write(self, request: ApprovalRequest) -> None:
        content = json.dumps(asdict(request), indent=1)
        write_atomically(self.folder / f"{request.id}.json", content.encode())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self.folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise FederationError(
                f"cannot write the requests in {self.folder}: {error.strerror or error}."
            ) from error


def in_words(settings: Mapping[str, Any]) -> list[str]:
    """A run's settings, summarised for the site's operator in three lines."""
    model, lora, training = settings["model"], settings["lora"], settings["training"]
    federation, algorithm = settings["federation"], settings["algorithm"]
    variant = "" if algorithm["variant"] == "paper" else f" ({algorithm['variant']})"
    revision = f"@{model['revision']}" if model["revision"] else ""
    quantization = settings["quantization"]["name"]
    precision = "" if quantization == "none" else f" {quantization}"
    batch = training["batch_size"] * training["gradient_accumulation_steps"]
    steps = training["max_steps"]
    amount = f"{steps} steps" if steps > 0 else f"{training['num_epochs']:g} passes over the data"
    modules = lora["target_modules"]
    where = modules if isinstance(modules, str) else ", ".join(map(str, modules))
    dtype, transforms = settings["communication"]["dtype"], settings["communication"]["transforms"]
    leaves = ["the change of the adapter"]
    if algorithm["name"] == "scaffold":
        leaves.append("that of a control variate")
    leaves.append("losses and counts")
    if settings["evaluation"]["clients"]:
        leaves.append("scores on held-out records of yours")
    return [
        f"{algorithm['name']}{variant}, {settings['task']['name']}, {model['path']}{revision}"
        f"{precision}, {federation['num_rounds']} rounds x {amount} of {batch} records",
        f"LoRA of rank {lora['r']} on {where}, learning rate {training['learning_rate']:g}, at "
        f"most {training['max_length']} tokens, template {settings['data']['template']}",
        f"leaves you: {', '.join(leaves)}, as {' '.join((*transforms, dtype))}",
    ]


def differences(settings: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[str]:
    """``section.key: before -> now`` for every setting that differs from `earlier`."""
    now, before = flat(settings), flat(earlier)
    return [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted({*now, *before})
        if now.get(key) != before.get(key)
    ]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
