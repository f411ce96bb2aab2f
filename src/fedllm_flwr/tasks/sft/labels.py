"""Checks that ``data.labels`` match the records' answers."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

from fedllm_flwr.config.names import shown
from fedllm_flwr.config.schema import DataConfig
from fedllm_flwr.data.sources import Records
from fedllm_flwr.errors import DataError

_QUOTED = 3  # answers in a message


def unseen_labels(data: DataConfig, *sources: Records) -> list[str]:
    """A line on the labels that are not the answer of any record, if there are any."""
    seen = {choice for source in sources for choice in source["choice"]}
    unseen = [label for i, label in enumerate(data.labels) if i not in seen]
    if not unseen:
        return []
    answers = _quoted(chain.from_iterable(sources))
    return [f"data.labels: no record has the answer {', '.join(unseen)} ({answers})"]


def require_scored(data: DataConfig, held_out: Records) -> None:
    """Require that at least one held-out record has one of the labels as its answer.

    Raises:
        DataError: names the labels and some of the answers.
    """
    if data.labels and all(choice < 0 for choice in held_out["choice"]):
        raise DataError(
            f"data.labels={shown(data.labels)}: no held-out record has one of them as its answer "
            f"({_quoted(held_out)}); give the answers that occur, or data.labels=[] for "
            "records without classes"
        )


def _quoted(records: Iterable[Any]) -> str:
    """The first distinct answers, each truncated to one short line."""
    first: dict[str, None] = {}
    for record in records:
        first[shown(record.messages[-1]["content"].strip()[:30])] = None
        if len(first) > _QUOTED:
            break
    more = ", ..." if len(first) > _QUOTED else ""
    return f"answers are: {', '.join(list(first)[:_QUOTED])}{more}"
