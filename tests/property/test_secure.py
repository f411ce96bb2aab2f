"""Secure aggregation alone: sums bit for bit, what a server sees, what sites refuse."""

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as limited
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components
from scipy.stats import hypergeom

from fedllm_flwr.errors import FederationError, NotFiniteError
from fedllm_flwr.federation import masked_round
from fedllm_flwr.federation.masked_round import as_words, code_of, noise_deviation
from fedllm_flwr.federation.messages import Update
from fedllm_flwr.federation.secure.fixed_point import FixedPoint, signed
from fedllm_flwr.federation.secure.graph import Session, degree_and_threshold
from fedllm_flwr.federation.secure.keys import (
    KeyCard,
    make_card,
    new_identity,
    new_run_key,
    sign,
)
from fedllm_flwr.federation.secure.masks import Words, add_mask, words_of
from fedllm_flwr.federation.secure.server import MaskedSum
from fedllm_flwr.federation.secure.shares import PRIME, join, split
from fedllm_flwr.federation.secure.site import SecureSite, Unmask
from fedllm_flwr.privacy.clipping import clipped

RUN, SIZE = "7", 300
RNG = np.random.default_rng(0)


class Federation:
    """Sites and the session of a round of theirs, with a vector for each."""

    def __init__(self, folder: Path, count: int, ring: int = 32) -> None:
        self.names = [f"site-{i:03}" for i in range(count)]
        self.sites = {
            name: SecureSite(folder / name, folder / name / RUN, RUN, name) for name in self.names
        }
        cards = {name: site.card() for name, site in self.sites.items()}
        self.session = Session("run/1/a", cards, "examples", 100.0, 1 / 3, 4.0, ring=ring)
        self.vectors: dict[str, Words] = {
            n: RNG.integers(0, 2**ring, SIZE, words_of(ring)) for n in self.names
        }

    def masked(self, name: str) -> tuple[Words, dict[str, bytes]]:
        words = self.vectors[name].copy()
        return words, self.sites[name].mask(self.session, words)

    def added(self, sending: list[str]) -> MaskedSum:
        total = MaskedSum(self.session, SIZE)
        for name in reversed(sending):
            total.add(name, *self.masked(name))
        return total

    def questions(self, total: MaskedSum, away: Collection[str] = ()) -> dict[str, Unmask]:
        """The last requests, after those who are not `away` have signed the list of survivors."""
        for name, question in total.lists().items():
            if name not in away:
                total.take(name, self.sites[name].sign(question))
        return total.questions()

    def plain(self, names: list[str]) -> Words:
        dtype = words_of(self.session.ring)
        total: Words = np.sum([self.vectors[name] for name in names], axis=0, dtype=dtype)
        return total


