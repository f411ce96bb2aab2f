"""Labels of financial texts, sentiment and yes or no: FinGPT's prompts, by likelihood and by
generation.
"""

import re
from collections.abc import Sequence
from typing import Any

LABELS = ("negative", "neutral", "positive")
YES_NO = ("yes", "no")
_ASKED = (
    "What is the sentiment of this {kind}? Please choose an answer from "
    "{{negative/neutral/positive}}."
)
# NWGI's five degrees, as FinGPT's benchmark folds them
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
    """FLARE rows (text, answer) of news; local rows are in shape already."""
    return _rows(dataset, "news", "text", lambda row: row["answer"])


def flare_fiqa(dataset: Any) -> Any:
    """FLARE rows of FiQA-SA, whose texts are news and tweets; a tweet names a stock by $."""
    return _rows(dataset, None, "text", lambda row: row["answer"])


def tfns(dataset: Any) -> Any:
    """Twitter Financial News Sentiment: 0 bearish, 1 bullish, 2 neutral."""
    names = ("negative", "positive", "neutral")
    return _rows(dataset, "tweet", "text", lambda row: names[int(row["label"])])


def nwgi(dataset: Any) -> Any:
    """News With GPT Instructions: seven degrees folded into three, in local rows too.

    A local row that asks for one of seven degrees is asked for one of three instead.
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
    """The most likely label, beside the right one."""
    return {"prediction": [row["answer"], _most_likely(LABELS, results)]}


def by_generation(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The label that the answer names; an answer that names none, or several, is unparsable."""
    label = parse_label(results[0])
    return {"prediction": [row["answer"], label], "unparsable": float(label is None)}


def headline_by_likelihood(
    row: dict[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, Any]:
    """The more likely of yes and no, beside the right one; see `_by_question`."""
    return _by_question(row, _most_likely(YES_NO, results))


def headline_by_generation(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Yes or no as the answer has it; one that has neither, or both, is unparsable."""
    label = parse_label(results[0], YES_NO)
    return {**_by_question(row, label), "unparsable": float(label is None)}


def parse_label(answer: str, labels: Sequence[str] = LABELS) -> str | None:
    """The one label among the words of an answer's first line."""
    words = _WORD.findall(answer.strip().partition("\n")[0].lower())
    named = {word for word in words if word in labels}
    return named.pop() if len(named) == 1 else None


def _most_likely(labels: Sequence[str], results: Sequence[tuple[float, bool]]) -> str:
    return labels[max(range(len(labels)), key=lambda i: results[i][0])]


def _by_question(row: dict[str, Any], label: str | None) -> dict[str, Any]:
    """Classes for the F1 of each question's yes, as in FinGPT's benchmarks/headline.py.

    The class is the question; who says no, or nothing that can be parsed, names none.
    """
    pair = [row["output"].strip().lower(), label]
    said_yes = [row["instruction"] if answer == "yes" else None for answer in pair]
    return {"prediction": pair, "question": said_yes}
