"""Loading what a configuration names: counts, samples, hold-out, errors, and real files."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from fedllm_flwr.config.schema import ColumnsConfig, Config, DataConfig, PartitionConfig
from fedllm_flwr.data import sources
from fedllm_flwr.data.federated import FederatedData, load_federated_data, load_site_data
from fedllm_flwr.data.sources import Records
from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.tasks.sft.examples import INSTRUCTIONS

SHARED = Path(os.environ.get("FEDLLM_DATA", Path(__file__).parents[3] / "shared/data"))
SENTIMENTS = ["negative", "neutral", "positive"]
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the real data sets are not here")
needs_demo = pytest.mark.skipif(not sources.DEMO.exists(), reason="the demo data is not here yet")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"instruction": f"q{i}", "output": f"a{i}", **columns} for i in range(count)]


def load(seed: int = 0, partition: PartitionConfig | None = None, **data: Any) -> FederatedData:
    partition = partition or PartitionConfig()
    return load_federated_data(
        Config(data=DataConfig(**data), partition=partition, seed=seed), INSTRUCTIONS
    )


def questions(records: Records) -> list[str]:
    return [turns[0]["content"] for turns in records["messages"]]


def test_hold_out_is_seeded_disjoint_and_complete(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", rows(100))

    one, again, other = (load(seed, path=path, validation_fraction=0.2) for seed in (1, 1, 2))
    assert questions(one.train) == questions(again.train)
    assert questions(one.eval) != questions(other.eval)
    assert len(one.eval) == one.report.held_out == 20
    assert sorted(questions(one.train) + questions(one.eval)) == sorted(f"q{i}" for i in range(100))
    assert one.train.column_names == ("messages", "label", "client", "choice")


def test_hold_out_takes_no_more_than_eval_max_samples(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", rows(100))

    data = load(path=path, validation_fraction=0.5, eval_max_samples=7)
    assert (len(data.train), len(data.eval)) == (93, 7)


def test_nothing_is_held_out_where_eval_records_are_given(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", rows(10))
    test = write(tmp_path / "test.jsonl", [{"q": "x", "a": "y"}] * 5)

    columns = ColumnsConfig(instruction="q", input=None, output="a")
    data = load(path=train, eval_path=test, eval_columns=columns, eval_max_samples=3)
    assert (len(data.train), len(data.eval), data.report.held_out) == (10, 3, 0)


def test_eval_split_applies_to_directories_and_not_to_single_files(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(20))
    write(tmp_path / "test.jsonl", rows(5))

    data = load(path=str(tmp_path), eval_split="test")
    assert (len(data.train), len(data.eval)) == (20, 5)
    data = load(path=str(tmp_path / "train.jsonl"), eval_split="test")
    assert (len(data.train), len(data.eval)) == (19, 1)


def test_max_samples_is_a_seeded_sample_in_file_order(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", rows(50))

    one, again, other = (
        questions(load(seed, path=path, max_samples=10, validation_fraction=0.0).train)
        for seed in (1, 1, 2)
    )
    assert one == again != other
    assert len(one) == 10
    assert one == sorted(one, key=lambda text: int(text[1:]))
    assert one != [f"q{i}" for i in range(10)]


def test_report_counts_what_was_left_out(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    write(path, [*rows(3), {"instruction": "q", "output": ""}, {"instruction": 1, "output": "a"}])
    path.write_text(path.read_text() + '{"broken\n')

    data = load(path=str(path), on_bad_record="skip", validation_fraction=0.0)
    report = data.report.train
    assert (report.read, report.usable, report.empty, report.bad) == (6, 3, 1, 2)
    assert data.report.lines() == [
        f"data.path={path}: 6 records, 3 usable, 3 used, 1 empty, 2 bad "
        "(empty or bad: d.jsonl, line 6, record 4, record 5)"
    ]
    with pytest.raises(DataError, match=r"data\.path: d\.jsonl, line 6: not valid JSON"):
        load(path=str(path))


def test_report_names_the_first_bad_lines_and_counts_what_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    write(path, rows(20))
    path.write_text('{"broken\n' * 7 + path.read_text())

    data = load(path=str(path), on_bad_record="skip", validation_fraction=0.1)
    lines = ", ".join(f"d.jsonl, line {number}" for number in range(1, 6))
    assert data.report.lines() == [
        f"data.path={path}: 27 records, 20 usable, 18 used, 2 held out for evaluation, 7 bad "
        f"(empty or bad: {lines}, ...)"
    ]


def test_every_file_of_a_directory_has_the_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", rows(3))
    write(tmp_path / "b.jsonl", [{"instruction": "q", "answer": "a"}] * 2)

    with pytest.raises(DataError) as caught:
        load(path=str(tmp_path))
    assert str(caught.value) == (
        f"data.path={tmp_path}/b.jsonl: data.columns.output=output, but there is no such column; "
        "set data.columns.output to one of them (columns: answer, instruction)"
    )


def test_bad_records_are_numbered_within_their_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", rows(3))
    write(tmp_path / "b.jsonl", [*rows(1), {"instruction": "q", "output": ""}])

    with pytest.raises(DataError, match=r"/b\.jsonl: 1 of 2 records .*\(record 2: column 'output'"):
        load(path=str(tmp_path))
    skipped = load(path=str(tmp_path), on_bad_record="skip", validation_fraction=0.0)
    assert questions(skipped.train) == ["q0", "q1", "q2", "q0"]


def test_client_is_the_partition_column_else_the_sets_own(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", rows(4, desk="fx", city="Bonn"))

    natural = PartitionConfig("natural", column="city")
    chosen = load(path=path, client_column="desk", partition=natural)
    assert set(chosen.train["client"]) == {"Bonn"}
    assert set(load(path=path, client_column="desk").train["client"]) == {"fx"}
    assert set(load(path=path).train["client"]) == {""}


def test_missing_attribute_columns_are_named_with_their_key(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", rows(4, desk="fx"))

    with pytest.raises(DataError, match=r"partition\.column=dsk, .* partition\.column=desk\?"):
        load(path=path, partition=PartitionConfig("natural", column="dsk"))
    with pytest.raises(DataError, match=r"data\.columns\.label=kind, but there is no such column"):
        load(path=path, columns=ColumnsConfig(label="kind"))


def test_answers_outside_the_label_set_are_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl",
        [{"instruction": "q", "output": text} for text in ("Positive", "neutral.", "maybe")],
    )

    data = load(path=path, labels=SENTIMENTS, validation_fraction=0.0)
    assert data.train["choice"] == [2, 1, -1]
    assert data.train["label"] == ["positive", "neutral", ""]
    assert data.report.train.unscored == 1


def test_site_data_needs_no_label_and_no_client_column(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", rows(9))

    data = DataConfig(path=path, client_column="desk", columns=ColumnsConfig(label="kind"))
    config = Config(data=data)
    assert len(load_site_data(config, INSTRUCTIONS)) == 9
    config = Config(data=replace(data, max_samples=4))
    assert questions(load_site_data(config, INSTRUCTIONS)) == questions(
        load_site_data(config, INSTRUCTIONS)
    )
    assert len(load_site_data(config, INSTRUCTIONS)) == 4


def test_errors_of_the_source(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", rows(1))

    with pytest.raises(ConfigError, match=r"give data\.path=/path/to/file"):
        load()
    with pytest.raises(DataError, match=r"data\.path: nowhere\.json: no such file"):
        load(path="nowhere.json")
    with pytest.raises(DataError, match=r"data\.eval_path: nowhere\.json: no such file"):
        load(path=path, eval_path="nowhere.json")
    with pytest.raises(DataError, match=r"leave nothing to train on.*set it to 0"):
        load(path=path)
    for name, content in (("none.json", "[]"), ("header.csv", "a,b\n"), ("bad.jsonl", "{\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"data\.path: .*{name}: holds no records"):
            load(path=str(tmp_path / name), on_bad_record="skip")
    write(tmp_path / "bad.jsonl", [{"instruction": "a", "output": ""}])
    with pytest.raises(DataError, match="none of its 1 records is usable"):
        load(path=str(tmp_path / "bad.jsonl"), on_bad_record="skip")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    write(path, rows(5000))
    data = load(path=str(path))
    reading = iter(data.train)
    next(reading)
    write(path, rows(5001))
    with pytest.raises(DataError, match=r"d\.jsonl: has changed while it was read; start again"):
        list(reading)


def test_columns_may_first_come_late(tmp_path: Path) -> None:
    """What the first records lack may be in the last one, in another piece of the file."""
    path = write(tmp_path / "d.jsonl", [*rows(3000), *rows(1, desk="fx", kind="x", input="more")])
    with pytest.raises(DataError, match=r"3000 of 3001 records .*no value in column 'desk'"):
        load(path=path, client_column="desk")
    columns = ColumnsConfig(label="kind")
    data = load(path=path, columns=columns, validation_fraction=0.0)
    assert data.train["label"] == [""] * 3000 + ["x"]
    assert questions(data.train)[-1] == "q0 more"
    assert data.report.train.unused_columns == ("desk",)


def test_hub_failures_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nTraceback ...")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError,
        match=r"data set org/set is not on this machine and the hub cannot be reached; "
        r"give data\.path=/path/to/file",
    ):
        load(hub_id="org/set")

    def unknown_split(*args: Any, **options: Any) -> None:
        raise ValueError('Unknown split "dev".\nmore')

    monkeypatch.setattr(datasets, "load_dataset", unknown_split)
    with pytest.raises(DataError, match=r"org/set \(split dev\): cannot be loaded \(Unknown split"):
        load(hub_id="org/set", split="dev")


def test_hub_records_go_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        calls.append((args, options))
        return datasets.Dataset.from_list(rows(4))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load(hub_id="org/set", hub_config="main", eval_split="test", hub_revision="abc")
    assert (len(data.train), len(data.eval)) == (4, 4)
    assert calls == [
        (("org/set", "main"), {"split": split, "revision": "abc"}) for split in ("train", "test")
    ]


@needs_demo
def test_demo_has_its_own_test_records() -> None:
    columns = ColumnsConfig(label="output")
    natural = PartitionConfig("natural", column="desk")
    data = load(
        path="embedded",
        eval_path="embedded",
        client_column="desk",
        columns=columns,
        labels=SENTIMENTS,
        partition=natural,
    )
    assert data.report.held_out == data.report.train.unscored == 0
    assert data.report.num_train == data.report.train.read
    assert len(set(data.train["client"])) == 10
    assert min(data.eval["choice"]) >= 0


@needs_shared
@pytest.mark.parametrize(
    ("path", "options", "usable"),
    [
        ("sft/alpaca_9k.json", {"preprocessing": "alpaca", "on_bad_record": "skip"}, 9225),
        ("sft/alpaca_gpt4_1k.json", {"preprocessing": "alpaca"}, 1474),
        ("sft/code_alpaca_2k.json", {"preprocessing": "alpaca", "on_bad_record": "skip"}, 2015),
        ("sft/medical_meadow_small.json", {"preprocessing": "medalpaca"}, 5942),
        (
            "sft/gsm8k_train.jsonl",
            {"columns": ColumnsConfig(instruction="question", input=None, output="answer")},
            7473,
        ),
    ],
)
def test_real_training_sets(path: str, options: dict[str, Any], usable: int) -> None:
    data = load(path=str(SHARED / path), **options)

    assert data.report.train.usable == usable
    assert len(data.train) + len(data.eval) == usable
    assert len(data.eval) == min(1000, round(0.05 * usable))


@needs_shared
@pytest.mark.parametrize(("test_set", "size"), [("fpb", 1212), ("fiqa", 235)])
def test_real_finance_sets(test_set: str, size: int) -> None:
    data = load(
        path=str(SHARED / "sft/finance_sentiment_train.jsonl"),
        eval_path=str(SHARED / f"eval/{test_set}_test.jsonl"),
        preprocessing="fingpt",
        columns=ColumnsConfig(label="output"),
        labels=SENTIMENTS,
        eval_max_samples=None,
        partition=PartitionConfig("natural", column="source"),
    )

    assert (len(data.train), len(data.eval)) == (13895, size)
    assert set(data.train["client"]) == {"fpb", "tfns", "fiqa"}
    assert data.report.train.unscored == data.report.evaluation.unscored == 0
    prompt = data.eval["messages"][0][0]["content"]
    assert prompt.startswith("What is the sentiment of this ")
    assert "Input:" not in prompt


def contained(texts: list[str], other: list[str]) -> list[bool]:
    """Which texts equal one of `other` or hold 80 % of its 4-grams, pair by pair."""

    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 4]) for i in range(len(words) - 3)}

    return [
        any(
            text == held or (len(g := grams(held)) >= 4 and len(g & grams(text)) >= 0.8 * len(g))
            for held in other
        )
        for text in texts
    ]


def test_near_duplicates_of_held_out_and_test_records_are_left_out(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in chance.integers(0, 5000, 20)) for _ in range(60)]
    copies = []
    for text in texts:  # of 16 4-grams, a word in the middle takes 4, one at an end 1
        words = text.split()
        words[int(chance.choice([0, 1, 10, 19]))] = "other"
        copies += [" ".join(words)] * int(chance.integers(0, 2))
    pool = [texts[0], *texts, *copies]
    path = write(tmp_path / "d.jsonl", [{"instruction": t, "output": "yes"} for t in pool])
    tests = [{"q": {"text": t}, "answers": ["yes"]} for t in texts[30:40]]
    test_path = write(tmp_path / "test.jsonl", tests)
    apart = {"near_duplicates": "drop", "test_path": test_path, "validation_fraction": 0.2}
    data = load(path=path, **apart)

    tested = [f"{t} yes" for t in texts[30:40]]
    held, train = ([f"{q} yes" for q in questions(part)] for part in (data.eval, data.train))
    assert not any(contained([*held, *train], tested))
    assert not any(contained(train, held))
    before = load(path=path, validation_fraction=0.2)
    usable = [t for t in pool if not contained([f"{t} yes"], tested)[0]]
    assert len(held) == round(0.2 * len(usable))
    kept = [t for t in usable if not contained([f"{t} yes"], held)[0]]
    assert sorted(questions(data.train)) == sorted(kept)
    assert len(before.train) - len(train) > 10
    assert data.report.near == len(pool) - len(train) - len(held)
    assert f"{data.report.near} near to a held-out or test record" in data.report.lines()[0]
    only = write(
        tmp_path / "only.jsonl", [{"instruction": t, "output": "yes"} for t in texts[30:40]]
    )
    with pytest.raises(DataError, match="leaves none"):
        load(path=only, **apart)
