"""Clients from one data set: counts, coverage, repeatability and errors."""

import math
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from flwr_datasets.partitioner import IidPartitioner, NaturalIdPartitioner

from fedllm_flwr.config.schema import PartitionConfig
from fedllm_flwr.data.partition import Partition, _shuffled, describe, partition
from fedllm_flwr.data.records import Messages
from fedllm_flwr.data.sources import Records
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks.preferences.records import Pair
from fedllm_flwr.tasks.sft.records import Example

CLASSES = ("negative", "neutral", "positive")


def keys(count: int, classes: tuple[str, ...] = CLASSES) -> list[str]:
    return [classes[i % len(classes)] for i in range(count)]


def of_clients(divided: Partition, train: list[str]) -> list[list[str]]:
    return [[train[i] for i in part] for part in rows(divided)]


def by_label(name: str, **options: object) -> PartitionConfig:
    return PartitionConfig(name, column="output", **options)


def rows(divided: Partition) -> list[list[int]]:
    return [indices.tolist() for indices in divided.indices]


@pytest.mark.parametrize("name", ["iid", "dirichlet", "natural", "pathological", "size"])
def test_every_record_has_one_client_and_a_seed_repeats(name: str) -> None:
    train, config = keys(90), by_label(name, min_size=1)
    count = None if name == "natural" else 5

    divided = partition(train, config, count, seed=3)
    assert sorted(row for part in rows(divided) for row in part) == list(range(90))
    assert rows(partition(train, config, count, seed=3)) == rows(divided)
    if name != "natural":
        assert rows(partition(train, config, count, seed=4)) != rows(divided)
        assert divided.names == [f"client-{i}" for i in range(5)]


def test_iid_sizes_differ_by_one_and_ignore_the_order_of_the_file() -> None:
    divided = partition(keys(100), PartitionConfig("iid"), None, seed=0)

    assert [len(part) for part in rows(divided)] == [10] * 10
    assert rows(divided)[0] != list(range(10))


@pytest.mark.parametrize(
    "config",
    [by_label("dirichlet", alpha=1.0), by_label("pathological", classes_per_client=2)],
    ids=["dirichlet", "pathological"],
)
def test_label_skew_is_not_skew_of_source(config: PartitionConfig) -> None:
    """Each class of a file sorted by source spreads over its clients as if drawn at random.

    Rows 0-299 come from one source, rows 300-599 from another. Cuts in the file's order gave
    every client of a class records of one source only, except where the cut crosses row 300.
    """
    train = keys(600)
    divided = partition(train, config, 6, seed=0)

    labels = np.array(train)
    checked = 0
    for part in divided.indices:
        for label in CLASSES:
            held = part[labels[part] == label]
            if len(held) >= 20:
                first_source = int((held < 300).sum())
                # Hypergeometric: 100 of a class's 200 records are of the first source.
                deviation = math.sqrt(len(held) / 4 * (200 - len(held)) / 199)
                assert abs(first_source - len(held) / 2) <= 4 * deviation + 1
                checked += 1
    assert checked >= 6


@pytest.mark.parametrize("name", ["dirichlet", "pathological"])
def test_the_order_of_a_file_does_not_change_sizes_and_counts(name: str) -> None:
    """The partitioners' own shares, whichever records fill them."""
    train = keys(90)
    upside_down = train[::-1]
    for seed in range(3):
        one, other = (
            [Counter(part) for part in of_clients(partition(some, by_label(name), 5, seed), some)]
            for some in (train, upside_down)
        )
        assert one == other


def test_size_gives_shares_of_a_power_law() -> None:
    divided = partition(keys(550), PartitionConfig("size", alpha=1.0), 10, seed=0)

    sizes = [len(part) for part in rows(divided)]
    assert sum(sizes) == 550
    np.testing.assert_allclose(sizes, [10 * (i + 1) for i in range(10)], atol=5)


@pytest.mark.parametrize("name", ["iid", "natural"])
def test_clients_are_those_of_flwr_datasets(name: str) -> None:
    train = [f"k{i * 7 % 11}" for i in range(101)]
    order = _shuffled(train, PartitionConfig(name=name, column="topic"), seed=5)
    theirs = IidPartitioner(11) if name == "iid" else NaturalIdPartitioner("key")
    theirs.dataset = Dataset.from_dict({"row": order, "key": [train[i] for i in order]})
    mine = partition(train, PartitionConfig(name=name, column="topic"), 11, seed=5)
    assert rows(mine) == [theirs.load_partition(i)["row"][:] for i in range(11)]


