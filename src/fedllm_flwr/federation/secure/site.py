"""A site's part: masks its vector, signs who is left, and helps to unmask the survivors' sum.

A site must never mask two vectors with the same masks, or accept two lists of survivors for one
round. It therefore records each of these on disk before it answers. It opens shares only for a list
that so many sites have signed that no other list can find as many (the consistency check of
Bonawitz et al. 2017).
"""

import contextlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedllm_flwr.federation.secure.graph import Session, dropped
from fedllm_flwr.federation.secure.keys import (
    KeyCard,
    check_card,
    check_known,
    derive,
    has_signed,
    make_card,
    new_identity,
    new_run_key,
    pair_secret,
    refused,
    sign,
)
from fedllm_flwr.federation.secure.masks import Words, add_mask
from fedllm_flwr.federation.secure.shares import SEED_BYTES, SHARE_BYTES, split
from fedllm_flwr.files import write_atomically

_NONCE = bytes(12)  # each key encrypts one text


@dataclass(frozen=True)
class Unmask:
    """A request after masking: to sign the list of survivors, and then to open shares for it.

    Args:
        survivors: the sites whose vectors are in the sum.
        sealed: by survivor, its encrypted shares for the receiving site; none to sign.
        signatures: of the list, by survivor; none to sign.
        asked: name of the receiving site, which simulated clients need.
    """

    session: str
    survivors: tuple[str, ...]
    sealed: Mapping[str, bytes] = field(default_factory=dict)
    signatures: Mapping[str, bytes] = field(default_factory=dict)
    asked: str = ""


@dataclass(frozen=True)
class Signed:
    """A site's signature of a list of survivors."""

    signature: bytes


@dataclass(frozen=True)
class Opened:
    """Shares of the survivors' seeds, in a site's last answer of a round.

    Args:
        shares: by survivor, a share of the seed of its own mask, then one of each pair seed that it
            has with a neighbour that has dropped out, in name order.
    """

    shares: Mapping[str, bytes] = field(default_factory=dict)