@pytest.mark.parametrize(
    ("count", "before_sending", "before_signing", "before_unmasking"),
    [
        (2, 0, 0, 0), (3, 0, 0, 0), (3, 1, 0, 0), (3, 0, 1, 0), (3, 0, 0, 1), (10, 0, 0, 0),
        (10, 1, 0, 0), (10, 0, 1, 0), (10, 0, 0, 1), (10, 3, 0, 0), (10, 0, 3, 0), (10, 0, 0, 3),
        (10, 1, 1, 1), (21, 3, 2, 2),
        pytest.param(60, 20, 0, 0, marks=pytest.mark.slow),
        pytest.param(60, 8, 6, 6, marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ring", [32, pytest.param(16, marks=pytest.mark.slow)])
def test_the_sum_is_that_of_the_survivors_bit_for_bit(
    ring: int,
    count: int,
    before_sending: int,
    before_signing: int,
    before_unmasking: int,
    tmp_path: Path,
) -> None:
    federation = Federation(tmp_path, count, ring)
    most = before_sending + before_signing + before_unmasking
    away = list(RNG.permutation(federation.names)[:most])
    sending = [name for name in federation.names if name not in away[:before_sending]]
    total = federation.added(sending)
    questions = federation.questions(total, away[: before_sending + before_signing])
    assert len(questions) == count - before_sending - before_signing
    for name, question in questions.items():
        if name not in away:
            total.take(name, federation.sites[name].unmask(question))
    np.testing.assert_array_equal(total.unmasked(), federation.plain(sending))


def test_a_site_that_masked_and_whose_vector_was_lost_is_no_survivor(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 4)
    federation.masked("site-002")
    total = federation.added(["site-000", "site-001", "site-003"])
    questions = federation.questions(total)
    for name, question in questions.items():
        total.take(name, federation.sites[name].unmask(question))
    with pytest.raises(FederationError, match="said to lack its vector"):
        federation.sites["site-002"].unmask(questions["site-000"])
    np.testing.assert_array_equal(
        total.unmasked(), federation.plain(["site-000", "site-001", "site-003"])
    )


@pytest.mark.parametrize("missing", [4, 7])
def test_one_answer_too_few_gives_nothing(missing: int, tmp_path: Path) -> None:
    federation = Federation(tmp_path, 10)
    total = federation.added(federation.names)
    for name, question in [*federation.questions(total).items()][missing:]:
        total.take(name, federation.sites[name].unmask(question))
    with pytest.raises(FederationError, match="7 are needed to take it off"):
        total.unmasked()


def test_too_few_vectors_are_not_unmasked(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 10)
    total = federation.added(federation.names[:6])
    with pytest.raises(FederationError, match=r"6 of 10 sites have sent .* needs 7"):
        total.lists()
    total = Federation(tmp_path / "other", 10).added(federation.names)
    with pytest.raises(FederationError, match=r"0 of 10 sites have signed .* needs 7"):
        total.questions()


def chi_square(words: Words) -> float:
    """Of the words' bytes against 256 equally likely values, in standard deviations."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    expected = words.nbytes / 256
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - 255) / math.sqrt(2 * 255)


def test_what_the_server_sees_of_one_vector_is_uniform(tmp_path: Path) -> None:
    """Also for the vector of zeros, and also after everything but its own mask is known."""
    federation = Federation(tmp_path, 3)
    size = 2**17
    seen = {}
    for name in federation.names:
        seen[name] = np.zeros(size, np.uint32)
        federation.sites[name].mask(federation.session, seen[name])
    assert chi_square(np.zeros(size, np.uint32)) > 1e4
    for words in seen.values():
        assert abs(chi_square(words)) < 5
    assert abs(chi_square(seen["site-000"] - seen["site-001"])) < 5
    assert abs(chi_square(sum(seen.values()))) < 5  # type: ignore[arg-type]  # own masks are left


@given(
    secret=st.binary(min_size=32, max_size=32),
    threshold=st.integers(1, 8),
    more=st.integers(0, 4),
    other=st.binary(min_size=32, max_size=32),
)
@limited(max_examples=40, deadline=None)
def test_shares_give_the_secret_and_one_less_gives_any(
    secret: bytes, threshold: int, more: int, other: bytes
) -> None:
    shares = split(secret, threshold, range(1, threshold + more + 1))
    chosen = dict(RNG.permutation(list(shares.items()))[: threshold + more])
    held = {int(point): shares[int(point)] for point in chosen}
    assert join(held, threshold) == secret
    few = {point: shares[point] for point in sorted(held)[: threshold - 1]}
    with pytest.raises(FederationError, match="are needed"):
        join(few, threshold)
    # Whatever the secret, one value of the missing share would be consistent with those held.
    points = [(0, int.from_bytes(other, "big"))]
    points += [(point, int.from_bytes(text, "big")) for point, text in few.items()]
    missing = 100
    value = 0
    for x, y in points:
        term = y
        for z, _ in points:
            if z != x:
                term = term * (missing - z) * pow(x - z, -1, PRIME) % PRIME
        value += term
    few[missing] = (value % PRIME).to_bytes(33, "big")
    assert join(few, threshold) == other


def test_masks_cancel_and_streams_do_not_repeat() -> None:
    words, one, other = (np.zeros(2**18 + 7, np.uint32) for _ in range(3))
    add_mask(one, bytes(32))
    add_mask(other, bytes(31) + b"\1")
    assert not np.array_equal(one, other)
    assert len(np.unique(one)) > 0.9 * one.size
    words += one
    add_mask(words, bytes(32), -1)
    assert not words.any()


Refusal = Callable[[Federation], None]


def ready(federation: Federation) -> Unmask:
    """The last request to site-000, of a server that follows the protocol."""
    return federation.questions(federation.added(federation.names))["site-000"]


def two_lists(federation: Federation) -> None:
    question, site = ready(federation), federation.sites["site-000"]
    site.unmask(question)
    site.unmask(question)  # the same one may be asked again
    site.sign(replace(question, survivors=tuple(federation.names[:-1])))


def two_lists_to_open(federation: Federation) -> None:
    question = replace(ready(federation), survivors=tuple(federation.names[:-1]))
    federation.sites["site-000"].unmask(question)


def nobody_has_signed(federation: Federation) -> None:
    federation.sites["site-000"].unmask(replace(ready(federation), signatures={}))


def the_server_has_signed(federation: Federation) -> None:
    question = ready(federation)
    text = federation.session.signed(question.survivors)
    forged = dict.fromkeys(federation.names[1:], sign(new_identity(), *text))
    own = {"site-000": question.signatures["site-000"]}
    federation.sites["site-000"].unmask(replace(question, signatures={**forged, **own}))


def signatures_of_an_earlier_round(federation: Federation) -> None:
    before = ready(federation).signatures
    federation.session = replace(federation.session, id="run/2/b")
    federation.sites["site-000"].unmask(replace(ready(federation), signatures=before))


def other_words_for_others(federation: Federation) -> None:
    """The server announces another bound to two of the three sites, under the same id."""
    own, told = federation.session, replace(federation.session, bound=1e9)
    federation.masked("site-000")
    federation.session = told
    names = tuple(federation.names)
    for name in names[1:]:
        federation.masked(name)
    question = Unmask(own.id, names)
    signed = {name: federation.sites[name].sign(question).signature for name in names}
    federation.sites["site-000"].unmask(replace(question, signatures=signed))


def replayed(federation: Federation) -> None:
    federation.masked("site-000")
    federation.masked("site-000")


def earlier_round(federation: Federation) -> None:
    question = ready(federation)
    later = replace(federation.session, id="run/2/b")
    federation.sites["site-000"].mask(later, federation.vectors["site-000"].copy())
    federation.sites["site-000"].unmask(question)


def with_card(federation: Federation, name: str, card: KeyCard) -> None:
    cards = {**federation.session.cards, name: card}
    federation.sites["site-000"].check(replace(federation.session, cards=cards))


def unsigned(federation: Federation) -> None:
    card = federation.session.cards["site-001"]
    with_card(federation, "site-001", replace(card, public=new_run_key().hex()))


def swapped(federation: Federation) -> None:
    with_card(federation, "site-001", federation.session.cards["site-002"])


def of_another_run(federation: Federation) -> None:
    card = make_card(new_identity(), new_run_key(), "8", "site-001")
    with_card(federation, "site-001", card)


def invented(federation: Federation) -> None:
    federation.sites["site-000"].check(federation.session)
    with_card(federation, "site-001", make_card(new_identity(), new_run_key(), RUN, "site-001"))


def one_for_two(federation: Federation) -> None:
    identity = new_identity()
    cards = {n: make_card(identity, new_run_key(), RUN, n) for n in ("site-001", "site-002")}
    cards = {"site-000": federation.session.cards["site-000"], **cards}
    federation.sites["site-000"].check(replace(federation.session, cards=cards))


def own_key(federation: Federation) -> None:
    with_card(federation, "site-000", federation.session.cards["site-001"])


def alone(federation: Federation) -> None:
    cards = {"site-000": federation.session.cards["site-000"]}
    federation.sites["site-000"].check(replace(federation.session, cards=cards))


def left_alone(federation: Federation) -> None:
    federation.added(federation.names)
    federation.sites["site-000"].sign(Unmask(federation.session.id, ("site-000",)))


def stranger(federation: Federation) -> None:
    federation.added(federation.names)
    question = Unmask(federation.session.id, (*federation.names, "site-zzz"))
    federation.sites["site-000"].sign(question)


def other_shares(federation: Federation) -> None:
    question = ready(federation)
    sealed = {**question.sealed, "site-001": question.sealed["site-002"]}
    federation.sites["site-000"].unmask(replace(question, sealed=sealed))


def never_masked(federation: Federation) -> None:
    question = Unmask(federation.session.id, tuple(federation.names))
    federation.sites["site-000"].sign(question)


@pytest.mark.parametrize(
    ("hostile", "said"),
    [
        (two_lists, "a second, different list of survivors"),
        (two_lists_to_open, "a second, different list of survivors"),
        (nobody_has_signed, "with 0 signatures of its sites; 2 are needed"),
        (the_server_has_signed, "with 1 signatures .* site-001, site-002 are not of this list"),
        (
            signatures_of_an_earlier_round,
            "with 0 signatures .* those of site-000, site-001 are not",
        ),
        (other_words_for_others, "with 1 signatures .* site-001, site-002 are not of this list"),
        (replayed, "a round that it has masked before"),
        (earlier_round, "a round that is not its last one"),
        (unsigned, "the key of site-001, which its own key has not signed"),
        (swapped, "the key of site-001, which its own key has not signed"),
        (of_another_run, "the key of site-001, which its own key has not signed"),
        (invented, "another key of site-001 than before"),
        (one_for_two, "one key under two names"),
        (own_key, "its own key is another"),
        (alone, "a round of one site"),
        (left_alone, "of which 1 sites are left; 2 are needed"),
        (stranger, "survivors that are not the round's sites"),
        (other_shares, "shares that site-001 has not sealed"),
        (never_masked, "a round that is not its last one"),
    ],
)
def test_a_site_refuses_a_hostile_server(hostile: Refusal, said: str, tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    with pytest.raises(FederationError, match=said) as caught:
        hostile(federation)
    assert caught.value.shareable == str(caught.value)


def test_two_lists_to_two_halves_of_the_sites_are_refused_by_both(tmp_path: Path) -> None:
    """Whatever signatures the server hands on: neither list has found four of six."""
    federation = Federation(tmp_path, 6)
    federation.added(federation.names)
    halves = federation.names[:3], federation.names[3:]
    lists = tuple(federation.names), tuple(federation.names[1:])
    id, signed = federation.session.id, dict[str, bytes]()
    for half, survivors in zip(halves, lists, strict=True):
        question = Unmask(id, survivors)
        signed |= {name: federation.sites[name].sign(question).signature for name in half}
    for half, survivors, others in zip(halves, lists, halves[::-1], strict=True):
        for name in half:
            with pytest.raises(FederationError) as caught:
                federation.sites[name].unmask(Unmask(id, survivors, signatures=signed))
            assert caught.value.shareable == (
                "secure aggregation: the site refuses a list of survivors with 3 signatures of its "
                f"sites; 4 are needed; those of {', '.join(others)} are not of this list"
            )


def test_nothing_is_opened_of_a_dropped_site_s_own_mask_or_of_two_survivors(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 6)
    total = federation.added(federation.names[:5])
    for name, question in federation.questions(total).items():
        opened = federation.sites[name].unmask(question)
        assert sorted(opened.shares) == federation.names[:5]
        assert {len(text) for text in opened.shares.values()} == {2 * 33}  # its own, and one pair


def test_a_server_takes_no_shares_that_were_not_asked_for(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 4)
    total = federation.added(federation.names)
    signed = federation.sites["site-001"].sign(total.lists()["site-001"])
    with pytest.raises(FederationError, match="has not signed the list"):
        total.take("site-000", signed)
    question = federation.questions(total)["site-000"]
    opened = federation.sites["site-000"].unmask(question)
    for wrong in (
        replace(opened, shares={"site-000": b"short"}),
        replace(opened, shares={"site-000": bytes(66)}),
        replace(opened, shares={"site-zzz": bytes(33)}),
    ):
        with pytest.raises(FederationError, match="not asked for"):
            total.take("site-000", wrong)


def test_neighbours_are_mutual_and_as_many_as_said(tmp_path: Path) -> None:
    card = Federation(tmp_path, 2).session.cards["site-000"]
    for count, degree, threshold in (
        *((2, 1, 2), (20, 19, 14), (21, 12, 5), (50, 28, 12), (100, 54, 24), (200, 108, 54)),
    ):
        cards = {f"site-{i:03}": card for i in range(count)}
        session = Session("x", cards, "uniform", 1.0, 1 / 3, 1.0)
        assert session.threshold == threshold
        for name in session.names:
            found = session.neighbours(name)
            assert len(found) == degree
            assert all(name in session.neighbours(other) for other in found)


@pytest.mark.parametrize("count", [21, 60, 200])
def test_the_graph_keeps_its_promises_with_a_third_away_and_a_fifth_colluding(count: int) -> None:
    """Two gaps in the ring split it most easily; how many are left of a neighbourhood, by scipy."""
    away, colluding = count // 3, count // 5
    degree, threshold = degree_and_threshold(count, away)
    assert threshold > colluding
    near = np.abs(np.arange(count)[:, None] - np.arange(count))
    joined = np.minimum(near, count - near) <= degree // 2
    gone = away + colluding

    def parts(one: int, between: int) -> int:
        """Of the ring without `one` sites, and without the others after some `between` them."""
        kept = np.ones(count, bool)
        kept[:one] = kept[one + between : gone + between] = False
        return int(connected_components(joined[np.ix_(kept, kept)])[0])

    for one in range(0, gone + 1, max(1, gone // 8)):
        assert {parts(one, between) for between in range(count - gone)} == {1}
    gone = degree
    assert parts(degree // 2, 1) == 2  # so many are enough
    left = hypergeom(count - 1, count - 1 - away, degree)
    assert count * left.cdf(threshold - 1) <= 2**-20 < count * left.cdf(threshold)


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=30),
    st.integers(2, 200),
    st.floats(0.01, 1),
)
@limited(max_examples=60, deadline=None)
def test_fixed_point_sums_stay_within_their_error_and_the_ring(
    values: list[float], sites: int, factor: float
) -> None:
    code = FixedPoint.finest(4.0, sites)
    params = {"w": np.array(values, np.float32)}
    total = np.zeros(len(values), np.uint32)
    for _ in range(sites):
        total += code.encode(params, factor)
    found = code.decode(total, params, sites)["w"]
    expected = sites * factor * params["w"].astype(np.float64)
    np.testing.assert_allclose(found, expected, atol=sites * code.resolution * 0.51, rtol=0)


@given(
    st.integers(2, 30),
    st.floats(0.1, 3),
    st.floats(1e-3, 100),
    st.booleans(),
    st.sampled_from([32, 16]),
)
@limited(max_examples=20, deadline=None)
def test_noise_of_the_sites_has_the_stated_variance(
    sites: int, multiplier: float, clip: float, most_drop_out: bool, ring: int
) -> None:
    """z^2 C^2 with as few survivors as there may be, one of which takes its own noise off."""
    card = KeyCard("", "", "")
    cards = {f"site-{i:02}": card for i in range(sites)}
    session = Session("x", cards, "uniform", 1.0, 1 / 3, clip, multiplier, ring)
    try:
        units = noise_deviation(session, 3000)
    except FederationError:
        assume(ring != 16)
        raise
    left = session.least if most_drop_out else sites
    delta = {"w": RNG.normal(size=3000).astype(np.float32)}
    delta = clipped({"delta": delta}, clip)["delta"]
    words = [as_words(Update(delta, 1, {}), session, 1) for _ in range(left)]
    total = np.sum(words, axis=0, dtype=words_of(ring))
    assert total[-1] == left
    code = code_of(session, 3000)
    found = code.decode(total[:-1], delta, left)["w"]
    noise = (found - left * delta["w"].astype(np.float64)) / (multiplier * clip)
    more = units * code.resolution / (clip * session.noise_share)  # by rounding
    assert 1 <= more < (2 if ring == 16 else 1.001)
    noise /= more
    assert noise.std() == pytest.approx(math.sqrt(left / (session.least - 1)), rel=0.08)
    assert abs(noise.mean()) < 5 * noise.std() / math.sqrt(noise.size)
    if most_drop_out:  # what the promise rests on
        assert noise.std() * math.sqrt((left - 1) / left) == pytest.approx(1, rel=0.08)


def test_random_rounding_keeps_the_mean_and_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm on which the noise of the ring of 16 bits rests holds for every vector."""
    monkeypatch.setattr(masked_round, "add_noise", lambda words, session: None)
    cards = {f"site-{i}": KeyCard("", "", "") for i in range(10)}
    session = Session("x", cards, "uniform", 1.0, 1 / 3, 1.0, 1.0, 16)
    size = 500_000
    code = code_of(session, size)
    longest = noise_deviation(session, size) / session.noise_share
    assert longest < 1.1 / code.resolution
    for spread in (1, size // 100, size):  # on so many values
        value = np.zeros(size, np.float32)
        value[:spread] = 1 / math.sqrt(spread)
        words = as_words(Update({"w": value}, 1, {}), session, 1)[:-1]
        assert np.linalg.norm(signed(words).astype(np.float64)) <= longest
        mean = signed(words)[:spread].mean() * code.resolution * math.sqrt(spread)
        assert mean == pytest.approx(1, abs=0.02)


def test_values_beyond_the_range_and_sums_that_cannot_be_are_refused() -> None:
    code = FixedPoint.finest(1.0, 10)
    for value, kind, said in (
        (1.5, FederationError, r"1.5, beyond privacy.secure_range=1"),
        (np.nan, NotFiniteError, "NaN or Inf"),
        (np.inf, NotFiniteError, "NaN or Inf"),
    ):
        with pytest.raises(kind, match=said):
            code.encode({"w": np.array([0.0, value])})
    words = np.array([2**31 - 5], np.uint32)
    with pytest.raises(FederationError, match="exceeds what they may send"):
        code.decode(words, {"w": np.zeros(1)}, 2)
