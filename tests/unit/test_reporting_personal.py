"""Scores on the clients' own records: who is the mean, the worst and the best."""

from fedllm_flwr.reporting.personal import own_records_rows

EACH = {
    "a": {"loss": 1.0, "accuracy": 0.5, "personal_loss": 0.75, "personal_accuracy": 0.75},
    "b": {"loss": 3.0, "accuracy": 0.25, "personal_loss": 0.25, "personal_accuracy": 1.0},
    "c": {"loss": 2.0, "accuracy": 0.75},  # it has no adapter of its own yet
}


def test_rows_of_both_adapters() -> None:
    records = [{"round": 0}, {"round": 1, "client_eval": {"clients": {}}}]
    records.append({"round": 2, "client_eval": {"loss": 2.0, "clients": EACH}})
    assert own_records_rows(records) == [
        ("global, own records", {"loss": 2.0, "accuracy": 0.375}),
        ("  worst client", {"loss": 3.0, "accuracy": 0.25}),
        ("  best client", {"loss": 1.0, "accuracy": 0.5}),
        ("personal, own records", {"loss": 0.5, "accuracy": 0.875}),
        ("  worst client", {"loss": 0.75, "accuracy": 0.75}),
        ("  best client", {"loss": 0.25, "accuracy": 1.0}),
    ]
    assert own_records_rows([{"round": 0}]) == []


def test_rows_of_a_global_adapter_only_are_over_all_clients() -> None:
    each = {name: {"loss": EACH[name]["loss"]} for name in EACH}
    rows = own_records_rows([{"round": 1, "client_eval": {"loss": 2.0, "clients": each}}])
    assert [scores["loss"] for _, scores in rows] == [2.0, 3.0, 1.0]
