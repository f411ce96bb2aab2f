"""Preference pairs from every form of record, and the faults of single records."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.config.schema import ColumnsConfig, Config, DataConfig, TaskConfig
from fedllm_flwr.data.columns import AttributeColumn, Columns, Mapping
from fedllm_flwr.data.faults import Faults
from fedllm_flwr.data.federated import FederatedData, load_federated_data, load_site_data
from fedllm_flwr.errors import DataError
from fedllm_flwr.plugins import PREPROCESSING
from fedllm_flwr.tasks import find
from fedllm_flwr.tasks.preferences.records import Pair, make_pairs

ROLES = {"u": "user", "a": "assistant", "s": "system"}


def turns(*texts: str) -> list[dict[str, str]]:
    """Messages written as "u:text", "a:text" and "s:text"."""
    return [{"role": ROLES[text[0]], "content": text[2:]} for text in texts]


def pairs_of(
    *rows: dict[str, Any], preprocessing: str = "none", **columns: str | None
) -> tuple[list[Pair], Faults]:
    mapping = Mapping("file", ColumnsConfig(**columns))
    preprocessed = list(PREPROCESSING.find(preprocessing)(rows, mapping.columns))
    return make_pairs(preprocessed, mapping, Columns(preprocessed))


def the_pair(row: dict[str, Any], **options: Any) -> Pair:
    pairs, faults = pairs_of(row, **options)
    assert faults == Faults()
    return pairs[0]


def hh(chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": turns("u:q"), "chosen": "good", "rejected": "bad"},
        {"prompt": turns("u:q"), "chosen": turns("a:good"), "rejected": turns("a:bad")},
        {"prompt": "q", "chosen": turns("u:q", "a:good"), "rejected": turns("u:q", "a:bad")},
        {"prompt": "q\n", "chosen": turns("u:q", "a:good"), "rejected": "bad"},
        {"prompt": "", "chosen": turns("u:q", "a:good"), "rejected": turns("u:q", "a:bad")},
        {"chosen": turns("u:q", "a:good"), "rejected": turns("u:q ", "a:bad")},
    ],
)
def test_forms_of_one_pair(row: dict[str, Any]) -> None:
    assert the_pair(row) == Pair(turns("u:q"), "good", "bad", "", "")


def test_longer_contexts_keep_their_turns() -> None:
    context = turns("s:be brief", "u:q", "a:", "u:again")
    row = {
        "prompt": "again",
        "chosen": [*context, *turns("a:good")],
        "rejected": [*context, *turns("a:bad")],
    }

    assert the_pair(row).messages == context
    assert the_pair(row | {"prompt": context}).messages == context
    del row["prompt"]
    assert the_pair(row) == Pair(context, "good", "bad", "", "")


def test_sharegpt_turns_are_turns() -> None:
    chosen = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}]

    assert the_pair({"prompt": "q", "chosen": chosen, "rejected": "bad"}).chosen == "good"


def test_columns_are_mapped_and_attributes_kept() -> None:
    rows = [{"question": "q", "win": "good", "lose": "bad", "kind": 7, "desk": "fx"}]
    columns = ColumnsConfig(prompt="question", chosen="win", rejected="lose")
    label = AttributeColumn("kind", "data.columns.label", required=True)
    client = AttributeColumn("desk", "partition.column", required=True)

    pairs, _ = make_pairs(rows, Mapping("f", columns, "data.columns", label, client), Columns(rows))
    assert pairs == [Pair(turns("u:q"), "good", "bad", "7", "fx")]
    rows = [{**rows[0], "desk": None}]
    _, faults = make_pairs(rows, Mapping("f", columns, client=client), Columns(rows))
    assert faults.bad == [(1, "no value in column 'desk' (partition.column)")]


def test_a_shared_beginning_belongs_to_the_answers() -> None:
    """The context ends with a turn, not where the texts part."""
    start = "\n\nHuman: Hi\n\nAssistant: I think that"
    pair = the_pair(hh(f"{start} you may", f"{start} nobody may"), preprocessing="hh_rlhf")

    assert pair == Pair(turns("u:Hi"), "I think that you may", "I think that nobody may", "", "")


def test_dialogues_are_parsed_into_turns() -> None:
    start = "\n\nHuman: a\n\nAssistant: \n\nHuman: c  d\n\ne \n\nAssistant: "
    pair = the_pair(hh(f"{start}Grüße 你好", f"{start} f\n"), preprocessing="hh_rlhf")

    assert pair.messages == turns("u:a", "a:", "u:c  d\n\ne ")
    assert (pair.chosen, pair.rejected) == ("Grüße 你好", " f\n")


def test_a_speaker_counts_at_the_start_of_a_paragraph_only() -> None:
    text = "He said Human: no\nAssistant: no\n\nHumans: no\n\n Human: no"
    dialogue = f"\n\nHuman: {text}\n\nAssistant: {text}"
    pair = the_pair(hh(dialogue, dialogue + "!"), preprocessing="hh_rlhf")

    assert pair == Pair(turns(f"u:{text}"), text, f"{text}!", "", "")


def test_turns_of_one_speaker_in_a_row_are_one_turn() -> None:
    start = "\n\nHuman: a\n\nHuman: b\n\nAssistant: "
    row = hh(f"{start}c\n\nAssistant: d", f"{start}\n\nAssistant: e")
    pair = the_pair(row, preprocessing="hh_rlhf")

    assert pair == Pair(turns("u:a\n\nb"), "c\n\nd", "e", "", "")


@pytest.mark.parametrize("ending", ["\n\nAssistant:", "\n\nAssistant: ", ""])
def test_dialogues_may_be_split_into_prompt_and_answers(ending: str) -> None:
    prompt = f"\n\nHuman: a\n\nAssistant: b\n\nHuman: c{ending}"
    row = {"prompt": prompt, "chosen": "good", "rejected": "bad"}

    pair = the_pair(row, preprocessing="hh_rlhf")
    assert pair == Pair(turns("u:a", "a:b", "u:c"), "good", "bad", "", "")


def test_windows_lines_and_no_blank_start() -> None:
    row = hh("Human: a\r\n\r\nAssistant: good", "\r\n\r\nHuman: a\r\n\r\nAssistant: bad")

    pair = the_pair(row, preprocessing="hh_rlhf")
    assert pair == Pair(turns("u:a"), "good", "bad", "", "")


START = "\n\nHuman: a\n\nAssistant: "
FAULTS: list[tuple[str, dict[str, Any], str]] = [
    (
        "empty",
        {"prompt": "q", "chosen": " \n", "rejected": "b"},
        "answer in column 'chosen' is emp",
    ),
    ("empty", {"prompt": "q", "chosen": "a", "rejected": None}, "column 'rejected' is missing"),
    ("empty", {"prompt": "q", "chosen": "a"}, "column 'rejected' is missing"),
    ("empty", {"prompt": "q", "chosen": [], "rejected": "b"}, "column 'chosen' is missing"),
    ("empty", {"prompt": " ", "chosen": "a", "rejected": "b"}, "column 'prompt' is empty"),
    ("empty", hh(START + "x", START), "the answer in column 'rejected' is empty"),
    ("equal", {"prompt": "q", "chosen": "a", "rejected": " a\n"}, "the chosen answer equals"),
    ("equal", hh(START + "x", START + "x"), "the chosen answer equals"),
    ("bad", {"prompt": "q", "chosen": 1, "rejected": "b"}, "column 'chosen' is int, not text or a"),
    ("bad", {"prompt": {}, "chosen": "a", "rejected": "b"}, "column 'prompt' is dict, not text"),
    ("bad", {"prompt": None, "chosen": "a", "rejected": "b"}, "nothing precedes the answers"),
    ("bad", {"prompt": [], "chosen": turns("a:a"), "rejected": turns("a:b")}, "nothing precedes"),
    ("bad", {"prompt": "q", "chosen": "\ud83d", "rejected": "b"}, "half of a surrogate pair"),
    ("bad", {"prompt": "\ud83d", "chosen": "a", "rejected": "b"}, "half of a surrogate pair"),
    ("bad", {"prompt": "q", "chosen": turns("a:\ud83d"), "rejected": "b"}, "half of a surrogate"),
    ("bad", {"prompt": "q", "chosen": turns("u:q"), "rejected": "b"}, "column 'chosen' does not e"),
    ("bad", {"prompt": "q", "chosen": ["a"], "rejected": "b"}, "a turn of the chat is not an obj"),
    ("bad", {"prompt": "q", "chosen": [{"role": ["x"]}], "rejected": "b"}, "unknown role ['x']"),
    (
        "bad",
        {"prompt": "p", "chosen": turns("u:q", "a:a"), "rejected": turns("u:q", "a:b")},
        "column 'prompt' is not what precedes the answers",
    ),
    (
        "bad",
        {"prompt": turns("u:p"), "chosen": turns("u:q", "a:a"), "rejected": turns("u:q", "a:b")},
        "column 'prompt' is not what precedes the answers",
    ),
    (
        "bad",
        {"chosen": turns("u:q", "a:a"), "rejected": turns("u:p", "a:b")},
        "chosen and rejected do not answer the same dialogue",
    ),
    ("bad", {"prompt": turns("u:q", "a:r"), "chosen": "a", "rejected": "b"}, "the turn before the"),
    ("bad", {"prompt": turns("s:q"), "chosen": "a", "rejected": "b"}, "the turn before the answer"),
    (
        "bad",
        {"prompt": turns("u:q", "s:r", "u:q"), "chosen": "a", "rejected": "b"},
        "a system turn",
    ),
    (
        "bad",
        hh("\n\nAssistant: hi" + START + "x", "\n\nAssistant: hi" + START + "y"),
        "the dialogue starts with the assistant",
    ),
    ("bad", hh(START + "x", "\n\nHuman: b\n\nAssistant: y"), "chosen and rejected do not answer"),
    ("bad", hh(START + "x", START + "x\n\nHuman: c"), "column 'rejected' does not end with a turn"),
    ("bad", hh("so\n\nHuman: a\n\nAssistant: x", "no"), "nothing precedes the answers"),
]


@pytest.mark.parametrize(("kind", "row", "reason"), FAULTS)
def test_faults(kind: str, row: dict[str, Any], reason: str) -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    dialogues = "prompt" not in row and isinstance(row["chosen"], str)
    pairs, faults = pairs_of(good, row, preprocessing="hh_rlhf" if dialogues else "none")

    ((number, found),) = getattr(faults, kind)
    assert (len(pairs), number) == (1, 2)
    assert sum(map(len, vars(faults).values())) == 1
    assert reason in found


COLUMNS: list[tuple[dict[str, Any], dict[str, str | None], str]] = [
    (
        {"prompt": "q", "chosen": "a", "rejectd": "b"},
        {},
        r"file: data\.columns\.rejected=rejected, but there is no such column; did you mean "
        r"data\.columns\.rejected=rejectd\? \(columns: chosen, prompt, rejectd\)",
    ),
    ({"prompt": "q", "answer": "a"}, {}, r"data\.columns\.chosen=chosen.*columns: answer, prompt"),
    (
        {"instruction": "q", "output": "a"},
        {},
        r"file: holds instructions, not preference pairs; use task=sft, or give a file of "
        r"preference pairs \(columns: instruction, output\)",
    ),
    ({"messages": turns("u:q", "a:r")}, {}, "holds instructions, not preference pairs; use task=s"),
    ({"question": "q", "chosen": "a", "rejected": "b"}, {}, r"data\.columns\.prompt=prompt, but"),
    (
        {"question": "q", "chosen": turns("u:q", "a:r"), "rejected": turns("u:q", "a:s")},
        {"prompt": "questoin"},
        r"did you mean data\.columns\.prompt=question\?",
    ),
    (hh(START + "x", START + "y"), {}, r"as in HH-RLHF: data\.preprocessing=hh_rlhf"),
    (
        {"prompt": "q"},
        {"chosen": None},
        r"data\.columns\.chosen is null; name the column of the ch",
    ),
]


@pytest.mark.parametrize(("row", "columns", "message"), COLUMNS)
def test_missing_columns(row: dict[str, Any], columns: dict[str, str | None], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pairs_of(row, row, **columns)


def load(path: Path, rows: list[dict[str, Any]], task: str = "dpo", **data: Any) -> FederatedData:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(path), "validation_fraction": 0.0} | data
    return load_federated_data(Config(data=DataConfig(**data)), find(task).records)


def good(count: int, **columns: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}", **columns} for i in range(count)
    ]


def test_pairs_without_a_difference_are_dropped_and_counted(tmp_path: Path) -> None:
    """data.on_bad_record=error, the default, refuses other faults only."""
    same = {"prompt": "q", "chosen": "a", "rejected": "a"}
    empty = {"prompt": "q", "chosen": "a", "rejected": ""}
    path = tmp_path / "p.jsonl"
    data = load(path, [same, *good(3, score=1), empty, same])

    assert data.train["chosen"][:] == ["a0", "a1", "a2"]
    assert data.report.lines() == [
        f"data.path={path}: 6 records, 3 usable, 3 used, 1 empty, 2 equal "
        "(empty or bad: record 5); columns not used: score"
    ]
    with pytest.raises(DataError, match=r"1 of 3 records cannot be used \(record 2: column 'cho"):
        load(path, [same, {"prompt": "q", "chosen": 1, "rejected": "b"}, *good(1)])
    data = load(path, [{**same, "chosen": 1}, *good(1)], on_bad_record="skip")
    assert (data.report.train.bad, data.report.num_train) == (1, 1)


def test_nothing_left_is_one_error(tmp_path: Path) -> None:
    same = {"prompt": "q", "chosen": "a", "rejected": "a"}
    with pytest.raises(
        DataError,
        match=r"p\.jsonl: chosen equals rejected in all 12 records; check data\.columns\.chosen "
        r"and data\.columns\.rejected$",
    ):
        load(tmp_path / "p.jsonl", [same] * 12)
    with pytest.raises(
        DataError,
        match=r"none of its 2 records is usable \(record 1: the answer in column 'chosen' is empty",
    ):
        load(tmp_path / "p.jsonl", [{**same, "chosen": ""}, same])


def test_columns_and_parts_of_a_set_of_pairs(tmp_path: Path) -> None:
    data = load(tmp_path / "p.jsonl", good(20), validation_fraction=0.2, max_samples=15)

    assert data.train.column_names == ("messages", "chosen", "rejected", "label", "client")
    assert (len(data.train), len(data.eval)) == (12, 3)
    for part in (data.train, data.eval):
        for context, chosen in zip(part["messages"], part["chosen"], strict=True):
            assert context == turns(f"u:q{chosen[1:]}")


def test_data_of_the_other_task_is_named(tmp_path: Path) -> None:
    instructions = [{"instruction": "q", "output": "a"}] * 3
    with pytest.raises(DataError, match="holds preference pairs, not instructions; use task=dpo"):
        load(tmp_path / "p.jsonl", good(3), task="sft")
    with pytest.raises(DataError, match="holds instructions, not preference pairs; use task=sft"):
        load(tmp_path / "p.jsonl", instructions)


def test_a_site_reads_pairs(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    load(path, good(5))
    config = Config(data=DataConfig(path=str(path), client_column="x"), task=TaskConfig("dpo"))

    assert load_site_data(config, find("dpo").records)["rejected"] == [f"b{i}" for i in range(5)]
