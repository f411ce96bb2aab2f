"""lm-evaluation-harness' own command line on local tasks against ours, on the bare base model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm_flwr.commands.main import main
from fedllm_flwr.evaluation.suites.local_data import READERS

SHARED = Path(__file__).parents[3] / "shared/data"
MODEL, DATA = SHARED / "models/base7m", SHARED / "eval"
LIMIT = 60
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.is_dir(), reason="no shared data here"),
]
READING = "fedllm_flwr.evaluation.suites.tasks.reading"
TASKS = {
    "fpb": (
        'doc_to_text: "Instruction: {{instruction}}\\nInput: {{input}}\\nAnswer:"\n'
        "doc_to_choice: [negative, neutral, positive]\n"
        "doc_to_target: \"{{['negative', 'neutral', 'positive'].index(answer)}}\"\n"
    ),
    "crass": (
        f"doc_to_text: !function {READING}.crass_question\n"
        f"doc_to_choice: !function {READING}.crass_letters\n"
        "doc_to_target: gold\n"
    ),
}


def test_the_harness_command_gives_the_same_accuracies(tmp_path: Path) -> None:
    files = {"fpb": ("finance", "fpb_test.jsonl"), "crass": ("crass", "crass_43.json")}
    for name, asked in TASKS.items():
        reader, file = files[name]
        rows = READERS[reader]([DATA / file])["test"][:LIMIT]
        written = tmp_path / f"{name}.jsonl"
        written.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}_local\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {written}}}}}\n"
            f"output_type: multiple_choice\n{asked}metric_list: [{{metric: acc}}]\n"
        )
    command = [str(Path(sys.executable).parent / "lm_eval"), "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={MODEL},dtype=float32", "--device", "cpu"]
    command += ["--tasks", "fpb_local,crass_local", "--include_path", str(tmp_path)]
    subprocess.run([*command, "--output_path", str(tmp_path / "theirs")], check=True)
    [theirs] = (tmp_path / "theirs").rglob("results*.json")
    found = json.loads(theirs.read_text())["results"]

    ours = ["--task", "fpb,crass", "--data-root", str(DATA), "--limit", str(LIMIT)]
    ours += ["--prompt", "raw", "--no-cache", "--output", str(tmp_path / "ours")]
    assert main(["evaluate", "--base", str(MODEL), *ours]) == 0
    results = json.loads((tmp_path / "ours/results.json").read_text())["results"]
    for name in TASKS:
        [own] = [r for r in results if (r["task"], r["metric"]) == (name, "accuracy")]
        assert own["value"] == pytest.approx(found[f"{name}_local"]["acc,none"], abs=1e-12)
