"""The pretraining text: market reports, definitions, instructions of other kinds, prose.

The text says what markets make of a headline, in every phrasing, but never gives its sentiment as
a label, so that the pretrained model has the knowledge that the demo's task needs and not the task.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import yaml  # type: ignore[import-untyped]

from fedllm_flwr.data.templates import TEXT_TEMPLATES
from scripts.build_demo.headlines import Headline, Writer, capitalise
from scripts.build_demo.vocabulary import LABELS, MOVEMENTS, SPLITS, Vocabulary

ALPACA = TEXT_TEMPLATES["alpaca"]
VICUNA = TEXT_TEMPLATES["vicuna"]
VICUNA_SHARE = 0.05  # of the instructions


class Corpus:
    """An endless stream of documents."""

    def __init__(self, vocabulary: Vocabulary, seed: str) -> None:
        self._words = vocabulary
        self._rng = Random(seed)
        # The names of the test's companies stay unseen.
        names = vocabulary.names["train"]
        self._writers = [Writer(vocabulary, split, names, self._rng) for split in SPLITS]
        self._text: dict[str, Any] = yaml.safe_load(
            Path(__file__).with_name("corpus.yaml").read_text(encoding="utf-8")
        )

    def documents(self) -> Iterator[str]:
        """Documents without special tokens, except EOS-free text of one paragraph or exchange."""
        kinds: dict[Callable[[], str], int] = {
            self._report: 35,
            self._restatement: 8,
            self._reaction_task: 22,
            self._direction_task: 8,
            self._other_task: 12,
            self._definition: 4,
            self._reply: 8,
            self._prose: 3,
        }
        while True:
            (kind,) = self._rng.choices(list(kinds), list(kinds.values()))
            yield kind()

    def _headline(self, label: str | None = None) -> Headline:
        rng = self._rng
        desk = rng.choice(list(self._words.desks.values()))
        return rng.choice(self._writers).write(desk, label or rng.choice(LABELS))

    def _reaction(self, label: str) -> str:
        return f"{capitalise(self._rng.choice(self._text['reactions'][label]))}."

    def _report(self) -> str:
        """One to three headlines with the same effect, each followed by it."""
        label = self._rng.choice(LABELS)
        return " ".join(
            f"{self._headline(label).text}. {self._reaction(label)}"
            for _ in range(self._rng.randrange(1, 4))
        )

    def _restatement(self) -> str:
        headline = self._figure_headline()
        plain = self._text["plain"][headline.direction]
        return f"{headline.text}. In plain words, {headline.figure} {plain}."

    def _figure_headline(self) -> Headline:
        while True:
            headline = self._headline()
            if headline.figure is not None:
                return headline

    def _reaction_task(self) -> str:
        headline = self._headline()
        question = self._rng.choice(self._text["reaction_questions"])
        return self._exchange(f"{question} {headline.text}", self._reaction(headline.label))

    def _direction_task(self) -> str:
        headline = self._figure_headline()
        question = self._rng.choice(self._text["direction_questions"])
        plain = self._text["plain"][headline.direction]
        return self._exchange(f"{question} {headline.text}", f"{headline.figure} {plain}.")

    def _other_task(self) -> str:
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

    def _definition(self) -> str:
        """Two phrasings of one direction mean the same, of two directions the opposite."""
        rng = self._rng
        first, second = rng.choice(MOVEMENTS[:2]), rng.choice(MOVEMENTS[:2])
        phrases = [
            rng.choice(self._words.movements[direction][rng.choice(SPLITS)].verbs)
            for direction in (first, second)
        ]
        relation = "means the same as" if first == second else "is the opposite of"
        return f"To {phrases[0]} {relation} to {phrases[1]}."

    def _reply(self) -> str:
        rng = self._rng
        subject = rng.choice(self._text["subjects"])
        request = rng.choice(self._text["requests"]).format(t=subject)
        manner = rng.choice(list(self._text["replies"]))
        return self._exchange(request, rng.choice(self._text["replies"][manner]).format(t=subject))

    def _prose(self) -> str:
        return " ".join(self._rng.sample(self._text["prose"], 3))

    def _exchange(self, request: str, answer: str) -> str:
        template = VICUNA if self._rng.random() < VICUNA_SHARE else ALPACA
        return f"{template.preamble}{template.prompt(request, first=True)} {answer}"