def test_natural_clients_are_the_sorted_values() -> None:
    train = keys(12, ("tfns", "fpb", "fiqa"))

    divided = partition(train, by_label("natural"), None, seed=0)
    assert divided.names == ["fiqa", "fpb", "tfns"]
    assert list(map(set, of_clients(divided, train))) == [{"fiqa"}, {"fpb"}, {"tfns"}]


def test_pathological_clients_hold_exactly_so_many_classes() -> None:
    train = keys(90)

    divided = partition(train, by_label("pathological", classes_per_client=2), 6, seed=0)
    assert [len(set(part)) for part in of_clients(divided, train)] == [2] * 6


def test_pathological_leaves_out_classes_that_nobody_holds() -> None:
    divided = partition(keys(90), by_label("pathological", classes_per_client=1), 2, seed=0)

    assert sum(map(len, rows(divided))) == 60


def test_small_alpha_is_more_skewed_than_a_large_one() -> None:
    def spread(alpha: float) -> float:
        config = by_label("dirichlet", alpha=alpha, min_size=1)
        train = keys(3000)
        shares = map(Counter, of_clients(partition(train, config, 5, seed=1), train))
        return float(np.mean([max(count.values()) / count.total() for count in shares]))

    assert spread(0.1) > 0.7 > 0.4 > spread(1000.0)


def test_dirichlet_reaches_min_size() -> None:
    config = by_label("dirichlet", alpha=0.3, min_size=20)

    assert min(map(len, rows(partition(keys(600), config, 5, seed=0)))) >= 20


def asked(answer: str) -> Messages:
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]


def test_describe_counts_labels_and_lengths() -> None:
    labels = keys(6)
    train = Records.of([Example(asked("a" * i), labels[i], labels[i], -1) for i in range(6)])

    stats = describe(partition(labels, by_label("natural"), 3, seed=0), train)
    assert [item.name for item in stats] == list(CLASSES)
    assert stats[1].label_counts == {"neutral": 2}
    # Records 1 and 4: one character of question, one and four of answer.
    assert (stats[1].mean_length, stats[1].median_length, stats[1].max_length) == (3.5, 3.5, 5)
    assert sum(item.num_examples for item in stats) == 6


def test_lengths_of_preference_pairs_include_both_answers() -> None:
    labels = keys(6)
    train = Records.of([Pair(asked("a" * i), "abc", "de", labels[i], labels[i]) for i in range(6)])

    stats = describe(partition(labels, by_label("natural"), 3, seed=0), train)
    assert (stats[1].mean_length, stats[1].max_length) == (8.5, 10)


@pytest.mark.parametrize(
    ("config", "count", "message"),
    [
        (PartitionConfig("natural"), None, r"partition\.column is not set .*partition=iid"),
        (PartitionConfig("dirichlet"), 2, r"partition=dirichlet needs a column"),
        (
            by_label("natural"),
            7,
            r"federation\.num_clients=7, but partition\.column=output has 3 values "
            r"\(negative, neutral, positive\).*set federation\.num_clients=3 or null",
        ),
        (PartitionConfig("iid"), 31, r"federation\.num_clients=31 is more than the 30 training"),
        (PartitionConfig("iid"), 0, r"federation\.num_clients must be at least 1, got 0"),
        (
            by_label("dirichlet", alpha=0.01, min_size=7),
            4,
            r"partition\.alpha=0\.01 with federation\.num_clients=4 and 30 records never gave .*"
            r"partition\.min_size=7",
        ),
        (
            by_label("dirichlet", alpha=0.01, min_size=11),
            3,
            r"partition\.min_size=11 for each of federation\.num_clients=3 takes 33 records, but "
            r"there are 30; lower one of them",
        ),
        (
            by_label("pathological", classes_per_client=4),
            2,
            r"partition\.classes_per_client=4, but partition\.column=output has only 3 values",
        ),
        (
            by_label("pathological", classes_per_client=3),
            12,
            r"partition=pathological: a value of partition\.column=output has fewer records",
        ),
        (
            PartitionConfig("size", alpha=9.0),
            10,
            r"partition\.alpha=9\.0 leaves some of 10 clients .*give fewer clients",
        ),
    ],
)
def test_impossible_partitions_are_one_clear_line(
    config: PartitionConfig, count: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        partition(keys(30), config, count, seed=0)
    assert "\n" not in str(caught.value)


def test_records_without_a_value_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"partition\.column=output has no value in 2 records"):
        partition(keys(6, ("", "a", "b")), by_label("natural"), None, seed=0)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    partition(keys(30), by_label("natural"), None, seed=0)

    assert capfd.readouterr() == ("", "")
