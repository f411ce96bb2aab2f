"""A round under secure aggregation: encodes a client's update, and decodes the sum.

A client's vector consists of the update times w_i / w_max, the algorithm's further groups, and the
weight w_i itself, encoded as integers modulo 2^32 ("words"). w_max bounds the round's weights, so
that the fixed-point resolution is as fine as the round allows.

With ``privacy.unit=client`` all weights are 1, the vector of d values has an L2 norm of at most C =
``privacy.clip``, and each site adds its share of the noise before it masks (Kairouz, Liu and
Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
Aggregation", https://arxiv.org/abs/2102.06387, without its rotation: a ring of 32 bits has room).
In units of 2^-f the norm of the rounded vector is at most C 2^f + sqrt(d) / 2, and a share is a
discrete Gaussian whose standard deviation is z / sqrt(m - 1) times that bound, with z =
``privacy.noise_multiplier`` and m the minimum number of survivors for unmasking.

With ``privacy.secure_ring=16`` words are modulo 2^16, and f is so small that values below 2^-f
matter: they are rounded at random, again and again until the norm is within the bound of theorem 1
there. f is the largest for which the clipped values of all sites and `_TAIL_16` deviations of their
noise fit.
"""

import math
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from fedllm_flwr.config.schema import PrivacyConfig
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import Update
from fedllm_flwr.federation.secure.fixed_point import FixedPoint, Uniform, signed
from fedllm_flwr.federation.secure.graph import Session
from fedllm_flwr.federation.secure.keys import KeyCard
from fedllm_flwr.federation.secure.masks import Words
from fedllm_flwr.federation.secure.server import MaskedSum
from fedllm_flwr.params import LARGEST_WEIGHT, Groups, Params, num_values
from fedllm_flwr.privacy.accounting import LEAST_DEVIATION
from fedllm_flwr.privacy.clipping import clipped
from fedllm_flwr.privacy.noise import Noise

_TAIL = 12.0  # standard deviations of a noise share that fit into the ring of 32 bits
_TAIL_16 = 9.0  # of all noise, that of 16: 14 M values wrap around once in 3e11 rounds
_MOST_NOISE = 2.0  # times that of 32 bits, for which rounding to 16 may make up
_CHUNK = 2**20  # values at a time


def session_of(
    privacy: PrivacyConfig,
    id: str,
    cards: Mapping[str, KeyCard],
    weighting: str,
    largest_weight: float,
) -> Session:
    """A round's session, with the bounds of the run's settings."""
    by_client = privacy.unit == "client"
    return Session(
        id=id,
        cards=cards,
        weighting=weighting,
        largest_weight=largest_weight,
        dropouts=privacy.secure_dropouts,
        bound=privacy.clip if by_client else privacy.secure_range,
        noise_multiplier=(privacy.noise_multiplier or 0.0) if by_client else 0.0,
        ring=privacy.secure_ring,
    )


def code_of(session: Session, size: int) -> FixedPoint:
    """The fixed-point encoding of a round, with room for the noise.

    Args:
        size: d, the number of values of a vector.

    Raises:
        FederationError: a ring of 16 bits has no room for so many sites or values.
    """
    if session.ring == 32:
        bound = session.bound * (1 + _TAIL * session.noise_share)
        return FixedPoint.finest(bound, len(session.cards))
    sites = len(session.cards)
    deviations = _TAIL_16 * session.noise_share * math.sqrt(sites)
    places = math.floor(math.log2(2.0**15 / sites / session.bound))
    while True:
        length = session.bound * 2.0**places
        longest = _longest(length, size, session.ring)
        bound = session.bound * (1 + 1e-6)  # float32 rounds what is clipped to it
        code = FixedPoint(bound, places, session.ring, deviations * longest)
        if longest > _MOST_NOISE * length:
            text = (
                f"secure aggregation: privacy.secure_ring=16 has so little room for {sites} sites' "
                f"{size:,} values and their noise that rounding would more than double the noise; "
                "set privacy.secure_ring=32"
            )
            raise FederationError(text, text)
        if code.largest(sites) < 2.0**15:
            return code
        places -= 1


def _longest(length: float, size: int, ring: int) -> float:
    """Largest L2 norm of a vector of norm `length` after rounding, in units of the fixed point.

    For the ring of 16 bits, Kairouz, Liu and Steinke 2021, theorem 1 with beta = e^-1/2.
    """
    if ring == 32:
        return length + math.sqrt(size) / 2
    conditional = length**2 + size / 4 + length + math.sqrt(size) / 2
    return min(length + math.sqrt(size), math.sqrt(conditional))


def as_decoded(params: Params, session: Session) -> Params:
    """What the server's sum holds of a client's tensors: themselves, in expectation, or rounded."""
    if session.ring != 32:
        return params
    return code_of(session, num_values(params)).round_trip(params)


