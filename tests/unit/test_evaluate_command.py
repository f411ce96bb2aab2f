"""The command on a small model and files made here, through the real harness."""

import csv
import json
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, f1_score
from torch.nn.modules.module import register_module_forward_pre_hook

from fedllm_flwr.commands.evaluate.arguments import evaluate_arguments
from fedllm_flwr.commands.evaluate.candidates import collect
from fedllm_flwr.commands.main import _parsed, main
from fedllm_flwr.config import Config
from fedllm_flwr.errors import ConfigError, DataError, ModelError
from fedllm_flwr.evaluation.suites.catalogue import all_suites, chosen_tasks
from fedllm_flwr.evaluation.suites.harness import HarnessTasks
from fedllm_flwr.evaluation.suites.options import RunOptions
from fedllm_flwr.evaluation.suites.suite_model import TextModel
from fedllm_flwr.models.adapted_model import load_model

LABELS = ("negative", "neutral", "positive")
ASKED = "Instruction: What is the sentiment of this news?\nInput: Profit of {}.\nAnswer: "


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    rows = [{"context": ASKED.format(i), "target": LABELS[i % 3]} for i in range(9)]
    (root / "fpb_test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return root


def run(*arguments: str) -> int:
    return evaluate_arguments(_parsed(["evaluate", *arguments]))


@pytest.fixture
def two_adapters(make_config: object, tmp_path: Path) -> list[Path]:
    """The same shape twice, one as it starts and one that answers otherwise."""
    import numpy as np

    model = load_model(make_config())  # type: ignore[operator]
    paths = []
    for name, scale in (("same", 0.0), ("other", 0.5)):
        rng = np.random.default_rng(2)
        changed = {
            key: value + scale * rng.normal(size=value.shape).astype("float32")
            for key, value in model.initial.items()
        }
        model.load(changed)
        model.peft.save_pretrained(str(tmp_path / name), save_embedding_layers=False)
        paths.append(tmp_path / name)
    return paths


def test_base_and_adapters_side_by_side_and_cached(
    two_adapters: list[Path], data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = [
        *("--adapter", *map(str, two_adapters)),
        *("--suite", "finance", "--data-root", str(data_root)),
        *("--output", str(output), "--cache", str(tmp_path / "cache")),
    ]
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    assert "left out: tfns" in shown
    for name in ("headline", "ner", "finred"):
        assert f"{name}_test.jsonl" in shown
    assert "finance, difference from base" in shown
    page = (output / "report.html").read_text()
    assert "finance, difference from base" in page
    assert 'id="examples-title"' in page
    for task in ("fpb", "fpb_generation"):
        assert f"<summary>{task}: " in page  # its examples
    assert "What is the sentiment of this news? Profit of 0." in page
    assert main(["report", str(output), "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == page
    capsys.readouterr()

    numbers = {
        (row["model"], row["task"], row["metric"]): row
        for row in csv.DictReader((output / "results.csv").open())
    }
    for model in ("base", "same", "other"):
        for task in ("fpb", "fpb_generation"):
            lines = (output / "predictions" / model / f"{task}.jsonl").read_text().splitlines()
            pairs = [json.loads(line)["prediction"] for line in lines]
            targets = [target for target, _ in pairs]
            guesses = [guess or "none" for _, guess in pairs]
            macro = f1_score(targets, guesses, labels=LABELS, average="macro", zero_division=0)
            found = float(numbers[model, task, "accuracy"]["value"])
            assert found == pytest.approx(accuracy_score(targets, guesses))
            assert float(numbers[model, task, "macro F1"]["value"]) == pytest.approx(macro)
        unparsable = float(numbers[model, "fpb_generation", "unparsable"]["value"])
        assert unparsable == sum(guess == "none" for guess in guesses) / len(guesses)
    assert unparsable > 0
    assert float(numbers["same", "fpb", "accuracy"]["vs_base"]) == 0
    about = json.loads((output / "results.json").read_text())
    first = about["first_prompts"]["fpb"]
    asked = "### Instruction:\nWhat is the sentiment of this news? Profit of 0. \n\n### Response:"
    assert first.endswith(asked)
    assert (output / "finance.png").stat().st_size > 5000

    before = (output / "results.csv").read_text()
    passes = []
    handle = register_module_forward_pre_hook(lambda module, _: passes.append(type(module)))
    try:
        assert run(*arguments) == 0
    finally:
        handle.remove()
    assert passes == []
    assert (output / "results.csv").read_text() == before


ROWS = {  # (instruction, input, output); of finred, one asks for something else
    "headline": [
        (f"Does it {('talk about price', 'compare gold')[i % 2]}?", f"gold up {i}", answer)
        for i, answer in enumerate(["Yes", "No", "No", "Yes", "Yes", "No"])
    ],
    "ner": [
        ("Extract.", "Bank lends to Ann .", "Bank is an organization, Ann is a person."),
        ("Extract.", "Ann signs .", "Ann is a person."),
    ],
    "finred": [
        ("Choose.", "Acme makes nails.", "industry"),
        ("Extract.", "Acme makes nails.", "brand: nails, Acme"),
    ],
}


def test_headlines_entities_and_relations(toy_model: Path, tmp_path: Path) -> None:
    for name, rows in ROWS.items():
        records = [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in rows]
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        (tmp_path / f"{name}_test.jsonl").write_text(lines)
    num_examples = {"headline": 6, "headline_generation": 6, "ner": 2, "finred": 1}
    output = tmp_path / "out"
    where = ("--data-root", str(tmp_path), "--output", str(output), "--no-cache")

    assert run("--base", str(toy_model), "--task", ",".join(num_examples), *where) == 0

    table = csv.DictReader((output / "results.csv").open())
    numbers = {(row["task"], row["metric"]): row for row in table}
    samples = {}
    for task, count in num_examples.items():
        lines = (output / "predictions" / "base" / f"{task}.jsonl").read_text()
        samples[task] = [json.loads(line) for line in lines.splitlines()]
        assert len(samples[task]) == count
        if task != "headline":
            unparsable = sum(sample["unparsable"] for sample in samples[task]) / count
            assert float(numbers[task, "unparsable"]["value"]) == unparsable > 0
    pairs = [sample["prediction"] for sample in samples["headline"]]
    assert [target for target, _ in pairs] == [row[2].lower() for row in ROWS["headline"]]
    accuracy = sum(target == answer for target, answer in pairs) / 6
    assert float(numbers["headline", "accuracy"]["value"]) == accuracy
    for key in (("ner", "F1"), ("finred", "triple F1"), ("headline", "mean F1 of questions")):
        low, value, high = (float(numbers[key][name]) for name in ("low", "value", "high"))
        assert 0 <= low <= value <= high <= 1


def test_what_cannot_be_evaluated(
    data_root: Path, toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["--base", str(toy_model)]
    local = ["--data-root", str(data_root)]
    with pytest.raises(ConfigError, match="give a model to evaluate: --run, --adapter"):
        run("--suite", "finance", *local)
    with pytest.raises(ConfigError, match=r"give --suite \(of "):
        run(*base)
    with pytest.raises(ConfigError, match="Did you mean 'medical'"):
        run(*base, "--suite", "medicla")
    with pytest.raises(DataError, match=r"gsm8k_test.jsonl is missing"):
        run(*base, "--task", "gsm8k", *local)
    with pytest.raises(DataError, match=r"no task can be scored; left out: gsm8k"):
        run(*base, "--suite", "math", *local)
    with pytest.raises(ConfigError, match="--limit must be > 0, got 0"):
        run(*base, "--task", "fpb", *local, "--limit", "0")
    with pytest.raises(ConfigError, match="--subset must be > 0, got 0"):
        run(*base, "--task", "fpb", *local, "--subset", "0")
    with pytest.raises(ConfigError, match=r"give --limit .* or --subset .*, not both"):
        run(*base, "--task", "fpb", *local, "--subset", "2", "--limit", "2")
    with pytest.raises(ConfigError, match=r"no adapter \(no adapter_config.json\)"):
        run("--adapter", str(tmp_path), "--task", "fpb", *local)
    with pytest.raises(ConfigError, match=r"no compare.json"):
        run("--compare", str(tmp_path), "--task", "fpb", *local)

    from importlib.metadata import PackageNotFoundError

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    with pytest.raises(ModelError, match=r"pip install 'fedllm-flwr\[eval\]'"):
        run(*base, "--task", "fpb", *local)


def test_adapters_of_two_bases_are_refused(two_adapters: list[Path], tmp_path: Path) -> None:
    file = two_adapters[1] / "adapter_config.json"
    saved = json.loads(file.read_text())
    from fedllm_flwr.models.tokenizer import EMBEDDED

    file.write_text(json.dumps({**saved, "base_model_name_or_path": str(EMBEDDED)}))
    with pytest.raises(ConfigError, match="has another base model"):
        collect([], [str(path) for path in two_adapters], None, None, None)


def test_adapter_of_another_base_is_refused(
    two_adapters: list[Path], data_root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="does not fit the base model"):
        run(
            *("--adapter", str(two_adapters[0]), "--base", "embedded", "--task", "fpb"),
            *("--data-root", str(data_root), "--no-cache", "--output", str(tmp_path / "out")),
        )


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--base", "embedded", "--suite", "finence"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --suite finence: no such suite. Did you mean 'finance'?")
    assert len(error.strip().splitlines()) == 1


def test_list_fits_a_screen_and_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--list"]) == 0
    shown = capsys.readouterr().out
    for suite in all_suites().values():
        assert all(task.name in shown for task in suite.tasks)
    assert len(shown.splitlines()) <= 24
    assert max(map(len, shown.splitlines())) <= 100


def test_list_of_a_suite_names_every_metric(capsys: pytest.CaptureFixture[str]) -> None:
    shown = ""
    for suite in all_suites():
        assert main(["evaluate", "--list", suite]) == 0
        shown += " ".join(capsys.readouterr().out.split())
    for text in (
        *("fpb_generation", "unparsable", "high school physics", "licence: MIT", "triple F1"),
        *("5 shots", "fpb_test.jsonl", "average of 3"),
    ):
        assert text in shown
    assert main(["evaluate", "--list", "finanz"]) == 2
    assert "Did you mean 'finance'?" in capsys.readouterr().err


def test_solved_examples_make_room_for_the_answer(make_config: object, tmp_path: Path) -> None:
    question = {"question": "How many? " * 4, "answer": "Some. #### 4"}
    (tmp_path / "gsm8k_test.jsonl").write_text(json.dumps(question) + "\n")
    model = TextModel(load_model(make_config()), prompt="raw")  # type: ignore[operator]
    [task] = chosen_tasks(["gsm8k"])

    found = HarnessTasks().run(task, model, RunOptions(data_root=tmp_path))

    num_tokens = len(model.adapted.tokenizer(found.first_prompt)["input_ids"])
    assert num_tokens <= model.max_length // 2
    assert model.examples_left_out > 0
    assert model.cut == 0


def test_central_evaluation_scores_suites(make_config: object, data_root: Path) -> None:
    from fedllm_flwr.evaluation.suites.during_training import central_suites

    config: Config = make_config(  # type: ignore[operator]
        evaluation={"suites": ["finance"], "suite_subset": 4, "data_root": str(data_root)}
    )
    suites = central_suites(config)
    assert suites is not None
    scores = suites.score(load_model(config))

    assert set(scores) >= {"finance/fpb/accuracy", "finance/fpb_generation/unparsable"}
    assert scores["finance/fpb/accuracy"] in (0, 0.25, 0.5, 0.75, 1)
    assert central_suites(make_config()) is None  # type: ignore[operator]
