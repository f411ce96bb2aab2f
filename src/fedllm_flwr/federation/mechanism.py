"""Differential privacy at the server: the release of a round's contributions, and its accounting.

With ``privacy.unit=record`` clients add their own noise (`training.private`), and the server only
accounts for it. With ``privacy.unit=client`` the server adds the noise. A contribution consists of
everything that one client sends for the sum of a round: its update ``delta`` and the rule's further
groups, such as SCAFFOLD's change of the control variate. It is clipped as one vector to the L2 norm
C = ``privacy.clip``. The release is

    (1 / m) (sum_i clip_C(x_i) + z C N(0, I)),

with z the noise multiplier and m the *expected* number of clients per round, a constant; groups
that the rule sums over all N clients are divided by N instead. A client that does not reply
contributes zero. Adding or removing one client therefore changes the sum by at most C, and
replacing it by at most 2 C (`privacy.accounting` defines which one applies). The server step of
every algorithm uses only the release, so it is post-processing; so are the control variate, the
moments and all later rounds.

The server is trusted, as it sees the contributions; the guarantee holds for everyone who sees the
adapters. Under secure aggregation the server need not be trusted: clients clip, and each adds a
share of the noise (`masked_round`).

With ``privacy.clip_quantile`` C follows a quantile of the norms (Andrew et al. 2021,
"Differentially Private Learning with Adaptive Clipping"): b = 1/m (sum_i [norm_i <= C] +
N(0, (m/20)^2)) and C <- C exp(-eta_C (b - quantile)). The indicators, shifted by a half, have
sensitivity 1/2; the noise on the sum is raised for them (`split_noise`).
"""

import json
import math
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedllm_flwr.config import Config
from fedllm_flwr.config.participation import num_sampled
from fedllm_flwr.errors import ConfigError, FederationError
from fedllm_flwr.federation.roster import Roster, choose_clients, choose_from
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Groups, Params, full_like
from fedllm_flwr.privacy.accounting import (
    Release,
    calibrated,
    default_delta,
    epsilon,
    require_accountant,
)
from fedllm_flwr.privacy.clipping import clipped, joint_norm
from fedllm_flwr.privacy.noise import Noise
from fedllm_flwr.training.schedule import steps_per_round

_SLACK = 1.01  # tolerance for rounding on the wire; a larger norm is an unclipped update
_INDICATOR_NOISE = 1 / 20  # deviation on the sum of indicators / m (Andrew et al. 2021, 3)


@dataclass(frozen=True)
class Budget:
    """The privacy budget of a run.

    Args:
        spending: each client's releases in one of its rounds, and their number; with
            ``privacy.unit=client`` one entry, "", for the release of a round.
        noise_multiplier: as configured, or calibrated to ``privacy.target_epsilon``.
        delta: delta of the guarantee; ``count`` is the n of its default.
        planned: epsilon after all rounds; infinite without noise.
    """

    spending: Mapping[str, Release]
    noise_multiplier: float
    delta: float
    count: int
    planned: float


Sizes = Mapping[str, int]
"""Announced number of examples of each client, by name."""


def plan_budget(config: Config, sizes: Sizes) -> Budget | None:
    """The noise of each round and the total epsilon of all rounds; None without privacy.

    Raises:
        ConfigError: no noise reaches the target, or the accountant is not installed.
    """
    privacy, rounds = config.privacy, config.federation.num_rounds
    if privacy.unit == "none":
        return None
    if privacy.noise_multiplier is None or privacy.noise_multiplier > 0:
        require_accountant(f"privacy.unit={privacy.unit}")
    if privacy.unit == "client":
        spending = {"": _round_of_clients(config, len(sizes))}
        times, count = {"": rounds}, len(sizes)
    else:
        spending = {name: _step_of(config, size) for name, size in sizes.items()}
        steps = {name: steps_per_round(config.training, size) for name, size in sizes.items()}
        chosen = Counter(
            name for number in range(1, rounds + 1) for name in choose_from(sizes, config, number)
        )
        times = {name: steps[name] * chosen[name] for name in sizes}
        count = max(sizes.values())
    delta = default_delta(count) if privacy.delta is None else privacy.delta
    multiplier = privacy.noise_multiplier
    if multiplier is None:
        target = privacy.target_epsilon
        assert target is not None  # see `config.validation`
        worst = {(spending[name], times[name]) for name in spending if times[name]}
        multiplier = max(calibrated(release, number, target, delta) for release, number in worst)
    spending = {n: replace(each, noise_multiplier=multiplier) for n, each in spending.items()}
    _check_quantile(config, spending)
    planned = max(epsilon(Counter({spending[n]: times[n]}), delta) for n in spending)
    return Budget(spending, multiplier, delta, count, planned)


