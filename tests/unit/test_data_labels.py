"""Label sets that do not fit the records."""

import pytest

from fedllm_flwr.config.schema import DataConfig
from fedllm_flwr.data.sources import Records
from fedllm_flwr.errors import DataError
from fedllm_flwr.tasks.sft.labels import require_scored, unseen_labels
from fedllm_flwr.tasks.sft.records import Example

LABELS = DataConfig(labels=["good", "bad", "ugly"])


def records(*answers: str) -> Records:
    labels = LABELS.labels
    return Records.of(
        [
            Example(
                [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}],
                "",
                "",
                labels.index(answer) if answer in labels else -1,
            )
            for answer in answers
        ],
        "",
    )


def test_labels_that_no_record_has_are_named() -> None:
    assert unseen_labels(LABELS, records("good", "ugly"), records("bad")) == []
    assert unseen_labels(LABELS, records("good", "good", "fine"), records("good")) == [
        "data.labels: no record has the answer bad, ugly (answers are: good, fine)"
    ]
    assert unseen_labels(DataConfig(), records("good")) == []


def test_held_out_records_that_cannot_be_scored_are_refused() -> None:
    require_scored(LABELS, records("good", "fine"))
    require_scored(DataConfig(), records("fine"))
    with pytest.raises(DataError) as caught:
        require_scored(LABELS, records("one", "two", "three\nlines", "four"))
    assert str(caught.value) == (
        "data.labels=[good,bad,ugly]: no held-out record has one of them as its answer (answers "
        "are: one, two, three\\nlines, ...); give the answers that occur, or data.labels=[] for "
        "records without classes"
    )
