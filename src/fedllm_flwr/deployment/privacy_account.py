"""What a site's records have been spent on, over all runs, and the bound that its policy sets.

The account is the site's own: it charges what the site does itself (``privacy.unit=record``: its
noise, its draws, its number of records), or the release of a sum in which the site has clipped its
share (``privacy.unit=client``: once for each round that it takes part in, without amplification,
believing the noise of the server or, under secure aggregation, of the other sites). A round is
charged before it is trained on, every time it is asked for. Entries are chained by hashes as those
of the audit log are; a second copy of the last hash, in the site's directory, shows when the
account is lost or has been put back to an older state.
"""

import contextlib
import fcntl
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from fedllm_flwr.config import Config
from fedllm_flwr.deployment.audit import AuditLog, Entry
from fedllm_flwr.deployment.node import node_config, site_folder
from fedllm_flwr.deployment.policy import Policy, site_policy
from fedllm_flwr.deployment.site_state import site_state
from fedllm_flwr.errors import FederationError, RefusedError
from fedllm_flwr.files import write_atomically
from fedllm_flwr.privacy.accounting import (
    Release,
    default_delta,
    epsilon,
    require_accountant,
)
from fedllm_flwr.training.schedule import steps_per_round

HEAD_COPY = "privacy-account.json"
"""File in a site's directory with the number and hash of the account's last entry."""
FOLDER = "privacy"
"""Folder of a site's state that holds the account."""


class PrivacyAccount:
    """The account in a folder.

    Args:
        head_copy: file with a second copy of the last hash; None: there is none.
    """

    def __init__(self, folder: Path, head_copy: Path | None) -> None:
        self._folder = folder
        self._log = AuditLog(folder)
        self._head_copy = head_copy

    def entries(self) -> list[Entry]:
        """All charges, oldest first.

        Raises:
            FederationError: entries were lost or edited, or cannot be read.
        """
        report = self._log.read()
        problems = list(report.problems)
        if report.removed:
            problems.append(f"entries 1 to {report.removed} are missing")
        if self._head_copy is not None and self._head_copy.is_file():
            try:
                noted = json.loads(self._head_copy.read_bytes())["hash"]
            except (OSError, ValueError, KeyError, TypeError):
                noted = None
            if noted not in {entry["hash"] for entry in report.entries}:
                problems.append(f"the entry that {self._head_copy.name} names is not there")
        if problems:
            raise FederationError(
                f"the privacy account in {self._folder} was lost or edited: {problems[0]}. Put it "
                f"back from a copy; or, to begin a new one and forget what was spent, move the "
                f"folder and {self._head_copy} aside.",
                "its privacy account was lost or edited; its operator has to decide",
            )
        return report.entries

    def charge(
        self, config: Config, dataset: str, num_examples: int, policy: Policy, run: str, round: int
    ) -> None:
        """Charge a round to a data set, or refuse it.

        Args:
            config: of the run, with the site's own values.
            dataset: name of the site's data set, "" for its only one.
            num_examples: that the site trains on.

        Raises:
            RefusedError: the round would pass the policy's ``max_epsilon``.
            FederationError: the account was lost or edited, or cannot be written.
        """
        privacy = config.privacy
        if privacy.unit == "none":
            return  # `Policy.check` has refused it where it must
        release, count = _release_of(config, num_examples)
        with self._locked():
            before, delta = self.entries(), default_delta(num_examples)
            limit = policy.max_epsilon
            if limit is not None:
                if release.noise_multiplier:
                    require_accountant("max_epsilon in a site's policy.yaml")
                spent = spent_on(before, dataset, delta)
                total = epsilon(_releases(before, dataset) + Counter({release: count}), delta)
                if total > limit:
                    raise RefusedError(
                        f"the site refuses round {round}: it would spend epsilon {total:.3g} on "
                        f"its records, above its max_epsilon ({limit:g}; {spent:.3g} is spent); "
                        "ask for more noise or fewer steps, or let the site's operator decide"
                    )
            self._log.append(
                {
                    "run": run,
                    "round": round,
                    "unit": privacy.unit,
                    "dataset": dataset,
                    "release": asdict(release),
                    "count": count,
                    "delta": delta,
                }
            )
            if self._head_copy is not None:
                last = self._log.read().entries[-1]
                head = {"sequence": last["sequence"], "hash": last["hash"]}
                write_atomically(self._head_copy, json.dumps(head).encode())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (self._folder / "charging").open("w")
        except OSError as error:
            raise FederationError(f"cannot write {self._folder}: {error.strerror}.") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def spent_on(entries: list[Entry], dataset: str, delta: float) -> float:
    """Epsilon of all charges to a data set together."""
    return epsilon(_releases(entries, dataset), delta)


def ledger_lines(directory: str | Path) -> list[str]:
    """What each data set of a site has been spent on, for its operator.

    Raises:
        ConfigError: no site's directory.
        FederationError: the account was lost or edited.
    """
    own = node_config(site_folder(directory))
    limit = site_policy(own).max_epsilon
    entries = account_of(own, site_state(own, site_folder(directory) / "state").root).entries()
    if not entries:
        return ["no private run has used the records"]
    lines = []
    for dataset in sorted({str(entry["dataset"]) for entry in entries}):
        of_set = [entry for entry in entries if entry["dataset"] == dataset]
        delta = float(of_set[-1]["delta"])
        spent = spent_on(of_set, dataset, delta)
        left = "" if limit is None else f" of {limit:g}, {max(0.0, limit - spent):.3g} left"
        name = f"{dataset}: " if dataset else ""
        lines.append(f"{name}epsilon {spent:.3g}{left} at delta {delta:.2g}")
        for run in dict.fromkeys(str(entry["run"]) for entry in of_set):
            of_run = [entry for entry in of_set if entry["run"] == run]
            noise = ", ".join(
                f"{z:g}" for z in sorted({e["release"]["noise_multiplier"] for e in of_run})
            )
            units = ", ".join(sorted({str(entry["unit"]) for entry in of_run}))
            cost = spent_on(of_run, dataset, delta)
            lines.append(
                f"  run {run[:16]}  {len(of_run)} rounds per {units}, noise {noise} x clip: "
                f"epsilon {cost:.3g}"
            )
    return lines


def account_of(own: Mapping[str, object], state: Path) -> PrivacyAccount:
    """The account of a site.

    Args:
        own: its node config.
        state: its folder of state.
    """
    folder = own.get("site-dir")
    copy = None if folder is None else Path(str(folder)).expanduser() / HEAD_COPY
    return PrivacyAccount(state / FOLDER, copy)


def _release_of(config: Config, num_examples: int) -> tuple[Release, int]:
    """What a round of a site releases of its records, and how often."""
    privacy, training = config.privacy, config.training
    multiplier = privacy.noise_multiplier or 0.0
    if privacy.unit == "client":
        return Release(multiplier, "visible", 1, 1, privacy.secure_aggregation), 1
    batch = training.batch_size * training.gradient_accumulation_steps
    release = Release(multiplier, "poisson", min(batch, num_examples), num_examples)
    return release, steps_per_round(training, num_examples)


def _releases(entries: list[Entry], dataset: str) -> Counter[Release]:
    found: Counter[Release] = Counter()
    for entry in entries:
        if entry["dataset"] == dataset:
            found[Release(**entry["release"])] += int(entry["count"])
    return found
