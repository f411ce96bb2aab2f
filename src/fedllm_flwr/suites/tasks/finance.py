"""Sentiment of financial texts: FinGPT's prompts, labels by likelihood and by generation."""

import re
from collections.abc import Sequence
from typing import Any

LABELS = ("negative", "neutral", "positive")
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
    """News With GPT Instructions: seven degrees folded into three."""
    return _rows(dataset, "news", "news", lambda row: _DEGREES[row["label"]])


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
    best = max(range(len(LABELS)), key=lambda i: results[i][0])
    return {"prediction": [row["answer"], LABELS[best]]}


def by_generation(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The label that the answer names; an answer that names none, or several, is unparsable."""
    label = parse_label(results[0])
    return {"prediction": [row["answer"], label], "unparsable": float(label is None)}


def parse_label(answer: str) -> str | None:
    """The one label among the words of an answer's first line."""
    lines = answer.strip().splitlines()
    words = _WORD.findall(lines[0].lower()) if lines else []
    named = {word for word in words if word in LABELS}
    return named.pop() if len(named) == 1 else None
