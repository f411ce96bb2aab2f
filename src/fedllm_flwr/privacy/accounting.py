"""What was spent: epsilon at delta, by the package dp-accounting and by no formula of our own.

A mechanism is described by its noise multiplier, the deviation of the Gaussian noise divided by the
clipping bound C, and by how its participants are drawn:

===========  ===========================  ===========  ====================  =====================
sampling     neighbours                   sensitivity  amplification         accountant
===========  ===========================  ===========  ====================  =====================
``poisson``  one more, or one less        C            Poisson               privacy loss
                                                                             distributions
``fixed``    one replaced by another      2 C          without replacement   Renyi (Wang, Balle
                                                       (m of n)              and Kasiviswanathan
                                                                             2019, theorem 27)
``visible``  one more, or one less        C            none                  privacy loss
                                                                             distributions
===========  ===========================  ===========  ====================  =====================

"One less" means that its contribution is zero while all else, the denominator included, stays.

A sum of discrete Gaussians (``discrete``), the shares of noise that several clients add, is
accounted for by the Renyi divergences of one Gaussian that has the sum of their variances. Those
of one discrete Gaussian are no larger (Canonne, Kamath and Steinke 2020). A sum of n of deviation s
adds tau d to them for d values, tau = 10 sum_{k < n} exp(-2 pi^2 s^2 k / (k + 1)) (Kairouz, Liu and
Steinke 2021, proposition 14): nothing at all from `LEAST_DEVIATION` on.
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
"""Largest noise multiplier that is tried for a target."""
LEAST_DEVIATION = 64.0
"""Of a client's share of discrete noise: tau is below 1e-17000."""
_INTERVAL = 1e-3  # of privacy losses, rounded up: 10 times as fast as 1e-4, less than 0.4 % more


@dataclass(frozen=True)
class Release:
    """One use of a mechanism on the same data.

    Args:
        noise_multiplier: deviation of the noise / clipping bound.
        sampling: how the participants are drawn.
        drawn: how many: exactly (fixed), or in the mean (poisson).
        of: from so many.
        discrete: the noise is a sum of several clients' discrete Gaussians.
    """

    noise_multiplier: float
    sampling: Sampling
    drawn: float
    of: int
    discrete: bool = False


def default_delta(count: int) -> float:
    """1 / n^1.1 with n = `count` units; below one half, so that there is a promise at all."""
    return float(min(0.5, count**-1.1))


def require_accountant(reason: str) -> None:
    """Refuse to go on without the package that accounts.

    Args:
        reason: key and value that need it.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("dp_accounting") is None:
        raise ConfigError(
            f"{reason} needs the package dp-accounting; pip install 'fedllm-flwr[privacy]'."
        )


def epsilon(releases: Mapping[Release, int], delta: float) -> float:
    """Epsilon at `delta` of all `releases` together, each so often; infinite without noise."""
    made = {release: count for release, count in releases.items() if count}
    if any(release.noise_multiplier == 0 for release in made):
        return math.inf
    return _epsilon(tuple(sorted(made.items(), key=repr)), delta) if made else 0.0


@cache
def calibrated(release: Release, count: int, target_epsilon: float, delta: float) -> float:
    """The smallest noise multiplier with which `count` such releases keep to a target.

    Args:
        release: whose noise multiplier is to be found.

    Raises:
        ConfigError: none up to `MOST_NOISE` does.
    """
    import dp_accounting

    def spent(multiplier: float) -> float:
        return epsilon({replace(release, noise_multiplier=multiplier): count}, delta)

    if spent(MOST_NOISE) > target_epsilon:
        raise ConfigError(
            f"privacy.target_epsilon={target_epsilon:g} at delta={delta:.2g} is out of reach in "
            f"{count} releases, whatever the noise: {MOST_NOISE:g} times the clip still spends "
            f"{spent(MOST_NOISE):.2g}; raise it, or take fewer rounds."
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
    """Releases of unlike accountants are summed up, each kind at a share of delta."""
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