def _round_of_clients(config: Config, num_clients: int) -> Release:
    drawn = num_sampled(config, num_clients)
    multiplier = config.privacy.noise_multiplier or 0.0
    discrete = config.privacy.secure_aggregation
    return Release(multiplier, config.privacy.sampling, drawn, num_clients, discrete)


def _step_of(config: Config, num_examples: int) -> Release:
    training = config.training
    batch = training.batch_size * training.gradient_accumulation_steps
    multiplier = config.privacy.noise_multiplier or 0.0
    return Release(multiplier, "poisson", min(batch, num_examples), num_examples)


def _check_quantile(config: Config, spending: Mapping[str, Release]) -> None:
    quantile = config.privacy.clip_quantile
    for release in spending.values() if quantile is not None else ():
        bound = 2 * release.drawn * _INDICATOR_NOISE
        if release.noise_multiplier >= bound:
            raise ConfigError(
                f"privacy.clip_quantile={quantile:g} with a noise multiplier of "
                f"{release.noise_multiplier:.3g} needs more than {release.drawn} clients a round: "
                f"its own noise takes multipliers below {bound:.3g}; sample more clients, or set "
                "privacy.clip_quantile=null."
            )


def split_noise(multiplier: float, expected: float) -> tuple[float, float]:
    """Noise of an adaptive clip: deviation on the sum of indicators, noise multiplier of the sum.

    Both releases together are one Gaussian mechanism with `multiplier`, z: z^-2 = z_D^-2 +
    (2 s)^-2, where indicators, shifted by a half, have sensitivity 1/2 (Andrew et al. 2021,
    theorem 1).

    Args:
        expected: clients of a round; more than 10 x `multiplier`, see `plan_budget`.
    """
    deviation = expected * _INDICATOR_NOISE
    return deviation, (multiplier**-2 - (2 * deviation) ** -2) ** -0.5


def describe_budget(config: Config, sizes: Sizes) -> tuple[str, str] | None:
    """The mechanism and the guarantee as text, for the plan of a run; None without privacy."""
    budget = plan_budget(config, sizes)
    if budget is None:
        return None
    privacy = config.privacy
    mechanism = f"per {privacy.unit}, clip {privacy.clip:g}"
    if privacy.clip_quantile is not None:
        mechanism += f" following quantile {privacy.clip_quantile:g}"
    sampling = "poisson" if privacy.unit == "record" else privacy.sampling
    shares = " in shares of the clients" if privacy.unit == "client" and privacy.at_clients else ""
    mechanism += f", noise {budget.noise_multiplier:.3g} x clip{shares}, {sampling} sampling"
    delta = f"delta {budget.delta:.2g}"
    if privacy.delta is None:
        delta += f" = 1/{budget.count:,}^1.1"
    if math.isinf(budget.planned):
        return mechanism, f"none: no noise ({delta})"
    rounds = f"after {config.federation.num_rounds} rounds"
    target = privacy.target_epsilon
    if target is not None and budget.planned > target:
        rounds += f"; ends before {target:g}"
    return mechanism, f"epsilon {budget.planned:.3g} at {delta} {rounds}"


