"""What a site says of its failures: by kind, in words that quote none of its data or paths."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, RecordDict

from fedllm_flwr import __version__
from fedllm_flwr.client.requests import answer, failed
from fedllm_flwr.client.site import Site
from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import FederationConfig
from fedllm_flwr.data.client_data import data_identity
from fedllm_flwr.errors import ConfigError, DataError, FederationError, ModelError, RefusedError
from fedllm_flwr.federation.messages import Failure
from fedllm_flwr.federation.wire import pack_query, unpack_failure, unpack_info

CONFIG = Config(federation=FederationConfig(engine="deployment", num_clients=1))
RECORD = '{"instruction": "SECRET", "input": "", "output": "SECRET too"}\n'


@pytest.fixture
def asked(tmp_path: Path) -> Callable[[Path], Failure | None]:
    """Query a site whose data are in a file; its failure."""
    known = replace(CONFIG, data=replace(CONFIG.data, name="jsonl", labels=[]))

    def ask(data: Path) -> Failure | None:
        node = {"client-name": "ward", "data-path": str(data), "state-dir": str(tmp_path / "state")}
        site = Site(node, 1, 7)
        reply = answer("query", pack_query(known), site)
        if (failure := unpack_failure(reply)) is None:
            unpack_info(reply)
        return failure

    return ask


DATA = {
    "missing": (None, "its data file is missing"),
    "empty": ("", "its data file is empty"),
    "broken": (RECORD + '{"instruction": "SECRET"', "a line of its data file is broken"),
    "column": (
        '{"question": "SECRET", "output": "SECRET"}\n',
        "its data file lacks the column for data.columns.instruction",
    ),
    "values": ('{"instruction": 3, "output": "SECRET"}\n' + RECORD, "1 of its records cannot be"),
}


@pytest.mark.parametrize("case", DATA)
def test_wrong_data_are_described_and_not_quoted(
    case: str, asked: Callable[[Path], Failure | None], tmp_path: Path
) -> None:
    content, expected = DATA[case]
    data = tmp_path / "secret-name.jsonl"
    if content is not None:
        data.write_text(content)

    failure = asked(data)
    assert failure is not None
    assert (failure.client, failure.kind) == ("ward", "DataError")
    assert failure.reason.startswith(expected)
    assert failure.reason.endswith("; the site's log says more")
    assert "secret" not in failure.reason.lower()


def disk_error(number: int) -> Exception:
    try:
        try:
            raise OSError(number, os.strerror(number), "/secret/state")
        except OSError as error:
            raise FederationError("cannot write /secret/state: ...") from error
    except FederationError as error:
        return error


ERRORS = {
    "disk": (disk_error(errno.ENOSPC), "its disk is full (No space left on device); make room"),
    "rights": (disk_error(errno.EACCES), "it cannot use a file of its own (Permission denied); "),
    "unknown": (ValueError("SECRET"), "ValueError; the site's log says more"),
    "memory": (MemoryError("SECRET"), "out of memory; lower training.micro_batch_size"),
    "data": (DataError("SECRET"), "its data cannot be used; the site's log says more"),
    "made for the server": (RefusedError("it lacks 'control'"), "it lacks 'control'"),
    "a config error": (ConfigError("SECRET"), "ConfigError; the site's log says more"),
    "a model error": (ModelError("SECRET"), "ModelError; the site's log says more"),
    "a federation error": (FederationError("SECRET"), "FederationError; the site's log says more"),
    "half made": (ModelError("SECRET", "no such model"), "no such model; the site's log says more"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_leave_in_safe_words(case: str) -> None:
    error, expected = ERRORS[case]
    failure = unpack_failure(failed(error, Site({"client-name": "ward"}, 1, 7)))
    assert failure is not None
    assert failure.reason.startswith(expected)
    assert "secret" not in failure.reason.lower()


def test_server_of_another_version_is_refused_before_its_settings_are_read() -> None:
    """Its settings may be none that this version knows."""
    question = RecordDict({"query": ConfigRecord({"version": "9.9", "config": "{not even JSON"})})
    failure = unpack_failure(answer("query", question, Site({"client-name": "ward"}, 1, 7)))
    assert failure is not None
    assert failure.reason == (
        f"this site runs fedllm-flwr {__version__}, the server 9.9; install one version on both: "
        "pip install fedllm-flwr==9.9"
    )


def test_identity_is_that_of_the_content(tmp_path: Path) -> None:
    data = tmp_path / "notes.jsonl"
    config = replace(CONFIG, data=replace(CONFIG.data, path=str(data)))
    assert data_identity(config) == ""
    data.write_text(RECORD)
    first = data_identity(config)
    data.write_text(RECORD * 2)
    assert data_identity(config) not in ("", first)
    data.write_text(RECORD)
    os.utime(data, (1, 1))
    assert data_identity(config) == first
    folder = replace(CONFIG, data=replace(CONFIG.data, path=str(tmp_path)))
    before = data_identity(folder)
    (tmp_path / "more.jsonl").write_text(RECORD)
    assert data_identity(folder) != before
