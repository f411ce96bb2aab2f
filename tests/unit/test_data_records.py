"""Preprocessing, column mapping and faults of single records."""

import subprocess
import sys

import pytest

from fedllm_flwr.config.schema import ColumnsConfig
from fedllm_flwr.data.columns import AttributeColumn, Columns, Mapping, unused_columns
from fedllm_flwr.data.faults import Faults, refuse_faults
from fedllm_flwr.errors import DataError
from fedllm_flwr.plugins import PREPROCESSING
from fedllm_flwr.tasks.sft.records import Example, make_examples

QUESTION_ANSWER = ColumnsConfig(instruction="question", input=None, output="answer")
CHAT = ColumnsConfig(messages="chat")


def examples_of(rows: list[dict | None], mapping: Mapping) -> tuple[list[Example], Faults]:
    return make_examples(rows, mapping, Columns(rows))


def turns(name: str, rows: list[dict], columns: ColumnsConfig) -> list[tuple[str, str]]:
    """(user text, assistant text) of the records after preprocessing ``name``."""
    preprocessed = list(PREPROCESSING.find(name)(rows, columns))
    examples, faults = examples_of(preprocessed, Mapping("file", columns))
    assert faults == Faults()
    return [tuple(message["content"] for message in example.messages) for example in examples]


@pytest.mark.parametrize("name", ["none", "alpaca", "fingpt"])
def test_instruction_and_input_are_joined_by_a_space(name: str) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    ]

    assert turns(name, rows, ColumnsConfig()) == [("Add. 1 and 2", "3"), ("Say hi.", "hi")]


def test_medalpaca_drops_the_constant_instruction() -> None:
    rows = [{"instruction": "Answer truthfully", "input": "What is flu?", "output": "A virus."}]

    assert turns("medalpaca", rows, ColumnsConfig()) == [("What is flu?", "A virus.")]


def test_mathinstruct_keeps_the_first_of_duplicate_instructions() -> None:
    rows = [
        {"instruction": "1+1", "output": "2"},
        {"instruction": "1+2", "output": "3"},
        {"instruction": "1+1", "output": "two"},
    ]

    columns = ColumnsConfig(input=None)
    assert list(PREPROCESSING.find("mathinstruct")(rows, columns)) == [rows[0], rows[1], None]
    assert turns("mathinstruct", rows, columns) == [("1+1", "2"), ("1+2", "3")]


def test_gsm8k_is_a_column_mapping() -> None:
    rows = [{"question": "How many?", "answer": "Four\n#### 4"}]

    assert turns("none", rows, QUESTION_ANSWER) == [("How many?", "Four\n#### 4")]


def test_fingpt_benchmark_rows_become_training_rows() -> None:
    context = "Instruction: Which?\nInput: Up 3% .\nSecond line\nAnswer: "
    rows = [{"context": context, "target": "positive"}]

    assert turns("fingpt", rows, ColumnsConfig()) == [("Which? Up 3% .\nSecond line", "positive")]


def test_sharegpt_and_role_content_give_the_same_messages() -> None:
    sharegpt = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]

    examples, _ = examples_of([{"chat": sharegpt}, {"chat": messages}], Mapping("file", CHAT))
    assert [example.messages for example in examples] == [messages, messages]


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ("text", "the chat is not a list of turns"),
        ([], "the chat has no turns"),
        (None, "the chat has no turns"),
        (["hi"], "a turn of the chat is not an object with role and content"),
        ([USER], "the chat has no assistant turn"),
        ([{"role": "system", "content": "s"}], "the chat has no assistant turn"),
        ([ASSISTANT, USER], "user and assistant do not alternate (assistant, user)"),
        ([USER, ASSISTANT, USER], "user and assistant do not alternate (user, assistant, user)"),
        ([USER, USER, ASSISTANT], "user and assistant do not alternate (user, user, assistant)"),
        ([{"role": "tool", "content": "x"}], "unknown role 'tool' in the chat"),
        ([USER, {"role": "assistant", "content": None}], "a turn of the chat has no text"),
    ],
)
def test_broken_chats_are_faults(chat: object, reason: str) -> None:
    examples, faults = examples_of([{"chat": chat}], Mapping("file", CHAT))

    assert examples == []
    assert faults.bad[0][0] == 1
    assert faults.bad[0][1].startswith(reason)


