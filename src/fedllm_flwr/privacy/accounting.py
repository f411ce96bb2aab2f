"""Privacy accounting: epsilon at delta, computed by the package dp-accounting.

A mechanism is described by its noise multiplier, the standard deviation of the Gaussian noise
divided by the clipping bound C, and by how its participants are sampled:

===========  ===========================  ===========  ====================  =====================
sampling     adjacency                    sensitivity  amplification         accountant
===========  ===========================  ===========  ====================  =====================
``poisson``  add or remove one            C            Poisson               privacy loss
                                                                             distributions
``fixed``    replace one                  2 C          without replacement   Renyi (Wang, Balle
                                                       (m of n)              and Kasiviswanathan
                                                                             2019, theorem 27)
``visible``  add or remove one            C            none                  privacy loss
                                                                             distributions
===========  ===========================  ===========  ====================  =====================

Removing a participant sets its contribution to zero and changes nothing else, in particular not the
denominator.

A sum of discrete Gaussians (``discrete``), which are the shares of noise added by several clients,
is accounted for by the Renyi divergences of one Gaussian with the sum of their variances. Those of
a single discrete Gaussian are no larger (Canonne, Kamath and Steinke 2020). For d values, a sum of
n discrete Gaussians with standard deviation s adds tau d, where
tau = 10 sum_{k < n} exp(-2 pi^2 s^2 k / (k + 1)) (Kairouz, Liu and Steinke 2021, proposition 14);
it is negligible from `LEAST_DEVIATION` on.
"""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from fedllm_flwr.errors import ConfigError

Sampling = Literal["fixed", "poisson", "visible"]
MOST_NOISE = 2.0**15
"""Largest noise multiplier that calibration tries."""
LEAST_DEVIATION = 64.0
"""Minimum deviation of a client's share of discrete noise; tau is then below 1e-17000."""
_INTERVAL = 1e-3  # of privacy losses, rounded up: 10 times faster than 1e-4, epsilon < 0.4 % larger


@dataclass(frozen=True)
class Release:
    """One use of a mechanism.

    Args:
        noise_multiplier: standard deviation of the noise / clipping bound.
        sampling: how the participants are sampled.
        drawn: number of participants: exact (fixed) or expected (poisson).
        of: population size.
        discrete: the noise is a sum of several clients' discrete Gaussians.
    """

    noise_multiplier: float
    sampling: Sampling
    drawn: float
    of: int
    discrete: bool = False


def default_delta(count: int) -> float:
    """1 / n^1.1 with n = `count` units; below one half, so that the guarantee is not void."""
    return float(min(0.5, count**-1.1))


def require_accountant(reason: str) -> None:
    """Check that dp-accounting is installed.

    Args:
        reason: key and value of the configuration that need it.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("dp_accounting") is None:
        raise ConfigError(
            f"{reason} needs the package dp-accounting; pip install 'fedllm-flwr[privacy]'."
        )


def epsilon(releases: Mapping[Release, int], delta: float) -> float:
    """Epsilon at `delta` of the composition of all releases, by count; infinite if noiseless."""
    made = {release: count for release, count in releases.items() if count}
    if any(release.noise_multiplier == 0 for release in made):
        return math.inf
    return _epsilon(tuple(sorted(made.items(), key=repr)), delta) if made else 0.0


@cache
def calibrated(release: Release, count: int, target_epsilon: float, delta: float) -> float:
    """The smallest noise multiplier for which `count` releases stay within a target epsilon.

    Args:
        release: the release, whose own noise multiplier is ignored.

    Raises:
        ConfigError: no multiplier up to `MOST_NOISE` suffices.
    """
    import dp_accounting

    def spent(multiplier: float) -> float:
        return epsilon({replace(release, noise_multiplier=multiplier): count}, delta)

    if spent(MOST_NOISE) > target_epsilon:
        raise ConfigError(
            f"privacy.target_epsilon={target_epsilon:g} at delta={delta:.2g} is out of reach in "
            f"{count} releases: even with noise of {MOST_NOISE:g} times the clip, epsilon is "
            f"{spent(MOST_NOISE):.2g}; raise the target, or use fewer rounds."
        )
    low = high = 1.0
    while spent(high) > target_epsilon:
        high *= 2
    while low > 2.0**-10 and spent(low) <= target_epsilon:
        low /= 2
    if spent(low) <= target_epsilon:
        return low
    found = dp_accounting.calibrate_dp_mechanism(
        lambda: _accountant(release.sampling, release.discrete),
        lambda multiplier: dp_accounting.SelfComposedDpEvent(
            _event(replace(release, noise_multiplier=multiplier)), count
        ),
        target_epsilon,
        delta,
        dp_accounting.ExplicitBracketInterval(low, high),
        tol=1e-3 * low,
    )
    return float(found)


@cache
def _epsilon(counted: tuple[tuple[Release, int], ...], delta: float) -> float:
    """Basic composition over accountants, each with an equal share of delta."""
    accountants: dict[tuple[bool, bool], Any] = {}
    for release, count in counted:
        kind = release.sampling == "fixed", release.discrete
        if kind not in accountants:
            accountants[kind] = _accountant(release.sampling, release.discrete)
        accountants[kind].compose(_event(release), count)
    share = delta / len(accountants)
    return math.fsum(float(each.get_epsilon(share)) for each in accountants.values())


def _accountant(sampling: Sampling, discrete: bool) -> Any:
    from dp_accounting import NeighboringRelation, pld, rdp

    if sampling == "fixed":
        return rdp.RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    if discrete:
        return rdp.RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    return pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, _INTERVAL)


def _event(release: Release) -> Any:
    import dp_accounting

    noise = release.noise_multiplier
    if release.sampling == "fixed":
        halved = dp_accounting.GaussianDpEvent(noise / 2)
        return dp_accounting.SampledWithoutReplacementDpEvent(
            release.of, round(release.drawn), halved
        )
    gaussian = dp_accounting.GaussianDpEvent(noise)
    if release.sampling == "visible":
        return gaussian
    return dp_accounting.PoissonSampledDpEvent(min(1.0, release.drawn / release.of), gaussian)
