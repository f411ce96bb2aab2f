"""Financial headlines with a known sentiment."""

from dataclasses import dataclass
from random import Random

from scripts.build_demo.vocabulary import MOVEMENTS, SPLITS, Desk, Vocabulary

FIGURE_SHARE = 0.6  # of the headlines; the others report an event
COMMON_SHARE = 0.25  # of the events; the others are the desk's own


@dataclass(frozen=True)
class Headline:
    """One headline and what it says. An event has neither figure nor direction."""

    text: str
    label: str
    desk: str
    company: str
    figure: str | None = None
    direction: str | None = None


class Writer:
    """Writes headlines of one split; the random generator is the only state."""

    def __init__(
        self, vocabulary: Vocabulary, split: str, names: list[str], rng: Random, good_share: float
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split}; use one of: {', '.join(SPLITS)}")
        self._words = vocabulary
        self._split = split
        self._names = names
        self._rng = rng
        self._good_share = good_share  # of the figures; for the others less is better

    def write(self, desk: Desk, label: str) -> Headline:
        """A headline of a desk that is good, bad or no news for the company."""
        if self._rng.random() < FIGURE_SHARE:
            return self._figure(desk, label)
        return self._event(desk, label)

    def _figure(self, desk: Desk, label: str) -> Headline:
        rng = self._rng
        good = rng.random() < self._good_share
        figure = rng.choice(desk.good if good else desk.bad)
        direction = direction_of(label, good)
        movement = self._words.movements[direction][self._split]
        company, verb = self._company(desk), rng.choice(movement.verbs)
        text = rng.choice(self._words.figure_templates[self._split]).format(
            c=company,
            m=figure,
            v=conjugate(verb, is_plural(figure)),
            v0=verb,
            a=rng.choice(movement.adjectives),
            n=rng.choice(movement.nouns),
            p=rng.choice(self._words.periods),
            q=self._quantity(direction),
        )
        return Headline(capitalise(text), label, desk.name, company, figure, direction)

    def _event(self, desk: Desk, label: str) -> Headline:
        rng = self._rng
        common = rng.random() < COMMON_SHARE
        events = self._words.common_events if common else desk.events
        company = self._company(desk)
        text = rng.choice(self._words.event_templates[self._split]).format(
            c=company,
            e=rng.choice(events[self._split][label]),
            p=rng.choice(self._words.periods),
            place=rng.choice(self._words.places),
        )
        return Headline(capitalise(text), label, desk.name, company)

    def _company(self, desk: Desk) -> str:
        return f"{self._rng.choice(self._names)} {self._rng.choice(desk.suffixes)}"

    def _quantity(self, direction: str) -> str:
        amount = self._rng.randrange(2, 60)
        if direction == "flat":
            return f"at {amount} million"
        return self._rng.choice([f"by {amount} percent", f"to {amount} million"])


def direction_of(label: str, good: bool) -> str:
    """How a figure that should be high (``good``) or low moves in news with this label."""
    up, down, flat = MOVEMENTS
    if label == "neutral":
        return flat
    return up if (label == "positive") == good else down


def is_plural(figure: str) -> bool:
    """Whether a figure takes a plural verb ("sales", but not "business")."""
    return figure.endswith("s") and not figure.endswith("ss")


def conjugate(verb: str, plural: bool) -> str:
    """Third person present of a verb phrase, given in its base form."""
    if plural:
        return verb
    adverb, phrase = ("barely ", verb[7:]) if verb.startswith("barely ") else ("", verb)
    first, space, rest = phrase.partition(" ")
    ending = "es" if first.endswith(("o", "s", "sh", "ch")) else "s"
    return f"{adverb}{first}{ending}{space}{rest}"


def capitalise(text: str) -> str:
    """The text with its first letter in upper case, the others as they are."""
    return text[0].upper() + text[1:]
