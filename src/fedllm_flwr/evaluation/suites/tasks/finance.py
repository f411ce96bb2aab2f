"""Sentiment and yes/no labels of financial texts: FinGPT's prompts, by likelihood or generation."""

import re
from collections.abc import Sequence
from typing import Any

LABELS = ("negative", "neutral", "positive")
YES_NO = ("yes", "no")
_ASKED = (
    "What is the sentiment of this {kind}? Please choose an answer from "
    "{{negative/neutral/positive}}."
)
# NWGI's degrees, mapped as in FinGPT's benchmark
_DEGREES = {
    "strong negative": "negative",
    "moderately negative": "negative",
    "mildly negative": "neutral",
    "neutral": "neutral",
    "mildly positive": "neutral",
    "moderately positive": "positive",
    "strong positive": "positive",
}
_WORD = re.compile(r"[a-z]+")


def flare_news(dataset: Any) -> Any:
    """FLARE rows (text, answer) of news; local rows already have this form."""
    return _rows(dataset, "news", "text", lambda row: row["answer"])


def flare_fiqa(dataset: Any) -> Any:
    """FLARE rows of FiQA-SA, whose texts are news or tweets; tweets contain a $ stock symbol."""
    return _rows(dataset, None, "text", lambda row: row["answer"])


def tfns(dataset: Any) -> Any:
    """Twitter Financial News Sentiment: 0 bearish, 1 bullish, 2 neutral."""
    names = ("negative", "positive", "neutral")
    return _rows(dataset, "tweet", "text", lambda row: names[int(row["label"])])


def nwgi(dataset: Any) -> Any:
    """News With GPT Instructions, with seven degrees mapped to three, also in local rows.

    The question of a local row for one of seven degrees is replaced by one for three.
    """
    if "instruction" not in dataset.column_names:
        return _rows(dataset, "news", "news", lambda row: _DEGREES[row["label"]])

    def folded(row: dict[str, Any]) -> dict[str, str]:
        asked, answer = row["instruction"], row["answer"]
        if "moderately" in asked.lower():
            asked = _ASKED.format(kind="news")
        return {"instruction": asked, "answer": _DEGREES.get(answer, answer)}

    return dataset.map(folded)


def _rows(dataset: Any, kind: str | None, text: str, answer: Any) -> Any:
    if "instruction" in dataset.column_names:
        return dataset

    def shaped(row: dict[str, Any]) -> dict[str, str]:
        about = kind or ("tweet" if "$" in row[text] else "news")
        asked = _ASKED.format(kind=about)
        return {"instruction": asked, "input": row[text], "answer": answer(row).strip().lower()}

    return dataset.map(shaped, remove_columns=dataset.column_names)


def by_likelihood(row: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """The target and the most likely label."""
    return {"prediction": [row["answer"], _most_likely(LABELS, results)]}


def by_generation(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The target and the label in the answer; an answer with no or several labels is unparsable."""
    label = parse_label(results[0])
    return {"prediction": [row["answer"], label], "unparsable": float(label is None)}


def headline_by_likelihood(
    row: dict[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, Any]:
    """The target and the more likely of yes and no; see `_by_question`."""
    return _by_question(row, _most_likely(YES_NO, results))


def headline_by_generation(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The target and the answer's yes or no; an answer with neither or both is unparsable."""
    label = parse_label(results[0], YES_NO)
    return {**_by_question(row, label), "unparsable": float(label is None)}


def parse_label(answer: str, labels: Sequence[str] = LABELS) -> str | None:
    """The only label among the words of an answer's first line, or None."""
    words = _WORD.findall(answer.strip().partition("\n")[0].lower())
    named = {word for word in words if word in labels}
    return named.pop() if len(named) == 1 else None


def _most_likely(labels: Sequence[str], results: Sequence[tuple[float, bool]]) -> str:
    return labels[max(range(len(labels)), key=lambda i: results[i][0])]


def _by_question(row: dict[str, Any], label: str | None) -> dict[str, Any]:
    """Classes for the F1 of each question's "yes", as in FinGPT's benchmarks/headline.py.

    The class of "yes" is the question; "no" and unparsable answers have no class.
    """
    pair = [row["output"].strip().lower(), label]
    said_yes = [row["instruction"] if answer == "yes" else None for answer in pair]
    return {"prediction": pair, "question": said_yes}