def noise_deviation(session: Session, size: int) -> float:
    """Standard deviation of a site's share of a round's noise, in units of the fixed point.

    Raises:
        FederationError: the fixed point is too coarse for so little noise, or as `code_of`.
    """
    length = session.bound / code_of(session, size).resolution
    deviation = session.noise_share * _longest(length, size, session.ring)
    if session.noise_multiplier and deviation < LEAST_DEVIATION:
        finer = ", or set privacy.secure_ring=32" if session.ring != 32 else ""
        text = (
            f"secure aggregation: a share of noise of {deviation:.3g} units of the fixed point, "
            f"below {LEAST_DEVIATION:g}; raise privacy.noise_multiplier="
            f"{session.noise_multiplier:g}{finer}"
        )
        raise FederationError(text, text)
    return deviation


def add_noise(words: Words, session: Session) -> None:
    """Add a site's share of a round's noise to its vector, in place.

    Raises:
        FederationError: as `noise_deviation`.
    """
    deviation, noise = noise_deviation(session, words.size), Noise()
    for start in range(0, words.size, _CHUNK):
        part = words[start : start + _CHUNK]
        part += noise.discrete_normal(part.size, deviation).astype(words.dtype)  # modulo the ring


def as_words(update: Update, session: Session, num_examples: int) -> Words:
    """A client's vector before it is masked, with its share of the noise.

    Args:
        num_examples: n_i, as announced by the client.

    Raises:
        FederationError: a weight above the round's, a value beyond the range, or too little noise.
    """
    weights = {"examples": num_examples, "used": update.num_examples, "uniform": 1}
    weight = weights.get(session.weighting, 0)
    if not 1 <= weight <= session.largest_weight:
        text = f"secure aggregation: a weight of {weight}, outside 1..{session.largest_weight:g}"
        raise FederationError(text, text)
    groups: Groups = {"delta": update.delta, **update.contributed}
    if session.noise_multiplier:
        groups = clipped(groups, session.bound)  # the client has done so; nothing rests on that
    order = ["delta", *sorted(update.contributed)]
    factors = {"delta": weight / session.largest_weight}
    size = sum(num_values(params) for params in groups.values())
    code = code_of(session, size)

    def rounded(uniform: Uniform | None) -> Words:
        parts = [code.encode(groups[name], factors.get(name, 1.0), uniform) for name in order]
        return np.concatenate(parts)

    if session.ring == 32:
        words = rounded(None)
    else:
        longest = _longest(session.bound / code.resolution, size, session.ring)
        words = rounded(Noise().uniform)
        while np.linalg.norm(signed(words).astype(np.float64)) > longest:
            words = rounded(Noise().uniform)
    if session.noise_multiplier:
        add_noise(words, session)
    return np.append(words, words.dtype.type(weight))


class MaskedContributions:
    """The masked vectors of a round; nothing can be read before their sum is unmasked.

    Args:
        shared: names and shapes of the update's tensors.
        groups: names of the further groups that clients send.
        like: names and shapes of the tensors in these groups.
    """

    def __init__(
        self, session: Session, shared: Params, groups: Iterable[str], like: Params
    ) -> None:
        self._likes = {"delta": shared, **dict.fromkeys(sorted(groups), like)}
        size = num_words(shared, self._likes.keys() - {"delta"}, like)
        self.sum = MaskedSum(session, size)

    def combined(
        self, num_clients: int, announced: Mapping[str, int]
    ) -> tuple[dict[str, Params], float]:
        """``delta``, the weighted mean, other groups' sums divided by N, and the total weight.

        Args:
            announced: announced numbers of examples by client.

        Raises:
            FederationError: the sum cannot be unmasked, or honest clients cannot have sent it.
        """
        words, session = self.sum.unmasked(), self.sum.session
        survivors, total = self.sum.survivors, int(words[-1])
        most = sum(announced[name] for name in survivors)
        most = len(survivors) if session.weighting == "uniform" else most
        if not len(survivors) <= total <= min(most, LARGEST_WEIGHT):
            raise FederationError(
                f"a total weight of {total} for {len(survivors)} clients, outside "
                f"{len(survivors)}..{most}"
            )
        code, found, start = code_of(session, words.size - 1), {}, 0
        for group, like in self._likes.items():
            stop = start + num_values(like)
            scale = session.largest_weight / total if group == "delta" else 1 / num_clients
            decoded = code.decode(words[start:stop], like, len(survivors))
            found[group], start = {name: value * scale for name, value in decoded.items()}, stop
        return found, float(total)


def num_words(shared: Params, groups: Collection[str], like: Params) -> int:
    """Number of words of a vector: the update, the further groups, and the weight."""
    return num_values(shared) + len(groups) * num_values(like) + 1
