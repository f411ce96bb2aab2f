"""Answers to a set of questions, turn by turn, kept on disk as they are written."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedllm_flwr.data.records import Messages
from fedllm_flwr.evaluation.judging.questions import Question
from fedllm_flwr.evaluation.judging.records import Record, RecordFile
from fedllm_flwr.evaluation.judging.writing import Answer, Request, Writer
from fedllm_flwr.params import derive_seed

Progress = Callable[[int, int], None]  # done, of how many


@dataclass(frozen=True)
class Answered:
    """One question's answers, turn by turn."""

    question: Question
    answers: tuple[Answer, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """What the judge reads."""
        return tuple(answer.text for answer in self.answers)


def answer_all(
    questions: Sequence[Question],
    writer: Writer,
    path: Path,
    identity: object,
    seed: int,
    batch_size: int,
    progress: Progress = lambda done, total: None,
) -> list[Answered]:
    """Answers to all questions; those that the file at `path` holds are not written again.

    Batches are the same in each call, whatever was done before, so that answers of a run that
    stopped and went on are those of one that did not.

    Args:
        identity: of the model, its prompt and its limits: answers of another one are not used.
        seed: of sampled answers; each question and turn has its own sequence.
    """
    keys = {question.id: _key(question, identity, seed) for question in questions}
    with RecordFile(path) as file:
        done = {record["key"]: record for record in file.records}
        for batch in _batches(questions, batch_size):
            if any(keys[question.id] not in done for question in batch):
                written = _write(batch, writer, seed)
                fresh = [
                    _record(keys[answered.question.id], answered)
                    for answered in written
                    if keys[answered.question.id] not in done
                ]
                file.append(fresh)
                done |= {record["key"]: record for record in fresh}
            progress(sum(key in done for key in keys.values()), len(keys))
    return [
        Answered(question, tuple(Answer(**answer) for answer in done[keys[question.id]]["answers"]))
        for question in questions
    ]


def _batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Questions of like length together."""
    order = np.argsort([-len(question.turns[0]) for question in questions], kind="stable")
    ordered = [questions[i] for i in order.tolist()]
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _write(batch: Sequence[Question], writer: Writer, seed: int) -> list[Answered]:
    """All turns of a batch; a question of fewer turns leaves it earlier."""
    answers: dict[str, list[Answer]] = {question.id: [] for question in batch}
    for turn in range(max(len(question.turns) for question in batch)):
        asked = [question for question in batch if turn < len(question.turns)]
        requests = [
            Request(
                _conversation(question, answers[question.id]),
                question.temperature,
                derive_seed(seed, "answer", question.id, turn),
            )
            for question in asked
        ]
        for question, answer in zip(asked, writer.write(requests), strict=True):
            answers[question.id].append(answer)
    return [Answered(question, tuple(answers[question.id])) for question in batch]


def _conversation(question: Question, answers: Sequence[Answer]) -> Messages:
    """The turns so far with their answers, and the next turn."""
    messages: Messages = []
    for turn, answer in zip(question.turns, answers, strict=False):
        messages.append({"role": "user", "content": turn})
        messages.append({"role": "assistant", "content": answer.text})
    return [*messages, {"role": "user", "content": question.turns[len(answers)]}]


def _key(question: Question, identity: object, seed: int) -> str:
    what: list[Any] = [question.id, question.turns, question.temperature, identity, seed]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:20]


def _record(key: str, answered: Answered) -> Record:
    question = answered.question
    return {
        "key": key,
        "id": question.id,
        "category": question.category,
        "turns": question.turns,
        "answers": [asdict(answer) for answer in answered.answers],
    }
