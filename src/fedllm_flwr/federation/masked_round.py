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
"""

import math
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from fedllm_flwr.config.schema import PrivacyConfig
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import Update
from fedllm_flwr.federation.secure.fixed_point import FixedPoint
from fedllm_flwr.federation.secure.graph import Session
from fedllm_flwr.federation.secure.keys import KeyCard
from fedllm_flwr.federation.secure.masks import Words
from fedllm_flwr.federation.secure.server import MaskedSum
from fedllm_flwr.params import LARGEST_WEIGHT, Groups, Params, num_values
from fedllm_flwr.privacy.accounting import LEAST_DEVIATION
from fedllm_flwr.privacy.clipping import clipped
from fedllm_flwr.privacy.noise import Noise

_TAIL = 12.0  # standard deviations of a noise share that fit into the ring
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
    )


def code_of(session: Session) -> FixedPoint:
    """The fixed-point encoding of a round, with room for the noise."""
    return FixedPoint(session.bound * (1 + _TAIL * session.noise_share), len(session.cards))


def add_noise(words: Words, session: Session) -> None:
    """Add a site's share of a round's noise to its vector, in place.

    Raises:
        FederationError: the fixed point is too coarse for so little noise.
    """
    longest = session.bound / code_of(session).resolution + math.sqrt(words.size) / 2
    deviation = session.noise_share * longest
    if deviation < LEAST_DEVIATION:
        text = (
            f"secure aggregation: a share of noise of {deviation:.3g} units of the fixed point, "
            f"below {LEAST_DEVIATION:g}; raise privacy.noise_multiplier="
            f"{session.noise_multiplier:g}"
        )
        raise FederationError(text, text)
    noise = Noise()
    for start in range(0, words.size, _CHUNK):
        part = words[start : start + _CHUNK]
        part += noise.discrete_normal(part.size, deviation).astype(np.uint32)  # modulo 2^32


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
    code = code_of(session)
    parts = [code.encode(groups["delta"], weight / session.largest_weight)]
    parts += [code.encode(groups[name]) for name in sorted(update.contributed)]
    words = np.concatenate(parts)
    if session.noise_multiplier:
        add_noise(words, session)
    return np.append(words, np.uint32(weight))


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
        code, found, start = code_of(session), {}, 0
        for group, like in self._likes.items():
            stop = start + num_values(like)
            scale = session.largest_weight / total if group == "delta" else 1 / num_clients
            decoded = code.decode(words[start:stop], like, len(survivors))
            found[group], start = {name: value * scale for name, value in decoded.items()}, stop
        return found, float(total)


def num_words(shared: Params, groups: Collection[str], like: Params) -> int:
    """Number of words of a vector: the update, the further groups, and the weight."""
    return num_values(shared) + len(groups) * num_values(like) + 1
