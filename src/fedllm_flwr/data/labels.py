"""Whether ``data.labels`` are the answers that the records have."""

from typing import TYPE_CHECKING

from fedllm_flwr.config.names import shown
from fedllm_flwr.config.schema import DataConfig
from fedllm_flwr.errors import DataError

if TYPE_CHECKING:
    import datasets

_QUOTED = 3  # answers in a message


def unseen_labels(data: DataConfig, *sources: "datasets.Dataset") -> list[str]:
    """A line on the labels that are the answer of no record of any source, if there are such."""
    seen = {choice for source in sources for choice in source["choice"][:]}
    unseen = [label for i, label in enumerate(data.labels) if i not in seen]
    if not unseen:
        return []
    answers = [answer for source in sources for answer in _answers(source)]
    return [f"data.labels: no record has the answer {', '.join(unseen)} ({_quoted(answers)})"]


def require_scored(data: DataConfig, held_out: "datasets.Dataset") -> None:
    """Refuse labels by which not one held-out record can be scored.

    Raises:
        DataError: names the labels and some of the answers.
    """
    if data.labels and all(choice < 0 for choice in held_out["choice"][:]):
        raise DataError(
            f"data.labels={shown(data.labels)}: no held-out record has one of them as its answer "
            f"({_quoted(_answers(held_out))}); give the answers there are, or data.labels=[] for "
            "records without classes"
        )


def _answers(source: "datasets.Dataset") -> list[str]:
    return [turns[-1]["content"].strip() for turns in source["messages"][:]]


def _quoted(answers: list[str]) -> str:
    """The first different answers, each cut to one short line."""
    first = list(dict.fromkeys(shown(answer[:30]) for answer in answers))
    more = ", ..." if len(first) > _QUOTED else ""
    return f"answers are: {', '.join(first[:_QUOTED])}{more}"
