"""Exports: PEFT and transformers load them; a converter and the hub get what is meant for them."""

from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from fedllm_flwr.commands import main as cli
from fedllm_flwr.federation.tensor_files import load_params
from fedllm_flwr.models.adapted_model import load_beside
from fedllm_flwr.runs.kept_adapters import find_adapter
from tiny_runs import run_tiny

CONVERTER = """
import pathlib, sys
model, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
out.write_text(" ".join([*sorted(p.name for p in model.iterdir()), sys.argv[-1]]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds whose checkpoints are gone but for the newest."""
    asked = ("federation.num_rounds=3", "checkpoint.keep=1", "checkpoint.adapters=every:2")
    return run_tiny(tmp_path_factory.mktemp("runs") / "run", *asked).path


def test_rounds_that_are_kept_on_demand_are_exported(run: Path, tmp_path: Path) -> None:
    assert [file.name for file in (run / "kept-adapters").iterdir()] == ["round-00002.safetensors"]
    assert cli.main(["export", f"{run}@round=2", str(tmp_path / "out"), "--to", "peft"]) == 0
    kept = load_params(run / "kept-adapters" / "round-00002.safetensors")[0]["params"]
    exported = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name: value.tobytes() for name, value in exported.items()} == {
        name: value.tobytes() for name, value in kept.items()
    }
    assert "2 rounds" in (tmp_path / "out" / "README.md").read_text()
    base = load_beside(find_adapter(str(run)).config).peft.unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").state_dict()
    name, value = next(iter(kept.items()))
    found = loaded[name.replace(".weight", ".default.weight")].float().numpy()
    np.testing.assert_array_equal(found, value)


def test_the_final_adapter_is_copied(run: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--to", "peft"]) == 0
    for file in (run / "adapter").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_merged_model_and_what_is_made_of_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "convert.py"
    program.write_text(CONVERTER)
    to_gguf = ["--to", "gguf", "--converter", str(program), "--outtype", "q8_0"]
    assert cli.main(["export", str(run), str(tmp_path / "small"), *to_gguf]) == 0
    names = (tmp_path / "small" / "small.gguf").read_text().split()
    assert {"config.json", "model.safetensors", "README.md", "q8_0"} <= set(names)
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == ["README.md", "small.gguf"]

    program.write_text("import sys; sys.exit('unknown architecture')")
    assert cli.main(["export", str(run), str(tmp_path / "none"), *to_gguf]) == 1
    assert "has failed: unknown architecture" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert [p.name for p in tmp_path.glob(".*")] == []

    assert cli.main(["export", str(run), str(tmp_path / "model"), "--to", "merged"]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "PeftModel" not in card


def test_the_hub_gets_what_the_dry_run_lists(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = {}

    class Hub:
        def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
            sent.update(name=name, private=private)

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> str:
            sent["files"] = sorted(file.name for file in folder_path.iterdir())
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    command = ["export", str(run), "me/adapter", "--to", "hub"]
    assert cli.main([*command, "--dry-run"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0] == " "]
    assert sent == {}
    assert cli.main(command) == 0
    assert sent == {"name": "me/adapter", "private": True, "files": listed}
    assert "adapter_model.safetensors" in listed