class ReleaseLog:
    """All releases of a run, including those of rounds that were repeated after a stop.

    A line is written to disk before its noise is drawn, so that the account misses no release.

    Args:
        path: a file of JSON lines, created with the first release.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def releases(self) -> dict[str, Counter[Release]]:
        """The releases so far, by client; "" contains releases that concern all clients.

        Raises:
            FederationError: the file cannot be read.
        """
        found: dict[str, Counter[Release]] = {}
        try:
            for line in self._path.read_text("utf-8").splitlines():
                for name, (release, count) in json.loads(line)["releases"].items():
                    found.setdefault(name, Counter())[Release(**release)] += count
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FederationError(
                f"{self._path} cannot be read ({error}), so that what the run has spent is not "
                "known; put it back, or start a new run."
            ) from error
        return found

    def append(self, server_round: int, releases: Mapping[str, tuple[Release, int]]) -> None:
        """Append each client's releases of a round, and sync the file to disk.

        Raises:
            FederationError: they cannot be written.
        """
        plain = {name: (asdict(release), count) for name, (release, count) in releases.items()}
        line = json.dumps({"round": server_round, "releases": plain}) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FederationError(f"cannot write {self._path}: {error.strerror}.") from error


@dataclass(frozen=True)
class Bounded:
    """A contribution as it is added to the sum.

    Args:
        within: whether its norm was within the bound.
        unclipped: whether the client should have clipped it but has not.
    """

    groups: Groups
    within: bool = True
    unclipped: bool = False


class Mechanism:
    """The mechanism without privacy: contributions are neither clipped nor noised."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def choose(self, roster: Roster, server_round: int) -> list[str]:
        """Names of the clients of a round."""
        return choose_clients(roster, self.config, server_round)

    def config_for(self, roster: Roster) -> Config:
        """The configuration that clients receive."""
        return self.config

    def bound(self, state: ServerState, groups: Groups) -> Bounded:
        """The part of a contribution that is added to the sum."""
        return Bounded(groups)

    def release(
        self,
        state: ServerState,
        roster: Roster,
        combined: Mapping[str, Params],
        within: Sequence[bool],
    ) -> tuple[Mapping[str, Params], Groups]:
        """The input of the server step, and tensors of the mechanism to keep in the next state.

        Args:
            combined: ``delta``, the mean over the clients that replied; further groups, their sums
                divided by N.
            within: `Bounded.within` of each contribution.
        """
        return combined, {}

    def open(self, state: ServerState, roster: Roster) -> None:
        """Log what the last exchange of the round after `state` will release."""

    def spent(self, roster: Roster) -> tuple[float, float] | None:
        """Epsilon and delta of the releases so far; None without privacy."""
        return None

    def is_spent(self, state: ServerState, roster: Roster) -> bool:
        """Whether the round after `state` would exceed ``privacy.target_epsilon``."""
        return False


class Accounted(Mechanism):
    """A mechanism that logs its releases.

    Args:
        path: path of the log of releases.
    """

    def __init__(self, config: Config, path: Path) -> None:
        super().__init__(config)
        self._log = ReleaseLog(path)
        self._budgets: dict[object, Budget] = {}  # by noise multiplier and clients

    @abstractmethod
    def next_releases(self, roster: Roster, server_round: int) -> dict[str, tuple[Release, int]]:
        """The releases of the next round by client, and their numbers."""

    def planned(self, roster: Roster) -> Budget:
        """The run's budget. A run that is resumed for more rounds keeps its initial noise."""
        config, sizes = self.config, _sizes(roster)
        for releases in self._log.releases().values():
            before = next(iter(releases)).noise_multiplier
            config = replace(config, privacy=replace(config.privacy, noise_multiplier=before))
        key = (config.privacy.noise_multiplier, tuple(sorted(sizes.items())))
        if key not in self._budgets:
            budget = plan_budget(config, sizes)
            assert budget is not None
            self._budgets[key] = budget
        return self._budgets[key]

    def config_for(self, roster: Roster) -> Config:
        """With the noise multiplier that reaches the target, if clients add the noise."""
        if not self.config.privacy.at_clients:
            return self.config
        multiplier = self.planned(roster).noise_multiplier
        privacy = replace(self.config.privacy, noise_multiplier=multiplier)
        return replace(self.config, privacy=privacy)

    def spent(self, roster: Roster) -> tuple[float, float]:
        """The largest epsilon of any client, and delta."""
        delta = self.planned(roster).delta
        each = [epsilon(releases, delta) for releases in self._log.releases().values()]
        return max(each, default=0.0), delta

    def is_spent(self, state: ServerState, roster: Roster) -> bool:
        """Whether the logged releases and those of the next round exceed the target."""
        target = self.config.privacy.target_epsilon
        if target is None:
            return False
        before, delta = self._log.releases(), self.planned(roster).delta
        return any(
            epsilon(before.get(name, Counter()) + Counter({release: count}), delta) > target
            for name, (release, count) in self.next_releases(roster, state.round + 1).items()
        )


class RecordMechanism(Accounted):
    """The server's accounting of the clients' DP-SGD (`training.private`).

    The server trusts the announced numbers of examples, which are not considered secret. The
    guarantee is the largest epsilon of any client. A client is charged when it is sampled, whether
    or not its reply arrives.
    """

    def choose(self, roster: Roster, server_round: int) -> list[str]:
        """Sample by the run's seed, and log the releases of each sampled client."""
        self._log.append(server_round, self.next_releases(roster, server_round))
        return super().choose(roster, server_round)

    def next_releases(self, roster: Roster, server_round: int) -> dict[str, tuple[Release, int]]:
        """One release per optimizer step of each sampled client."""
        spending, sizes = self.planned(roster).spending, _sizes(roster)
        return {
            name: (spending[name], steps_per_round(self.config.training, sizes[name]))
            for name in choose_clients(roster, self.config, server_round)
        }


