"""Clients whose updates are cut round after round, from records to the lines that name them."""

from fedllm_flwr.reporting.metrics import RoundRecord, cut_clients, cut_lines


def record(number: int, cut: dict[str, float], refused: tuple[str, ...] = ()) -> RoundRecord:
    clients = {name: {"loss": 1.0} for name in cut}
    return {"round": number, "clients": clients, "cut": cut, "refused_updates": [*refused]}


def test_a_client_is_named_when_most_of_its_rounds_are_cut_or_refused() -> None:
    records = [
        record(1, {"ant": 1.0, "bee": 0.2, "cat": 0.9}),
        record(2, {"ant": 0.8, "bee": 0.9}, refused=("dog",)),
        record(3, {"ant": 0.4, "bee": 0.5, "cat": 1.0}, refused=("dog",)),
        record(4, {"ant": 0.6, "bee": 0.9}, refused=("dog",)),
    ]
    found = cut_clients(records)
    assert found == {"ant": {"cut": 3, "of": 4}, "dog": {"cut": 3, "of": 3}}
    assert cut_lines(found)[0].startswith("ant: its updates were cut or refused in 3 of 4 rounds")
    assert cut_clients([{"round": 0}]) == {}
