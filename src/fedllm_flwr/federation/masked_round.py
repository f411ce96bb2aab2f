"""A round under secure aggregation: from a client's update to words, and from their sum back.

A vector is the update times w_i / w_max, each group that the algorithm asks for, and the weight w_i
itself: words of the ring of integers modulo 2^32. w_max bounds the round's weights, so that the
fixed point is as fine as the round allows.
"""

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import Update
from fedllm_flwr.federation.secure.fixed_point import FixedPoint
from fedllm_flwr.federation.secure.graph import Session
from fedllm_flwr.federation.secure.masks import Words
from fedllm_flwr.federation.secure.server import MaskedSum
from fedllm_flwr.params import LARGEST_WEIGHT, Params, num_values


def code_of(session: Session) -> FixedPoint:
    """The fixed point of a round."""
    return FixedPoint(session.bound, len(session.cards))


def as_words(update: Update, session: Session, num_examples: int) -> Words:
    """A client's vector before it is masked.

    Args:
        num_examples: n_i, which the client has announced.

    Raises:
        FederationError: a weight above the round's, or a value beyond the range.
    """
    weights = {"examples": num_examples, "used": update.num_examples, "uniform": 1}
    weight = weights.get(session.weighting, 0)
    if not 1 <= weight <= session.largest_weight:
        text = f"secure aggregation: a weight of {weight}, outside 1..{session.largest_weight:g}"
        raise FederationError(text, text)
    code = code_of(session)
    parts = [code.encode(update.delta, weight / session.largest_weight)]
    parts += [code.encode(params) for _, params in sorted(update.contributed.items())]
    return np.concatenate([*parts, np.array([weight], np.uint32)])


class MaskedContributions:
    """What has come of a round, of which nothing can be read before the sum is unmasked.

    Args:
        shared: names and shapes of the update's tensors.
        groups: that clients send beside the update.
        like: names and shapes of their tensors.
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
            announced: numbers of examples by client.

        Raises:
            FederationError: it cannot be unmasked, or is what no honest clients can have sent.
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
    """Words of a vector: the update, the groups beside it, and the weight."""
    return num_values(shared) + len(groups) * num_values(like) + 1