class ClientMechanism(Accounted):
    """The Gaussian mechanism on the sum of clipped contributions; see the module."""

    def choose(self, roster: Roster, server_round: int) -> list[str]:
        """Sample in secret, unless sampling is visible: all clients know the run's seed."""
        names, sampling = sorted(roster), self.config.privacy.sampling
        if sampling == "visible":
            return super().choose(roster, server_round)
        wanted, noise = num_sampled(self.config, len(names)), Noise()
        if sampling == "fixed":
            return [names[i] for i in noise.fixed_sample(len(names), wanted)]
        return [names[i] for i in noise.poisson_sample(len(names), wanted / len(names))]

    def next_releases(self, roster: Roster, server_round: int) -> dict[str, tuple[Release, int]]:
        """One release."""
        return {"": (self.planned(roster).spending[""], 1)}

    def bound(self, state: ServerState, groups: Groups) -> Bounded:
        """The contribution clipped to C.

        Raises:
            NotFiniteError: a value is NaN or infinite.
        """
        clip, norm = self._clip(state), joint_norm(groups)
        by_client = self.config.privacy.clip_quantile is None
        return Bounded(clipped(groups, clip), norm <= clip, by_client and norm > _SLACK * clip)

    def release(
        self,
        state: ServerState,
        roster: Roster,
        combined: Mapping[str, Params],
        within: Sequence[bool],
    ) -> tuple[Mapping[str, Params], Groups]:
        """The noisy sums over the expected number of clients, or over N; and the next C."""
        num_clients, clip, noise = len(state.clients), self._clip(state), Noise()
        releases = self.next_releases(roster, state.round + 1)
        self._log.append(state.round + 1, releases)
        expected, z = releases[""][0].drawn, releases[""][0].noise_multiplier
        sums = self._sums(state, combined, len(within) / expected)
        quantile, tensors = self.config.privacy.clip_quantile, {}
        if quantile is not None:
            deviation, z = split_noise(z, expected) if z else (0.0, 0.0)
            total = sum(within) - len(within) / 2 + deviation * float(noise.normal((1,))[0])
            step = self.config.privacy.clip_learning_rate * (total / expected + 0.5 - quantile)
            tensors = {"privacy": {"clip": np.array([clip * math.exp(-step)])}}
        if z:
            divisors = dict.fromkeys(sums, num_clients) | {"delta": expected}
            sums = {group: noise.on(sums[group], z * clip / divisors[group]) for group in sums}
        return sums, tensors

    @staticmethod
    def _sums(state: ServerState, combined: Mapping[str, Params], share: float) -> Groups:
        """The sums over their constant denominators.

        Args:
            share: number of clients that replied / expected number; the others contribute zero.
        """
        sums = {group: params or full_like(state.params, 0.0) for group, params in combined.items()}
        if share != 1:  # of a mean
            sums["delta"] = {name: value * share for name, value in sums["delta"].items()}
        return sums

    def _clip(self, state: ServerState) -> float:
        kept = state.tensors.get("privacy")
        return self.config.privacy.clip if kept is None else float(kept["clip"][0])


class SharedMechanism(ClientMechanism):
    """The mechanism under secure aggregation: clients clip, and add shares of the noise.

    Nothing is released before the sum of a round is unmasked. A round that is dropped after this
    exchange has begun is charged nevertheless.
    """

    def open(self, state: ServerState, roster: Roster) -> None:
        """Log the release of the round after `state`."""
        self._log.append(state.round + 1, self.next_releases(roster, state.round + 1))

    def release(
        self,
        state: ServerState,
        roster: Roster,
        combined: Mapping[str, Params],
        within: Sequence[bool],
    ) -> tuple[Mapping[str, Params], Groups]:
        """The sums, which contain the noise, over the expected number of clients, or over N."""
        expected = self.next_releases(roster, state.round + 1)[""][0].drawn
        return self._sums(state, combined, len(within) / expected), {}


def mechanism_of(config: Config, path: Path) -> Mechanism:
    """The mechanism of a configuration.

    Args:
        path: path of the log of releases; nothing is written before the first release.
    """
    by_client = SharedMechanism if config.privacy.secure_aggregation else ClientMechanism
    kinds = {"none": Mechanism, "client": by_client, "record": RecordMechanism}
    kind: Any = kinds[config.privacy.unit]
    made: Mechanism = kind(config) if kind is Mechanism else kind(config, path)
    return made


def _sizes(roster: Roster) -> Sizes:
    return {name: client.info.num_examples for name, client in roster.items()}
