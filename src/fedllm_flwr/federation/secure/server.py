"""The server's part: sums masked vectors and unmasks the sum, never a single vector."""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.secure.graph import Session, dropped
from fedllm_flwr.federation.secure.keys import has_signed
from fedllm_flwr.federation.secure.masks import Words, add_mask, words_of
from fedllm_flwr.federation.secure.shares import SHARE_BYTES, join
from fedllm_flwr.federation.secure.site import Opened, Signed, Unmask

_SEAL_BYTES = 16  # of AES-GCM's tag
Seeds = dict[tuple[str, str], dict[int, bytes]]  # shares by the site and the seed's other end


class MaskedSum:
    """The sum of one round's masked vectors; uses the memory of one vector, for any number.

    Args:
        size: words of a vector.
    """

    def __init__(self, session: Session, size: int) -> None:
        self.session = session
        self._sum: Words = np.zeros(size, words_of(session.ring))
        self._sealed: dict[str, Mapping[str, bytes]] = {}
        self._signatures: dict[str, bytes] = {}
        self._shares: Seeds = defaultdict(dict)

    @property
    def survivors(self) -> tuple[str, ...]:
        """The sites whose vectors have arrived."""
        return tuple(sorted(self._sealed))

    def add(self, name: str, words: Words, sealed: Mapping[str, bytes]) -> None:
        """Add a site's vector, and keep the encrypted shares for its neighbours.

        Raises:
            FederationError: the size is wrong, or shares are for sites other than its neighbours.
        """
        neighbours = self.session.neighbours(name)
        size = SHARE_BYTES * (1 + len(neighbours)) + _SEAL_BYTES
        if words.shape != self._sum.shape or words.dtype != self._sum.dtype:
            kinds = [f"{each.dtype} {each.shape}" for each in (words, self._sum)]
            raise FederationError(f"a masked vector of {kinds[0]}, not {kinds[1]}")
        if sorted(sealed) != neighbours or any(len(text) != size for text in sealed.values()):
            raise FederationError("its sealed shares are not those for its neighbours")
        self._sum += words
        self._sealed[name] = sealed

    def lists(self) -> dict[str, Unmask]:
        """The list of survivors, for each of them to sign.

        Raises:
            FederationError: there are too few survivors.
        """
        survivors, least = self.survivors, self.session.least
        if len(survivors) < least:
            raise FederationError(
                f"{len(survivors)} of {len(self.session.cards)} sites have sent their vectors, and "
                f"secure aggregation needs {least} (privacy.secure_dropouts="
                f"{self.session.dropouts:g})"
            )
        return {name: Unmask(self.session.id, survivors, asked=name) for name in survivors}

    def questions(self) -> dict[str, Unmask]:
        """The unmasking request to each site that has signed the list.

        Raises:
            FederationError: too few have.
        """
        survivors, least = self.survivors, self.session.least
        if len(self._signatures) < least:
            raise FederationError(
                f"{len(self._signatures)} of {len(survivors)} sites have signed the list of "
                f"survivors, and secure aggregation needs {least} (privacy.secure_dropouts="
                f"{self.session.dropouts:g})"
            )
        enough = dict(sorted(self._signatures.items())[:least])
        return {
            name: Unmask(
                self.session.id,
                survivors,
                {
                    sender: self._sealed[sender][name]
                    for sender in survivors
                    if sender in self.session.neighbours(name)
                },
                enough,
                asked=name,
            )
            for name in sorted(self._signatures)
        }

    def take(self, name: str, answer: Signed | Opened) -> None:
        """Add a survivor's signature of the list, or its shares.

        Raises:
            FederationError: its key has not signed this list, or it does not hold such shares.
        """
        if isinstance(answer, Signed):
            signed = self.session.signed(self.survivors)
            if not has_signed(self.session.cards[name], answer.signature, *signed):
                raise FederationError("it has not signed the list of survivors")
            self._signatures[name] = answer.signature
            return
        for of, text in answer.shares.items():
            if of not in self.survivors or name not in self.session.holders(of):
                raise FederationError("it has sent shares that it was not asked for")
            seeds = [of, *dropped(self.session.neighbours(of), self.survivors)]
            if len(text) != SHARE_BYTES * len(seeds):
                raise FederationError("it has sent shares that it was not asked for")
        for of, text in answer.shares.items():
            point = self.session.holders(of)[name]
            seeds = [of, *dropped(self.session.neighbours(of), self.survivors)]
            for i, to in enumerate(seeds):
                self._shares[of, to][point] = text[i * SHARE_BYTES : (i + 1) * SHARE_BYTES]

    def unmasked(self) -> Words:
        """The sum of the survivors' vectors.

        Raises:
            FederationError: there are too few shares of a seed, or they are inconsistent.
        """
        for of in self.survivors:
            lost = dropped(self.session.neighbours(of), self.survivors)
            for to in (of, *lost):
                shares, needed = self._shares[of, to], self.session.threshold
                if len(shares) < needed:
                    raise FederationError(
                        f"{len(shares)} sites have answered for the mask of {of}, and {needed} are "
                        "needed to take it off the sum"
                    )
                add_mask(self._sum, join(shares, needed), -1 if to >= of else 1)
        return self._sum
