"""Scores of the global and of personal adapters on the clients' own held-out records."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from fedllm_flwr.federation.messages import PERSONAL
from fedllm_flwr.reporting.metrics import RoundRecord
from fedllm_flwr.tasks.base import Scores

OWN_RECORDS = "own records"


def client_rows(records: Sequence[RoundRecord]) -> list[tuple[str, Scores]]:
    """Rows of the closing table below the start: the best and the worst client by loss, if clients
    train their own adapters, and the scores on the clients' own records.
    """
    each: Mapping[str, Scores] = records[-1].get("local", {}) if records else {}
    ranked = sorted(each, key=lambda name: each[name]["loss"])
    ends = {"best": ranked[0], "worst": ranked[-1]} if ranked else {}
    rows = [(f"{label} ({name})", each[name]) for label, name in ends.items()]
    return rows + own_records_rows(records)


def own_records_rows(records: Sequence[RoundRecord]) -> list[tuple[str, Scores]]:
    """Mean, worst and best client by loss, with the global adapter and with personal ones, if any.

    The rows are of the last round with clients' scores; empty if there is none. If clients have
    personal adapters, both kinds of rows are over the clients that have one already.
    """
    found = [item["client_eval"]["clients"] for item in records if item.get("client_eval")]
    if not found:
        return []
    each: Mapping[str, Scores] = found[-1]
    personal = {name: own for name, scores in each.items() if (own := _personal(scores))}
    shared = {
        client: {name: value for name, value in scores.items() if not name.startswith(PERSONAL)}
        for client, scores in each.items()
        if client in personal or not personal
    }
    return _rows("global", shared) + _rows("personal", personal)


def _rows(label: str, each: Mapping[str, Scores]) -> list[tuple[str, Scores]]:
    if not each:
        return []
    names = next(iter(each.values())).keys()
    mean = {score: fmean(scores[score] for scores in each.values()) for score in names}
    ranked = sorted(each, key=lambda name: (each[name]["loss"], name))
    return [
        (f"{label}, {OWN_RECORDS}", mean),
        *((f"  {end} client", each[ranked[place]]) for end, place in (("worst", -1), ("best", 0))),
    ]


def _personal(scores: Mapping[str, float]) -> Scores:
    start = len(PERSONAL)
    return {name[start:]: value for name, value in scores.items() if name.startswith(PERSONAL)}