class SecureSite:
    """A site in one run.

    Args:
        folder: the site's own, for all runs: its identity, if it has no other, and whom it knows.
        of_run: what is kept of this run.
        run: Flower's id of the run, the same at all its sites.
        identity: file of the site's registered key; None: one made in `folder`.
    """

    def __init__(
        self, folder: Path, of_run: Path, run: str, name: str, identity: Path | None = None
    ) -> None:
        self._folder, self._of_run, self._run, self._name = folder, of_run, run, name
        self._identity = identity or folder / "identity.key"

    def card(self) -> KeyCard:
        """The site's card for this run; its keys are created at the first call."""

        def make() -> bytes:
            card = make_card(self._own_key(), self._private(), self._run, self._name)
            return card.to_text().encode()

        return KeyCard.from_text(_secret(self._of_run / "card.json", make).decode())

    def check(self, session: Session) -> None:
        """Refuse an invalid round before any work is done for it.

        Raises:
            FederationError: a key that is swapped or not signed, too few sites, or a round that was
                masked before.
        """
        if session.cards.get(self._name) != self.card():
            raise refused("a round in which its own key is another")
        if len(session.cards) < 2:
            raise refused("a round of one site, whose sum would be its update")
        if not 0 <= session.dropouts < 0.5:
            raise refused(f"a round that may lose {session.dropouts:.0%} of its sites")
        for name, card in sorted(session.cards.items()):
            check_card(card, self._run, name)
        known = self._folder / "known-sites.json"
        before = _json(known)
        if (after := check_known(session.cards, before)) != before:
            write_atomically(known, json.dumps(after, indent=1).encode())
        if session.id in self._used():
            raise refused("a round that it has masked before")

    def mask(self, session: Session, words: Words) -> dict[str, bytes]:
        """Mask `words` in place; return the encrypted shares for each neighbour.

        These are a share of the seed of its own mask, and one of each pair seed that it has with a
        neighbour.

        Raises:
            FederationError: as `check`.
        """
        self.check(session)
        me, private = self._name, self._private()
        neighbours, holders = session.neighbours(me), session.holders(me)
        common = {name: pair_secret(private, session.cards[name]) for name in neighbours}
        seeds = {me: secrets.token_bytes(SEED_BYTES)}
        seeds |= {name: derive(common[name], "mask", session.digest) for name in neighbours}
        threshold = session.threshold
        shares = {of: split(seed, threshold, holders.values()) for of, seed in seeds.items()}
        bundles = {
            name: b"".join(shares[of][point] for of in (me, *neighbours))
            for name, point in holders.items()
        }
        self._of_run.mkdir(parents=True, exist_ok=True)
        self._write("used.json", [*self._used(), session.id])
        state = {"session": session.plain(), "own": bundles.pop(me).hex(), "list": None}
        self._write("round.json", state)
        for of, seed in seeds.items():
            direction: Literal[1, -1] = 1 if of >= me else -1
            add_mask(words, seed, direction)
        return {
            name: AESGCM(self._seal(common[name], session, me, name)).encrypt(_NONCE, text, None)
            for name, text in bundles.items()
        }

    def sign(self, question: Unmask) -> Signed:
        """This site's signature of the list of survivors, of which a round has one.

        Raises:
            FederationError: the round was not masked here, a list of survivors that is no such, is
                too short, or is another than before.
        """
        session = self._agree(question)
        return Signed(sign(self._own_key(), *session.signed(question.survivors)))

    def unmask(self, question: Unmask) -> Opened:
        """Shares of the survivors' own masks, and of their pair masks with dropped sites.

        Never both for one site: shares of a dropped site's own mask, or of pair masks between
        survivors, are not revealed.

        Raises:
            FederationError: as `sign`, or too few sites have signed the list.
        """
        session, survivors = self._agree(question), question.survivors
        signed = session.signed(survivors)
        others = [
            name
            for name, signature in sorted(question.signatures.items())
            if name not in survivors or not has_signed(session.cards[name], signature, *signed)
        ]
        if (count := len(question.signatures) - len(others)) < session.least:
            of_others = f"; those of {', '.join(others)} are not of this list" if others else ""
            raise refused(
                f"a list of survivors with {count} signatures of its sites; {session.least} are "
                f"needed{of_others}"
            )
        own = _json(self._of_run / "round.json")["own"]
        shares: dict[str, bytes] = {}
        for name in survivors:
            if (text := self._bundle(session, own, name, question)) is None:
                continue
            neighbours = session.neighbours(name)
            if len(text) != SHARE_BYTES * (1 + len(neighbours)):
                raise refused(f"shares of {name} that are too few or too many")
            found = [text[i : i + SHARE_BYTES] for i in range(0, len(text), SHARE_BYTES)]
            of = dict(zip(neighbours, found[1:], strict=True))
            lost = dropped(neighbours, survivors)
            shares[name] = b"".join([found[0], *(of[other] for other in lost)])
        return Opened(shares)

    def _agree(self, question: Unmask) -> Session:
        """The round's session, once its list of survivors is recorded as the only one.

        Raises:
            FederationError: as `sign`.
        """
        state = _json(self._of_run / "round.json")
        if not state or question.session != state["session"]["id"]:
            raise refused("to unmask a round that is not its last one")
        session, survivors = Session.from_plain(state["session"]), [*question.survivors]
        if survivors != sorted(set(survivors)) or not set(survivors) <= set(session.cards):
            raise refused("a list of survivors that are not the round's sites")
        if self._name not in survivors:
            raise refused("to unmask a round that is said to lack its vector")
        if len(survivors) < session.least:
            raise refused(
                f"a round of which {len(survivors)} sites are left; {session.least} are needed"
            )
        if state["list"] not in (None, survivors):
            raise refused("a second, different list of survivors of a round")
        if state["list"] is None:
            self._write("round.json", {**state, "list": survivors})
        return session

    def _bundle(self, session: Session, own: str, name: str, question: Unmask) -> bytes | None:
        """The shares of a survivor that this site holds; None if it holds none."""
        if name == self._name:
            return bytes.fromhex(own)
        if name not in session.neighbours(self._name) or name not in question.sealed:
            return None
        common = pair_secret(self._private(), session.cards[name])
        key = self._seal(common, session, name, self._name)
        try:
            return AESGCM(key).decrypt(_NONCE, question.sealed[name], None)
        except InvalidTag:
            raise refused(f"shares that {name} has not sealed for it") from None

    def _seal(self, common: bytes, session: Session, sender: str, receiver: str) -> bytes:
        return derive(common, "share", session.digest, sender, receiver)

    def _own_key(self) -> bytes:
        return _secret(self._identity, new_identity)

    def _private(self) -> bytes:
        return _secret(self._of_run / "key", new_run_key)

    def _used(self) -> list[str]:
        return list(_json(self._of_run / "used.json") or [])

    def _write(self, name: str, content: object) -> None:
        _write_secret(self._of_run / name, json.dumps(content).encode())


def _secret(file: Path, make: Any) -> bytes:
    """The content of a file that only this user can read; created at the first call."""
    with contextlib.suppress(FileNotFoundError):
        return file.read_bytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_secret(file, make())
    return file.read_bytes()


def _write_secret(file: Path, content: bytes) -> None:
    write_atomically(file, content)
    with contextlib.suppress(OSError):
        file.chmod(0o600)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
