"""Client-level differential privacy: what the server releases of a round's contributions.

A contribution is all that one client sends in one round for the sum: its update ``delta`` and the
groups that the rule adds, such as SCAFFOLD's change of the control variate. It is clipped as one
vector to the L2 norm C = ``privacy.clip``. The release is

    (1 / m) (sum_i clip_C(x_i) + z C N(0, I)),

with z the noise multiplier and m the *expected* number of clients of a round, a constant; what the
rule sums over all N clients is divided by N instead. A client that does not reply adds zero. So one
client changes the sum by at most C if it comes or goes, by 2 C if it is replaced by another
(`privacy.accounting` says which counts). The server step, whatever the algorithm, sees the release
alone and is post-processing of it; so are the control variate, the moments and all later rounds.

The server is trusted: it sees the contributions. The promise is to whoever sees the adapters.

With ``privacy.clip_quantile`` C follows a quantile of the norms (Andrew et al. 2021,
"Differentially Private Learning with Adaptive Clipping"): b = 1/m (sum_i [norm_i <= C] +
N(0, (m/20)^2)) and C <- C exp(-eta_C (b - quantile)). The indicators, shifted by a half, have
sensitivity 1/2. The noise on the sum is raised to z_D = (z^-2 - (2 m/20)^-2)^(-1/2), so that both
together are one Gaussian mechanism with multiplier z (their theorem 1).
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from fedllm_flwr.config import Config
from fedllm_flwr.config.participation import num_sampled
from fedllm_flwr.errors import ConfigError, FederationError
from fedllm_flwr.federation.roster import Roster, choose_clients
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

_SLACK = 1.01  # a norm above the bound by less is the wire's rounding, not an unclipped update
_INDICATOR_NOISE = 1 / 20  # deviation on the sum of indicators / m (Andrew et al. 2021, 3)


@dataclass(frozen=True)
class Budget:
    """What a run may spend and what each of its rounds does.

    Args:
        release: one round's release.
        delta: of the promise.
        planned: epsilon after all rounds; infinite without noise.
    """

    release: Release
    delta: float
    planned: float


def plan_budget(config: Config, num_clients: int) -> Budget | None:
    """The noise of each round and what all rounds will have spent; None without client-level DP.

    Raises:
        ConfigError: no noise reaches the target, or the accountant is not installed.
    """
    privacy = config.privacy
    if privacy.unit != "client":
        return None
    delta = default_delta(num_clients) if privacy.delta is None else privacy.delta
    rounds, drawn = config.federation.num_rounds, num_sampled(config, num_clients)
    release = Release(privacy.noise_multiplier or 0.0, privacy.sampling, drawn, num_clients)
    if privacy.noise_multiplier is None:
        require_accountant(f"privacy.target_epsilon={privacy.target_epsilon}")
        assert privacy.target_epsilon is not None  # see `config.validation`
        multiplier = calibrated(release, rounds, privacy.target_epsilon, delta)
        release = replace(release, noise_multiplier=multiplier)
    elif release.noise_multiplier:
        require_accountant(f"privacy.noise_multiplier={privacy.noise_multiplier}")
    bound = 2 * drawn * _INDICATOR_NOISE
    if privacy.clip_quantile is not None and release.noise_multiplier >= bound:
        raise ConfigError(
            f"privacy.clip_quantile={privacy.clip_quantile:g} with a noise multiplier of "
            f"{release.noise_multiplier:.3g} needs more than {drawn} clients a round: its own "
            f"noise takes multipliers below {bound:.3g}; sample more clients, or set "
            "privacy.clip_quantile=null."
        )
    return Budget(release, delta, epsilon([release] * rounds, delta))


def describe_budget(config: Config, num_clients: int) -> tuple[str, str] | None:
    """The mechanism and the promise in words, for the plan of a run; None without one."""
    budget = plan_budget(config, num_clients)
    if budget is None:
        return None
    privacy, release = config.privacy, budget.release
    clip = f"clip {privacy.clip:g}"
    if privacy.clip_quantile is not None:
        clip += f" following quantile {privacy.clip_quantile:g}"
    mechanism = (
        f"per client, {clip}, noise {release.noise_multiplier:.3g} x clip, "
        f"{privacy.sampling} sampling"
    )
    delta = f"delta {budget.delta:.2g}"
    if privacy.delta is None:
        delta += f" = 1/{num_clients}^1.1"
    rounds = f"after {config.federation.num_rounds} rounds"
    if math.isinf(budget.planned):
        return mechanism, f"none: no noise ({delta})"
    target = privacy.target_epsilon
    if target is not None and budget.planned > target:
        rounds += f"; ends before {target:g}"
    return mechanism, f"epsilon {budget.planned:.3g} at {delta} {rounds}"


class ReleaseLog:
    """All releases of a run, also those of rounds that a stopped server has done again.

    A line is on disk before its noise is drawn, so that no release is ever left out of the account.

    Args:
        path: a file of JSON lines; made with the first release.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def releases(self) -> list[Release]:
        """What was released so far.

        Raises:
            FederationError: the file cannot be read.
        """
        try:
            lines = self._path.read_text("utf-8").splitlines()
            return [Release(**json.loads(line)["release"]) for line in lines]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FederationError(
                f"{self._path} cannot be read ({error}), so that what the run has spent is not "
                "known; put it back, or start the run anew."
            ) from error

    def append(self, server_round: int, release: Release) -> None:
        """Write a release down and sync it to the disk.

        Raises:
            FederationError: it cannot be written.
        """
        line = json.dumps({"round": server_round, "release": asdict(release)}) + "\n"
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
    """A contribution as it enters the sum.

    Args:
        within: whether its norm was within the bound.
        unclipped: whether the client should have clipped it, and has not.
    """

    groups: Groups
    within: bool = True
    unclipped: bool = False


