"""The masking graph, the thresholds and the session of a round."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from fedllm_flwr.federation.secure.keys import KeyCard

DEGREE = 40  # neighbours of a site; all other sites if there are fewer


@dataclass(frozen=True)
class Session:
    """One try of one round, as the server announces it to the sites.

    Args:
        id: differs for every try of every round of a run.
        cards: of the sites that the round asks, by name.
        weighting: ``examples``, ``used`` or ``uniform``.
        largest_weight: no site's weight is above it.
        dropouts: share of the sites that may drop out, below one half.
        bound: largest magnitude of a value; with noise, the L2 norm of a vector.
        noise_multiplier: deviation, in bounds, of the noise of `least` sites but one; 0: none.
    """

    id: str
    cards: Mapping[str, KeyCard]
    weighting: str
    largest_weight: float
    dropouts: float
    bound: float
    noise_multiplier: float = 0.0

    def plain(self) -> dict[str, Any]:
        """As data for JSON."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**values, "cards": {name: card.to_text() for name, card in self.cards.items()}}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "Session":
        """What `plain` made.

        Raises:
            FederationError: a card is none.
        """
        cards = {name: KeyCard.from_text(text) for name, text in values["cards"].items()}
        return cls(**{**values, "cards": cards})

    @cached_property
    def names(self) -> list[str]:
        """The sites of the round."""
        return sorted(self.cards)

    @property
    def least(self) -> int:
        """Survivors that a round needs, two at least: the sum of one site is its update."""
        return max(2, len(self.cards) - math.floor(self.dropouts * len(self.cards)))

    @property
    def noise_share(self) -> float:
        """Deviation, in bounds, of the noise that each site adds.

        The noise of `least` sites is enough without that of any one of them, which knows its own.
        """
        return self.noise_multiplier / math.sqrt(self.least - 1)

    @cached_property
    def _ring(self) -> list[str]:
        """The sites in a pseudorandom order that no site can influence."""

        def place(name: str) -> bytes:
            return hashlib.sha256(f"{self.id}\x1f{name}".encode()).digest()

        return sorted(self.cards, key=place)

    def neighbours(self, name: str) -> list[str]:
        """The sites with which a site shares pair masks, in name order; symmetric."""
        others = [other for other in self.names if other != name]
        if len(others) <= DEGREE:
            return others
        place, half = self._ring.index(name), DEGREE // 2
        steps = [step for step in range(-half, half + 1) if step]
        return sorted(self._ring[(place + step) % len(self._ring)] for step in steps)

    def holders(self, name: str) -> dict[str, int]:
        """The holders of shares of a site's seeds, including itself, with the shares' points."""
        return {holder: i for i, holder in enumerate(sorted([*self.neighbours(name), name]), 1)}

    def threshold(self, name: str) -> int:
        """Number of shares that reconstruct a seed of a site.

        If every site masks with every other, this is the minimum number of survivors. Otherwise it
        is more than half of the holders, because a neighbourhood can lose a larger fraction of its
        sites than the whole round.
        """
        held = len(self.neighbours(name)) + 1
        sparse = held < len(self.cards)
        return held // 2 + 1 if sparse else held - math.floor(self.dropouts * held)


def dropped(names: Iterable[str], survivors: Iterable[str]) -> list[str]:
    """Those of `names` that are not survivors."""
    return sorted(set(names) - set(survivors))
