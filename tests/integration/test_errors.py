"""Mistakes at the command line: status 2, one line that says what to do, before any training.

``docs/errors.md`` shows each with its message. After a change of wording:
``FEDLLM_WRITE_DOCS=1 pytest tests/integration/test_errors.py``.
"""

import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedllm_flwr import cli
from fedllm_flwr.config.schema import ModelConfig
from fedllm_flwr.training.tokenizer import model_source
from tiny_runs import run_tiny, tiny

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
BASE = tiny("federation.engine=inprocess")


@dataclass(frozen=True)
class Mistake:
    """What went wrong, the overrides that the user typed, and a part of what they read."""

    what: str
    overrides: str
    says: str


DATA = "data=jsonl data.path="
PAIRS = "task=dpo data=preferences data.path="
MISTAKES = [
    Mistake("misspelt key", "training.learning_rat=1e-4", "Did you mean 'training.learning_rate'"),
    Mistake("misspelt choice", "algorithm=scafold", "Did you mean 'scaffold'"),
    Mistake("wrong type", "federation.num_rounds=many", "federation.num_rounds"),
    Mistake("learning rate of zero", "training.learning_rate=0", "must be > 0, got 0"),
    Mistake("unknown dtype", "training.dtype=float8", "training.dtype=float8"),
    Mistake("two quantizations", "quantization=int8 quantization=nf4", "keep one"),
    Mistake(
        "more sampled than there are clients",
        "federation.num_clients=3 federation.sample_clients=4",
        "sample at most all of them",
    ),
    Mistake("more clients than records", "federation.num_clients=101", "the 100 training records"),
    Mistake("missing file", f"{DATA}note.jsonl", "Did you mean 'notes.jsonl'"),
    Mistake("empty file", f"{DATA}empty.jsonl", "empty.jsonl"),
    Mistake("line that is no JSON", f"{DATA}broken.jsonl", "broken.jsonl, line 3"),
    Mistake(
        "records that are all too long",
        "training.max_length=16",
        "training.max_length=16 with data.truncation=right leaves no example of any client",
    ),
    Mistake(
        "labels of other records",
        f"{DATA}notes.jsonl data.labels=[good,bad]",
        "data.labels=[good,bad]: no held-out record has one of them as its answer",
    ),
    Mistake("missing column", f"{DATA}notes.jsonl data.columns.output=reply", "columns: input"),
    Mistake(
        "missing column to divide by",
        f"{DATA}notes.jsonl partition=natural partition.column=ward",
        "partition.column=ward",
    ),
    Mistake("model that is nowhere", "model=custom model.path=./modle", "'model'"),
    Mistake("directory that is no model", "model=custom model.path=./folder", "config.json"),
    Mistake("hub model without a network", "model=llama3_2_1b", "model.path="),
    Mistake("tokenizer without end token", "model=custom model.path=./no_eos", "eos_token"),
    Mistake("no layer of that name", "lora.target_modules=[c_attn]", "c_attn matches no layer"),
    Mistake("no such device", "training.device=cuda", "training.device=cuda"),
    Mistake("share of a GPU without one", "federation.client_gpus=0.5", "federation.client_gpus=0"),
    Mistake(
        "Ray cluster that is not there",
        "federation.engine=ray federation.ray_address=127.0.0.1:1",
        "federation.ray_address=127.0.0.1:1: no Ray cluster answers there",
    ),
    Mistake("adapter of another shape", "init_adapter=finished/adapter lora.r=4", "lora.r"),
    Mistake("init_adapter that is none", "init_adapter=folder", "adapter_config.json"),
    Mistake("directory of another run", "output_dir=finished", "resume=finished"),
    Mistake("directory that cannot be", "output_dir=notes.jsonl/run", "Give another"),
    Mistake("going on with nothing", "resume=folder", "holds no run"),
    Mistake("going on with another option", "resume=finished lora.r=4", "lora.r=4: the run in"),
    Mistake("tracker that is not installed", "tracking.wandb=true", "wandb"),
    Mistake(
        "minimal learning rate above the first",
        "training.min_learning_rate=0.1",
        "training.min_learning_rate=0.1 is above training.learning_rate=0.005; lower it",
    ),
    Mistake("pairs without a column", f"{PAIRS}one_sided.jsonl", "data.columns.rejected=rejected"),
    Mistake("instructions for DPO", f"{PAIRS}notes.jsonl", "not preference pairs; use task=sft"),
    Mistake("pairs for SFT", f"{DATA}pairs.jsonl", "not instructions; use task=dpo"),
    Mistake("pairs without a difference", f"{PAIRS}equal.jsonl", "chosen equals rejected in all"),
    Mistake("misspelt loss", "task=dpo dpo.loss_type=sigmod", "Did you mean 'sigmoid'"),
    Mistake(
        "label smoothing that nothing uses",
        "task=dpo dpo.label_smoothing=0.1",
        "no effect on dpo.loss_type=sigmoid; use one of robust",
    ),
    Mistake("packing of pairs", "task=dpo training.packing=true", "works with task=sft only"),
    Mistake(
        "reference that is no adapter",
        "task=dpo dpo.reference_adapter=folder",
        "dpo.reference_adapter=folder: no adapter_config.json",
    ),
    Mistake(
        "reference of another shape",
        "task=dpo dpo.reference_adapter=finished/adapter lora.r=4",
        "lora.r",
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory, with what the mistakes are about."""
    place = tmp_path_factory.mktemp("place")
    notes = [{"instruction": f"Say {i}.", "input": "", "answer": f"{i}"} for i in range(12)]
    lines = [json.dumps(note) for note in notes]
    (place / "notes.jsonl").write_text("\n".join(lines).replace("answer", "output"))
    (place / "empty.jsonl").write_text("")
    (place / "broken.jsonl").write_text("\n".join([*lines[:2], lines[2][:-5], *lines[3:]]))
    for file, answers in {
        "pairs": {"chosen": "Yes, {}.", "rejected": "No {}"},
        "one_sided": {"chosen": "Yes, {}."},
        "equal": {"chosen": "{}", "rejected": "{}"},
    }.items():
        pairs = [
            {"prompt": f"Is it {i}?"} | {side: text.format(i) for side, text in answers.items()}
            for i in range(12)
        ]
        (place / f"{file}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (place / "folder").mkdir()
    source = Path(model_source(ModelConfig()))
    shutil.copytree(source, place / "model")
    for missing in ("eos", "pad"):
        folder = place / f"no_{missing}"
        shutil.copytree(source, folder)
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / file).is_file():
                settings = json.loads((folder / file).read_text())
                settings.pop(f"{missing}_token", None)
                (folder / file).write_text(json.dumps(settings))
    run_tiny(place / "finished")
    return place


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    # As on a machine where it is not installed; finders look here before they search.
    monkeypatch.setitem(sys.modules, "wandb", None)
    return place


def message_of(mistake: Mistake, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Status and standard error of ``fedllm run`` with the mistake in it."""
    typed = shlex.split(mistake.overrides)
    given = {text.partition("=")[0] for text in typed}
    fitting = [text for text in BASE if text.partition("=")[0] not in given]
    if "resume" in given:
        fitting = []
    status = cli.main(["run", "--quiet", *fitting, *typed])
    return status, capsys.readouterr().err


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_mistake_costs_one_line(
    mistake: Mistake, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, shown = message_of(mistake, capsys)
    assert status == 2
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1, shown
    assert "Traceback" not in shown
    assert mistake.says in shown
    assert not (inside / "outputs").exists()  # no half-made run is left


def test_tokenizer_without_pad_token_works(inside: Path, tmp_path: Path) -> None:
    """Nothing is wrong with it: padding is masked, any token serves."""
    directory = run_tiny(tmp_path / "run", "model=custom", "model.path=./no_pad", "training=tiny")
    assert directory.adapter.is_dir()


def test_page_is_true(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(mistake, message_of(mistake, capsys)[1]) for mistake in MISTAKES]
    page = _page([(mistake, _portable(shown, inside)) for mistake, shown in rows])
    if os.environ.get("FEDLLM_WRITE_DOCS"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page


def _portable(shown: str, place: Path) -> str:
    """Without what differs between machines: the directory, and the numbers of one data set."""
    return re.sub(re.escape(str(place)) + "/?", "", shown.strip())


def _page(rows: list[tuple[Mistake, str]]) -> str:
    intro = (
        "# Mistakes and their messages\n\n"
        "Every mistake ends `fedllm` with status 2 and one line on standard error, before any "
        "training; under\n`flwr run` the same line is in the log. Each of these is run by "
        "`tests/integration/test_errors.py`,\nwhich also writes this page.\n\n"
        "| what is wrong | `fedllm run ...` | message |\n|---|---|---|\n"
    )
    lines = [
        f"| {mistake.what} | `{mistake.overrides}` | {shown.replace('|', chr(92) + '|')} |"
        for mistake, shown in rows
    ]
    return intro + "\n".join(lines) + "\n"
