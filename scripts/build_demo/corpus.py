"""The pretraining text: market reports, definitions, instructions of other kinds, prose.

The text says what markets make of a headline, in every phrasing, but never gives its sentiment as
a label, so that the pretrained model has the knowledge that the demo's task needs and not the task.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from fedllm_flwr.data.templates import TEXT_TEMPLATES
from scripts.build_demo.headlines import (
    Headline,
    Writer,
    capitalise,
    conjugate,
    direction_of,
    is_plural,
)
from scripts.build_demo.vocabulary import LABELS, MOVEMENTS, SPLITS, Vocabulary

ALPACA = TEXT_TEMPLATES["alpaca"]
VICUNA = TEXT_TEMPLATES["vicuna"]
GOOD_SHARE = 0.65  # of the figures; for the others less is better
VICUNA_SHARE = 0.05  # of the instructions


class Document(NamedTuple):
    """A text to learn, after a context that is only read."""

    context: str
    text: str


class Corpus:
    """An endless stream of documents."""

    def __init__(self, vocabulary: Vocabulary, seed: str) -> None:
        self._words = vocabulary
        self._rng = Random(seed)
        # The names of the test's companies stay unseen.
        names = vocabulary.names["train"]
        self._writers = [
            Writer(vocabulary, split, names, self._rng, GOOD_SHARE) for split in SPLITS
        ]
        self._text: dict[str, Any] = yaml.safe_load(
            Path(__file__).with_name("corpus.yaml").read_text(encoding="utf-8")
        )

    def documents(self) -> Iterator[Document]:
        """Paragraphs and exchanges, without special tokens."""
        kinds: dict[Callable[[], Document], int] = {
            self._report: 25,
            self._restatement: 6,
            self._feeling: 10,
            self._reaction_task: 30,
            self._direction_task: 6,
            self._other_task: 10,
            self._definition: 3,
            self._reply: 7,
            self._prose: 3,
        }
        while True:
            (kind,) = self._rng.choices(list(kinds), list(kinds.values()))
            yield kind()

    def _headline(self) -> Headline:
        rng = self._rng
        desk = rng.choice(list(self._words.desks.values()))
        return rng.choice(self._writers).write(desk, rng.choice(LABELS))

    def _reaction(self, label: str) -> str:
        return f"{capitalise(self._rng.choice(self._text['reactions'][label]))}."

    def _report(self) -> Document:
        headline = self._headline()
        return Document("", f"{headline.text}. {self._reaction(headline.label)}")

    def _feeling(self) -> Document:
        """How owners see a movement: "When loan losses climb, owners hate it."."""
        rng = self._rng
        desk, label = rng.choice(list(self._words.desks.values())), rng.choice(LABELS)
        good = rng.random() < 0.5
        movement = self._words.movements[direction_of(label, good)][rng.choice(SPLITS)]
        figure, verb = rng.choice(desk.good if good else desk.bad), rng.choice(movement.verbs)
        feeling = self._text["feelings"][label]
        if rng.random() < 0.3:
            return Document("", f"Owners {feeling} seeing {figure} {verb}.")
        event = f"{figure} {conjugate(verb, is_plural(figure))}"
        if rng.random() < 0.5:
            return self._exchange(f"How do owners feel when {event}?", f"{capitalise(feeling)}.")
        return Document("", f"When {event}, owners {feeling} it.")

    def _restatement(self) -> Document:
        headline = self._figure_headline()
        plain = self._text["plain"][headline.direction]
        return Document("", f"{headline.text}. In plain words, {headline.figure} {plain}.")

    def _figure_headline(self) -> Headline:
        while True:
            headline = self._headline()
            if headline.figure is not None:
                return headline

    def _reaction_task(self) -> Document:
        headline = self._headline()
        question = self._rng.choice(self._text["reaction_questions"])
        return self._exchange(f"{question} {headline.text}", self._reaction(headline.label))

    def _direction_task(self) -> Document:
        headline = self._figure_headline()
        question = self._rng.choice(self._text["direction_questions"])
        answer = self._text["direction_answers"][headline.direction]
        return self._exchange(f"{question} {headline.text}", answer)

    def _other_task(self) -> Document:
        headline = self._headline()
        task = self._rng.choice(list(self._text["tasks"]))
        answer = {
            "repeat": headline.text,
            "company": headline.company,
            "desk": headline.desk,
            "first_word": headline.text.partition(" ")[0],
        }[task]
        question = self._rng.choice(self._text["tasks"][task])
        return self._exchange(f"{question} {headline.text}", answer)

    def _definition(self) -> Document:
        """Two phrasings of one direction mean the same, of two directions the opposite."""
        rng = self._rng
        first, second = rng.choice(MOVEMENTS[:2]), rng.choice(MOVEMENTS[:2])
        phrases = [
            rng.choice(self._words.movements[direction][rng.choice(SPLITS)].verbs)
            for direction in (first, second)
        ]
        relation = "means the same as" if first == second else "is the opposite of"
        return Document("", f"To {phrases[0]} {relation} to {phrases[1]}.")

    def _reply(self) -> Document:
        rng = self._rng
        subject = rng.choice(self._text["subjects"])
        request = rng.choice(self._text["requests"]).format(t=subject)
        manner = rng.choice(list(self._text["replies"]))
        return self._exchange(request, rng.choice(self._text["replies"][manner]).format(t=subject))

    def _prose(self) -> Document:
        return Document("", " ".join(self._rng.sample(self._text["prose"], 3)))

    def _exchange(self, request: str, answer: str) -> Document:
        template = VICUNA if self._rng.random() < VICUNA_SHARE else ALPACA
        prompt = f"{template.preamble}{template.prompt(request, first=True)}"
        return Document(prompt, f" {answer}")
