"""A site's state on disk: client memory of its runs, tokenised records, and their removal."""

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from fedllm_flwr.errors import ConfigError, FederationError, RefusedError
from fedllm_flwr.files import write_atomically

_DAY_S = 86_400
_GB = 10**9
_SECRET_BYTES = 32


@dataclass(frozen=True)
class SiteState:
    """The directory of a site's state.

    ``runs/<run>/<client>/`` contains client memory (control variates, personal adapters, reference
    log-probabilities), ``tokens/`` the tokenised records, ``ledger/`` the request ledger (see
    `Ledger`), ``privacy/`` the privacy account (see `privacy_account`), and ``secret`` the secret
    that seeds the draw of records together with the run's seed.
    """

    root: Path

    @property
    def runs(self) -> Path:
        """Contains one folder per run."""
        return self.root / "runs"

    @property
    def tokens(self) -> Path:
        """The tokenised records."""
        return self.root / "tokens"

    @property
    def digests(self) -> Path:
        """Digests of the data files, by size and modification time."""
        return self.root / "digests"

    @property
    def ledger(self) -> Path:
        """Request ledger of each run."""
        return self.root / "ledger"

    def folder(self, run: str, client: str) -> Path:
        """Directory of a client's memory of a run, safe for any name that a server sends.

        Names are quoted, including dots, so that they cannot lead out of the folder.
        """
        return self.runs / (_quoted(run) or "run") / client

    def secret(self) -> str:
        """A random text that never leaves the site; created at the first call.

        Raises:
            FederationError: it cannot be written.
        """
        file = self.root / "secret"
        with contextlib.suppress(OSError):
            if known := file.read_text("ascii").strip():
                return known
        made = secrets.token_hex(_SECRET_BYTES)
        write_atomically(file, f"{made}\n".encode())
        with contextlib.suppress(OSError):
            file.chmod(0o600)
        return made

    def make_room(self, run: str, days: float | None, limit_gb: float | None) -> None:
        """Remove the state of inactive runs, and refuse an assignment if the rest is too large.

        Args:
            run: the assignment's run, whose state is kept.
            days: days since a run's last message after which its state is removed; None: never.
            limit_gb: limit of all state; None: no limit.

        Raises:
            RefusedError: the remaining state exceeds the limit.
        """
        if days is not None:
            oldest = time.time() - days * _DAY_S
            current = _quoted(run) or "run"
            for folder in [*_children(self.runs), *_children(self.tokens)]:
                written = (file.stat().st_mtime for file in _files(folder))
                newest = max(written, default=folder.stat().st_mtime)
                if folder.name != current and newest < oldest:
                    _remove(folder)
        used = sum(file.stat().st_size for top in (self.runs, self.tokens) for file in _files(top))
        if limit_gb is not None and used > limit_gb * _GB:
            raise RefusedError(
                f"the site refuses to train: its state takes more than its max_state_gb "
                f"({limit_gb:g}); let its operator run `fedllm site forget` or raise the limit in "
                "policy.yaml"
            )

    def forget(self, runs: list[str] | None) -> list[str]:
        """Remove the state of `runs`; None: of all runs, with all tokenised records.

        Returns:
            Lines for the site's operator.

        Raises:
            FederationError: files cannot be removed.
        """
        doomed = _children(self.runs)
        if runs is not None:
            names = {_quoted(run) for run in runs}
            doomed = [folder for folder in doomed if folder.name in names]
        lines = []
        for path in [*doomed, *(_children(self.tokens) if runs is None else [])]:
            size = sum(file.stat().st_size for file in _files(path))
            kind = f"state of run {path.name}" if path in doomed else "tokenised records"
            try:
                _remove(path)
            except OSError as error:
                raise FederationError(f"cannot remove {path}: {error.strerror}.") from error
            lines.append(f"Removed {kind} ({size / 1e6:.1f} MB).")
        log = self.root / "trainer.log"
        if runs is None:
            earlier_log(log).unlink(missing_ok=True)
        if runs is None and log.is_file():
            log.write_bytes(b"")  # a running trainer continues writing to it
            lines.append(f"Emptied {log}.")
        return lines


def earlier_log(log: Path) -> Path:
    """Where `log` is moved when it has grown too large."""
    return log.with_name(f"{log.name}.1")


def site_state(node_config: Mapping[str, object], default: Path) -> SiteState:
    """The state directory ``state-dir`` of a site's node config.

    Args:
        default: parent folder of the state of sites without this key, by site name.
    """
    if "state-dir" in node_config:
        return SiteState(Path(str(node_config["state-dir"])).expanduser())
    return SiteState(default / (_quoted(str(node_config.get("client-name", ""))) or "site"))


def forget_runs(directory: str, run: str | None, everything: bool) -> list[str]:
    """``fedllm site forget``: remove a run's state at a site, or the state of all runs.

    The removal is written to the audit log.

    Args:
        directory: directory made by ``site init``.
        run: Flower's id of the run, or the name of its folder in ``state/runs``.

    Raises:
        ConfigError: no such directory or run, or neither `run` nor `everything` is given.
        FederationError: the log cannot be written.
    """
    import tomllib

    from fedllm_flwr.deployment.audit import AuditLog
    from fedllm_flwr.deployment.ledger import Ledger

    file = Path(directory).expanduser() / "node.toml"
    try:
        node = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no node config"
        raise ConfigError(f"{file}: {reason}; give the directory of `fedllm site init`") from None
    if (run is None) != everything:
        raise ConfigError(
            "give either a run (those of state/runs, or Flower's id of one) or --all, which also "
            "removes the tokenised records"
        )
    state = SiteState(Path(str(node.get("state-dir", file.parent / "state"))).expanduser())
    if run is None:
        lines = state.forget(None)
    else:
        lines = state.forget([run, f"secure-{run}", *Ledger(state.ledger).runs_of(run)])
        if not lines:
            there = ", ".join(folder.name for folder in _children(state.runs)) or "none"
            raise ConfigError(f"{run}: no state of such a run here; there are: {there}")
    entry = {"event": "forget", "verdict": "removed", "reason": " ".join(lines) or "nothing kept"}
    AuditLog(file.parent / "audit").append(entry if run is None else {**entry, "run": run})
    return [
        *(lines or ["Nothing was kept."]),
        "A trainer that is running holds tokenised records in memory until it has been idle for "
        "its idle-timeout-s (ten minutes); end the site's SuperNode to end it now.",
        "What has left the site is not undone: adapters that were trained on its records are "
        "with the server.",
    ]


def _quoted(name: str) -> str:
    return quote(name, safe="").replace(".", "%2E")


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _files(top: Path) -> Iterator[Path]:
    if top.is_file():
        yield top
    elif top.is_dir():
        yield from (file for file in top.rglob("*") if file.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