class Mechanism:
    """Choice, bound and release of contributions without a promise: all of it as it comes."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def choose(self, roster: Roster, server_round: int) -> list[str]:
        """Names of the clients of a round."""
        return choose_clients(roster, self.config, server_round)

    def bound(self, state: ServerState, groups: Groups) -> Bounded:
        """What of a contribution enters the sum."""
        return Bounded(groups)

    def release(
        self, state: ServerState, combined: Mapping[str, Params], within: Sequence[bool]
    ) -> tuple[Mapping[str, Params], Groups]:
        """What the server step gets of a round, and what the next state keeps of the mechanism.

        Args:
            combined: ``delta``, the mean over the clients that replied; other groups, their sums
                divided by N.
            within: of each contribution, as `bound` has found.
        """
        return combined, {}

    def spent(self) -> tuple[float, float] | None:
        """Epsilon and delta of what was released so far; None: no promise is made."""
        return None

    def is_spent(self, num_clients: int) -> bool:
        """Whether one more round would pass ``privacy.target_epsilon``."""
        return False


class ClientMechanism(Mechanism):
    """The Gaussian mechanism on the sum of clipped contributions; see the module.

    Args:
        path: of the log of releases.
    """

    def __init__(self, config: Config, path: Path) -> None:
        super().__init__(config)
        self._log = ReleaseLog(path)

    def choose(self, roster: Roster, server_round: int) -> list[str]:
        """Drawn in secret, unless everybody may see it: the run's seed is known to all clients."""
        names, sampling = sorted(roster), self.config.privacy.sampling
        if sampling == "visible":
            return super().choose(roster, server_round)
        wanted, noise = num_sampled(self.config, len(names)), Noise()
        if sampling == "fixed":
            return [names[i] for i in noise.fixed_sample(len(names), wanted)]
        return [names[i] for i in noise.poisson_sample(len(names), wanted / len(names))]

    def bound(self, state: ServerState, groups: Groups) -> Bounded:
        """The contribution clipped to C.

        Raises:
            NotFiniteError: a value is NaN or infinite.
        """
        clip, norm = self._clip(state), joint_norm(groups)
        by_client = self.config.privacy.clip_quantile is None
        return Bounded(clipped(groups, clip), norm <= clip, by_client and norm > _SLACK * clip)

    def release(
        self, state: ServerState, combined: Mapping[str, Params], within: Sequence[bool]
    ) -> tuple[Mapping[str, Params], Groups]:
        """The noisy sums over the expected number of clients, or over N; and the next C."""
        num_clients, clip, noise = len(state.clients), self._clip(state), Noise()
        release = self._next(num_clients)
        self._log.append(state.round + 1, release)
        expected, z = release.drawn, release.noise_multiplier
        sums = {group: params or full_like(state.params, 0.0) for group, params in combined.items()}
        if len(within) != expected:  # of a mean; a client that has not replied adds zero
            share = len(within) / expected
            sums["delta"] = {name: value * share for name, value in sums["delta"].items()}
        quantile, tensors = self.config.privacy.clip_quantile, {}
        if quantile is not None:
            deviation = expected * _INDICATOR_NOISE if z else 0.0
            z = (z**-2 - (2 * deviation) ** -2) ** -0.5 if z else 0.0
            total = sum(within) - len(within) / 2 + deviation * float(noise.normal((1,))[0])
            step = self.config.privacy.clip_learning_rate * (total / expected + 0.5 - quantile)
            tensors = {"privacy": {"clip": np.array([clip * math.exp(-step)])}}
        if z:
            divisors = dict.fromkeys(sums, num_clients) | {"delta": expected}
            sums = {group: noise.on(sums[group], z * clip / divisors[group]) for group in sums}
        return sums, tensors

    def spent(self) -> tuple[float, float]:
        """Epsilon and delta of all releases in the log."""
        releases = self._log.releases()
        delta = self._delta(max((release.of for release in releases), default=1))
        return (epsilon(releases, delta) if releases else 0.0), delta

    def is_spent(self, num_clients: int) -> bool:
        """Whether the releases in the log and one more pass the target."""
        target = self.config.privacy.target_epsilon
        if target is None:
            return False
        releases = [*self._log.releases(), self._next(num_clients)]
        return epsilon(releases, self._delta(num_clients)) > target

    def _delta(self, num_clients: int) -> float:
        chosen = self.config.privacy.delta
        return default_delta(num_clients) if chosen is None else chosen

    def _next(self, num_clients: int) -> Release:
        """The next release: a run that goes on for more rounds keeps the noise it began with."""
        if before := self._log.releases():
            return replace(before[0], drawn=num_sampled(self.config, num_clients), of=num_clients)
        budget = plan_budget(self.config, num_clients)
        assert budget is not None
        return budget.release

    def _clip(self, state: ServerState) -> float:
        kept = state.tensors.get("privacy")
        return self.config.privacy.clip if kept is None else float(kept["clip"][0])


def mechanism_of(config: Config, directory: Path) -> Mechanism:
    """The mechanism that a configuration asks for.

    Args:
        directory: of what the server keeps beside its state; nothing is written before a release.
    """
    if config.privacy.unit == "client":
        return ClientMechanism(config, directory / "releases.jsonl")
    return Mechanism(config)
