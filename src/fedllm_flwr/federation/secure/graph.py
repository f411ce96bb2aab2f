"""The masking graph, the thresholds and the session of a round.

Up to `COMPLETE` sites mask with all others. More form a ring in which each masks with the k nearest
(a Harary graph, as in Bell et al. 2020, https://eprint.iacr.org/2020/704), and t shares of a seed
recover it. With D sites away and c sites colluding with the server,

- k > D + c: no choice of these sites splits the graph of the others, because a Harary graph stays
  connected without any k - 1 of its sites;
- t > c: the colluding sites cannot open a seed, even if all are neighbours of one site;
- t of a site's k neighbours are left but with probability `_FAILURE`, over all sites, if those away
  are random.

The first two hold for certain, whatever ring and list of survivors a server chooses. Bell et al.
ask for them with probability 1 - 2^-40 over a random ring, which takes k of the order of log n
instead of n; for 200 sites that is 86 instead of 108. The third is theirs, with their 2^-20.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

from fedllm_flwr.federation.secure.keys import KeyCard

COMPLETE = 20  # sites, up to which each masks with all others
_COLLUDING = 5  # one site in so many
_FAILURE = 2**20  # one round in so many may fail with the most dropouts


@cache
def degree_and_threshold(count: int, away: int) -> tuple[int, int]:
    """k and t of a round of `count` sites, of which `away` may drop out.

    t is the largest that the probability of failure allows.
    """
    if count <= COMPLETE:
        return count - 1, count - away
    colluding = count // _COLLUDING
    for degree in range(2 * ((away + colluding) // 2 + 1), count - 1, 2):
        # Of C(n - 1, k) neighbourhoods, those with m neighbours left (hypergeometric).
        left = [
            math.comb(count - 1 - away, m) * math.comb(away, degree - m) for m in range(degree + 1)
        ]
        bound = math.comb(count - 1, degree) // (count * _FAILURE)
        threshold = sum(total <= bound for total in accumulate(left))
        if threshold > colluding:
            return degree, threshold
    return count - 1, count - away


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
        ring: bits of a word.
    """

    id: str
    cards: Mapping[str, KeyCard]
    weighting: str
    largest_weight: float
    dropouts: float
    bound: float
    noise_multiplier: float = 0.0
    ring: int = 32

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
    def digest(self) -> str:
        """SHA-256 of all of it; seeds derive from it, so that sites told otherwise share none."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()

    def signed(self, survivors: Sequence[str]) -> tuple[str, ...]:
        """What a site signs: that these sites are the survivors of this very session."""
        return ("survivors", self.digest, *survivors)

    @cached_property
    def names(self) -> list[str]:
        """The sites of the round."""
        return sorted(self.cards)

    @property
    def least(self) -> int:
        """Survivors that a round needs, two at least: the sum of one site is its update."""
        return max(2, len(self.cards) - self._away)

    @cached_property
    def _away(self) -> int:
        """The most sites that may drop out."""
        return math.floor(self.dropouts * len(self.cards))

    @cached_property
    def _degree_and_threshold(self) -> tuple[int, int]:
        return degree_and_threshold(len(self.cards), self._away)

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
        return self._graph[name]

    @cached_property
    def _graph(self) -> dict[str, list[str]]:
        degree, _ = self._degree_and_threshold
        if degree >= len(self.names) - 1:
            return {name: [other for other in self.names if other != name] for name in self.names}
        ring, half = self._ring, degree // 2
        steps = [step for step in range(-half, half + 1) if step]
        return {
            name: sorted(ring[(place + step) % len(ring)] for step in steps)
            for place, name in enumerate(ring)
        }

    def holders(self, name: str) -> dict[str, int]:
        """The holders of shares of a site's seeds, including itself, with the shares' points."""
        return {holder: i for i, holder in enumerate(sorted([*self.neighbours(name), name]), 1)}

    @property
    def threshold(self) -> int:
        """Number of shares that recover a seed; the minimum number of survivors if all mask."""
        return self._degree_and_threshold[1]


def dropped(names: Iterable[str], survivors: Iterable[str]) -> list[str]:
    """Those of `names` that are not survivors."""
    return sorted(set(names) - set(survivors))
