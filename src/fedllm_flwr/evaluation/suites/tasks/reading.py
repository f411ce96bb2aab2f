"""Questions about texts and with lettered options: PubMedQA, DROP, CRASS, medical examinations."""

import random
from collections.abc import Sequence
from typing import Any

from fedllm_flwr.evaluation.suites.tasks.finance import parse_label
from fedllm_flwr.evaluation.suites.tasks.numbers import chosen_letter

_DECISIONS = ("yes", "no", "maybe")


def pubmedqa(dataset: Any) -> Any:
    """The hub's rows as {context, question, answer}; local rows already have this form."""
    if "answer" in dataset.column_names:
        return dataset

    def shaped(row: dict[str, Any]) -> dict[str, str]:
        data = row["data"]
        context = "\n".join(data["Context"])
        answer = data["Final Decision"].strip().lower()
        return {"context": context, "question": data["Question"], "answer": answer}

    return dataset.map(shaped, remove_columns=dataset.column_names)


def pubmedqa_results(row: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """The target and the most likely decision."""
    best = max(range(len(_DECISIONS)), key=lambda i: results[i][0])
    return {"prediction": [row["answer"], _DECISIONS[best]]}


def pubmedqa_answer(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The target and the decision that a generated answer names."""
    said = parse_label(results[0], _DECISIONS)
    return {"prediction": [row["answer"], said], "unparsable": float(said is None)}


def lettered(dataset: Any) -> Any:
    """Rows of MedQA, MedMCQA and CareQA as {question, options, gold}; gold counts from 0."""
    columns = dataset.column_names
    if "sent1" in columns:
        asked, right, first = "sent1", "label", 0
        options = [f"ending{i}" for i in range(4)]
    elif "opa" in columns:
        asked, right, first = "question", "cop", 0
        options = [f"op{letter}" for letter in "abcd"]
    else:
        asked, right, first = "question", "cop", 1
        options = [f"op{i}" for i in range(1, 5)]

    def shaped(row: dict[str, Any]) -> dict[str, Any]:
        choices = [row[name] for name in options]
        return {"question": row[asked], "options": choices, "gold": int(row[right]) - first}

    return dataset.map(shaped, remove_columns=columns)


def lettered_answer(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The target and the letter that the first line of a generated answer names."""
    letter = chosen_letter(results[0].strip().partition("\n")[0])
    return {"prediction": ["ABCD"[row["gold"]], letter], "unparsable": float(letter is None)}


def drop(dataset: Any) -> Any:
    """The hub's rows as {passage, question, answers}; each answer is a list of spans.

    Every annotator's answer is correct, as in the official protocol (Dua et al. 2019). The more
    common copy ucinlp/drop concatenates the spans of all annotators, so that two answers of one
    span cannot be distinguished from one answer of two.
    """
    if "answers" in dataset.column_names:
        return dataset
    from lm_eval.tasks.drop.utils import get_answers

    def shaped(row: dict[str, Any]) -> dict[str, Any]:
        answers = [list(spans) for spans in get_answers(row)]
        return {"passage": row["passage"], "question": row["question"], "answers": answers}

    return dataset.map(shaped, remove_columns=dataset.column_names)


def drop_results(row: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Exact match and bag-of-words F1, the maximum over all correct answers."""
    from lm_eval.tasks.drop.utils import get_metrics

    answers = [tuple(answer) for answer in row["answers"] if answer[0].strip()]
    scores = [get_metrics(results[0], answer) for answer in answers] or [(0.0, 0.0)]
    return {"em": max(float(em) for em, _ in scores), "f1": max(float(f1) for _, f1 in scores)}


def crass(dataset: Any) -> Any:
    """Rows as {premise, question, options, gold}, with options in a fixed random order."""
    if "gold" in dataset.column_names:
        return dataset

    def shaped(row: dict[str, Any], index: int) -> dict[str, Any]:
        wrong = [row["Answer1"], row["Answer2"], row.get("PossibleAnswer3")]
        options = [row["CorrectAnswer"], *(text for text in wrong if text and text.strip())]
        asked = f"{row['Premise']} {row['QCC']}"
        return {"question": asked, **shuffled_options(options, 0, index)}

    return dataset.map(shaped, with_indices=True, remove_columns=dataset.column_names)


def shuffled_options(options: Sequence[str], right: int, seed: int) -> dict[str, Any]:
    """Options in an order drawn from `seed`, and the index of the correct one: {options, gold}."""
    order = list(range(len(options)))
    random.Random(seed).shuffle(order)
    return {"options": [options[i] for i in order], "gold": order.index(right)}


def crass_question(row: dict[str, Any]) -> str:
    """The question with lettered options."""
    lines = [f"{letter}. {text}" for letter, text in zip("ABCD", row["options"], strict=False)]
    return "\n".join([f"Question: {row['question']}", *lines, "Answer:"])


def crass_letters(row: dict[str, Any]) -> list[str]:
    """The letters of the options."""
    return list("ABCD"[: len(row["options"])])
