"""What a site's data are: one set or several by name, read as its operator says, checked by eye."""

import gzip
import json
import os
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from fedllm_flwr.client.requests import answer
from fedllm_flwr.client.site import Site
from fedllm_flwr.commands import main as cli
from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.schema import DataConfig, FederationConfig
from fedllm_flwr.deployment.datasets import named_columns, named_paths, site_datasets
from fedllm_flwr.deployment.node import check_gpus, choose_gpus, node_config
from fedllm_flwr.deployment.site_check import check_site
from fedllm_flwr.deployment.site_directory import SiteOptions, init_site
from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.federation.messages import ClientInfo, Failure
from fedllm_flwr.federation.wire import pack_query, unpack_failure, unpack_info

CONFIG = Config(federation=FederationConfig(engine="deployment", num_clients=1))
HH = Path(__file__).parents[3] / "shared" / "data" / "dpo" / "hh_rlhf_helpful_base.jsonl.gz"
PAIR = {
    "chosen": "\n\nHuman: Why?\n\nAssistant: Because it is so.",
    "rejected": "\n\nHuman: Why?\n\nAssistant: No idea.",
}


def write(file: Path, rows: list[dict[str, object]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def notes(tmp_path: Path) -> str:
    rows = [
        {"question": f"Why {i}?", "context": "A ward.", "answer": "yes" if i % 4 else "no", "id": i}
        for i in range(100)
    ]
    return write(tmp_path / "notes.jsonl", rows)


@pytest.fixture
def trials(tmp_path: Path) -> str:
    rows = [{"instruction": f"What {i}?", "output": "That."} for i in range(70)]
    return write(tmp_path / "trials.jsonl", rows)


COLUMNS = ["instruction=question", "output=answer"]


def options(data: str | list[str], **more: object) -> SiteOptions:
    values = {"device": "cpu", "insecure": True, "approval": "automatic", **more}
    return SiteOptions("ward", data, "localhost:9092", **values)  # type: ignore[arg-type]


def asked(folder: Path, dataset: str | None, run_id: int = 1) -> ClientInfo | Failure:
    config = changed(CONFIG, data={"site_dataset": dataset})
    reply = answer("query", pack_query(config), Site(node_config(folder), run_id, 7))
    return unpack_failure(reply) or unpack_info(reply)


def test_init_names_columns_that_no_role_is_mapped_to(tmp_path: Path, notes: str) -> None:
    lines = init_site(tmp_path / "site", options(notes, columns=COLUMNS))
    [line] = [line for line in lines if "NOT USED" in line]
    assert "context, id: no role is mapped" in line

    mapped = [*COLUMNS, "input=context"]
    lines = init_site(tmp_path / "mapped", options(notes, columns=mapped))
    [line] = [line for line in lines if "NOT USED" in line]
    assert "NOT USED   id:" in line


def test_server_asks_for_a_data_set_by_name(tmp_path: Path, notes: str, trials: str) -> None:
    columns = [f"notes.{column}" for column in COLUMNS]
    data = [f"notes={notes}", f"trials={trials}"]
    init_site(tmp_path / "site", options(data, columns=columns))

    read = tomllib.loads((tmp_path / "site" / "node.toml").read_text())
    assert read["datasets"]["notes"]["columns"]["instruction"] == "question"
    assert read["datasets"]["trials"]["columns"]["instruction"] == "instruction"
    for run_id, (name, size) in enumerate({"notes": 100, "trials": 70}.items(), 1):
        info = asked(tmp_path / "site", name, run_id)
        assert isinstance(info, ClientInfo)
        assert info.num_examples == size
    for run_id, name in ((3, None), (4, "other"), (5, "../etc")):
        failure = asked(tmp_path / "site", name, run_id)
        assert isinstance(failure, Failure)
        assert "data.site_dataset" in failure.reason
        assert "trials" not in failure.reason


def test_policy_restricts_data_sets(tmp_path: Path, notes: str, trials: str) -> None:
    columns = [f"notes.{column}" for column in COLUMNS]
    given = options(
        [f"notes={notes}", f"trials={trials}"], columns=columns, policy=["datasets=[trials]"]
    )
    init_site(tmp_path / "site", given)

    assert isinstance(asked(tmp_path / "site", "trials", 1), ClientInfo)
    failure = asked(tmp_path / "site", "notes", 2)
    assert isinstance(failure, Failure)
    assert "the site refuses data.site_dataset=notes" in failure.reason


def test_only_data_set_of_a_site_needs_no_name(tmp_path: Path, trials: str) -> None:
    init_site(tmp_path / "site", options(trials))
    init_site(tmp_path / "named", options(f"trials={trials}"))

    assert isinstance(asked(tmp_path / "site", None), ClientInfo)
    assert isinstance(asked(tmp_path / "named", None), ClientInfo)
    assert isinstance(asked(tmp_path / "named", "trials", 2), ClientInfo)
    assert isinstance(asked(tmp_path / "site", "trials", 2), Failure)


def test_options_of_several_data_sets(tmp_path: Path) -> None:
    assert named_paths(["/data/a=b.jsonl"]) == {"": "/data/a=b.jsonl"}
    there = tmp_path / "a=b"
    there.write_text("")
    assert named_paths([str(there)]) == {"": str(there)}
    assert named_paths(["a=/x", "b=/y=z"]) == {"a": "/x", "b": "/y=z"}
    with pytest.raises(ConfigError, match="each needs a name"):
        named_paths(["a=/x", "/y"])
    with pytest.raises(ConfigError, match="given twice"):
        named_paths(["a=/x", "a=/y"])
    assert named_columns(["a.output=x", "input=y.z"], ["a", "b"]) == {
        "a": ["output=x", "input=y.z"],
        "b": ["input=y.z"],
    }
    with pytest.raises(ConfigError, match="beside"):
        site_datasets({"data-path": "x", "datasets.a.data-path": "y"})


@pytest.mark.parametrize("source", ["made here", "Anthropic's"])
def test_transcripts_convert_at_init(source: str, tmp_path: Path) -> None:
    if source == "made here":
        data = write(tmp_path / "hh.jsonl", [PAIR] * 70)
    elif HH.exists():
        with gzip.open(HH, "rt") as file:
            rows = [json.loads(line) for line in file.readlines()[:200]]
        data = write(tmp_path / "hh.jsonl", rows)
    else:
        pytest.skip("the real data are not here")

    with pytest.raises(DataError, match="--preprocessing hh_rlhf"):
        init_site(tmp_path / "site", options(data))
    lines = init_site(tmp_path / "site", options(data, preprocessing="hh_rlhf"))
    assert any("usable for task=dpo" in line for line in lines)

    config = changed(CONFIG, task={"name": "dpo"}, data={"preprocessing": "none"})
    site = Site(node_config(tmp_path / "site"), 1, 7)
    info = unpack_info(answer("query", pack_query(config), site))
    assert info.num_examples >= 70
    rendered = "\n".join(check_site(tmp_path / "site"))
    assert "Human:" not in rendered
    assert "--- record 1 chosen" in rendered


def test_check_says_what_will_be_learned(tmp_path: Path, notes: str) -> None:
    lines = "\n".join(check_site(made(tmp_path, notes, [*COLUMNS, "input=context"]), max_length=16))

    assert "sft       100 of 100 records usable" in lines
    assert "used: instruction=question, input=context, output=answer" in lines
    assert "NOT used: id" in lines
    assert "answers   yes       75  75%" in lines
    assert "no        25  25%" in lines
    assert "100 of 100 are longer than 16 and would be cut" in lines
    assert lines.count("--- record") == 5
    assert "Why 0? A ward. " in lines
    assert "[[ no" in lines
    assert "records behind one step, at least: 8" in lines
    assert "models: embedded" in lines


def made(tmp_path: Path, data: str, columns: list[str]) -> Path:
    init_site(tmp_path / "site", options(data, columns=columns))
    return tmp_path / "site"


def test_check_reads_the_data_anew(
    tmp_path: Path, notes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    site = made(tmp_path, notes, COLUMNS)
    Path(notes).write_text('{"question": "Why?"}\n')
    assert cli.main(["site", "check", str(site)]) == 2
    assert "answer" in capsys.readouterr().err


def test_gpus_of_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    choose_gpus({})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    choose_gpus({"gpus": "0,1"})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    choose_gpus({"gpus": 2})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    for wrong in ("all", "0;1", "", "-1"):
        with pytest.raises(ConfigError, match="numbers of GPUs"):
            check_gpus(wrong)


def test_threads_and_gpus_are_written(tmp_path: Path, trials: str) -> None:
    init_site(tmp_path / "site", options(trials, threads=3, gpus="0,1"))
    node = node_config(tmp_path / "site")

    assert (node["threads"], node["gpus"]) == (3, "0,1")
    for wrong in ({"threads": 0}, {"gpus": "all"}, {"preprocessing": "alpacca"}):
        with pytest.raises(ConfigError):
            init_site(tmp_path / "other", options(trials, **wrong))


def test_server_cannot_choose_how_records_are_read(tmp_path: Path, trials: str) -> None:
    [dataset] = site_datasets({"data-path": trials}).values()
    assert replace(dataset.config(name="x"), name="demo") == DataConfig(path=trials)