def test_empty_and_bad_records_are_told_apart_and_numbered() -> None:
    rows = [
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "a", "input": "", "output": "  "},
        {"instruction": "a", "input": ""},
        {"instruction": 7, "input": "", "output": "b"},
        {"instruction": "a", "input": ["x"], "output": "b"},
    ]

    examples, faults = examples_of(rows, Mapping("data.path=f", ColumnsConfig()))
    assert len(examples) == 1
    assert faults.empty == [(2, "column 'output' is empty"), (3, "column 'output' is missing")]
    assert faults.bad == [
        (4, "column 'instruction' is int, not text"),
        (5, "column 'input' is list, not text"),
    ]
    with pytest.raises(
        DataError,
        match=r"data\.path=f: 4 of 5 records cannot be used \(record 2: column 'output' is empty; "
        r".*leave them out with data\.on_bad_record=skip",
    ):
        refuse_faults("data.path=f", len(rows), faults)


def test_many_faults_are_named_in_part() -> None:
    faults = Faults(bad=[(i, "broken") for i in range(1, 21)])

    with pytest.raises(DataError, match="record 5: broken; and 15 more"):
        refuse_faults("f", 20, faults)


def test_missing_column_names_key_value_columns_and_the_closest() -> None:
    columns = ColumnsConfig(output="ouput")

    with pytest.raises(
        DataError,
        match=r"f: data\.columns\.output=ouput, but there is no such column; "
        r"did you mean data\.columns\.output=output\? \(columns: instruction, output\)",
    ):
        examples_of([{"instruction": "a", "output": "b"}], Mapping("f", columns))


def test_missing_instruction_in_a_chat_file_points_at_the_chat_column() -> None:
    with pytest.raises(DataError, match=r"for chats: data\.columns\.messages=conversations"):
        examples_of([{"conversations": []}], Mapping("f", ColumnsConfig()))


def test_default_input_column_may_be_absent_and_a_chosen_one_not() -> None:
    rows = [{"instruction": "a", "output": "b", "context": "c"}]
    mapping = Mapping("f", ColumnsConfig())

    examples, _ = examples_of(rows, mapping)
    assert examples[0].messages[0]["content"] == "a"
    assert unused_columns(Columns(rows), mapping, ("instruction", "input", "output")) == ["context"]
    with pytest.raises(DataError, match=r"data\.columns\.input=contxt.*input=context\?"):
        examples_of(rows, Mapping("f", ColumnsConfig(input="contxt")))


def test_label_client_and_choice() -> None:
    rows = [
        {"instruction": "a", "output": " Positive.", "desk": 3},
        {"instruction": "a", "output": "unsure", "desk": 4},
    ]
    label = AttributeColumn("output", "data.columns.label", required=True)
    client = AttributeColumn("desk", "partition.column", required=True)
    mapping = Mapping("f", ColumnsConfig(), "data.columns", label, client, ["negative", "positive"])

    examples, _ = examples_of(rows, mapping)
    assert [example[1:] for example in examples] == [(" Positive.", "3", 1), ("unsure", "4", -1)]


def test_record_without_client_is_a_fault_where_one_is_required() -> None:
    rows = [{"instruction": "a", "output": "b", "desk": value} for value in ("x", None)]
    required = AttributeColumn("desk", "partition.column", required=True)

    _, faults = examples_of(rows, Mapping("f", ColumnsConfig(), client=required))
    assert faults.bad == [(2, "no value in column 'desk' (partition.column)")]
    with pytest.raises(DataError, match=r"f: partition\.column=desks, .*column=desk\?"):
        examples_of(
            rows,
            Mapping("f", ColumnsConfig(), client=required.__class__("desks", required.key, True)),
        )


def test_half_a_surrogate_pair_is_a_fault() -> None:
    rows = [{"instruction": "a", "output": "smile \ud83d"}]

    _, faults = examples_of(rows, Mapping("f", ColumnsConfig()))
    assert faults.bad == [(1, "half of a surrogate pair, such as \\ud83d, in its text")]


def test_importing_the_data_package_loads_no_model_library() -> None:
    modules = (
        "choices, encode, federated, kinds, overlap, partition, record_files, records, "
        "remembered, sources, templates, token_cache"
    )
    code = (
        f"import sys; from fedllm_flwr.data import {modules}; "
        "print(sorted({'torch', 'transformers', 'datasets', 'flwr', 'hydra'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
