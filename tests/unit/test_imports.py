"""What training imports, and what it leaves for those who use it."""

import subprocess
import sys

import pytest
import torch

from fedllm_flwr.environment import hidden
from fedllm_flwr.models.peft_library import compiled_when_called


def test_training_imports_neither_the_compiler_nor_datasets() -> None:
    code = """
import sys
from fedllm_flwr.tasks.sft.training import train_sft
print({"datasets", "pyarrow", "sklearn", "torch._inductor.lowering"} & {*sys.modules})
import datasets
from bitsandbytes.nn import Linear4bit
print(datasets.Dataset.__name__, Linear4bit.__name__)
"""
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert said.splitlines() == ["set()", "Dataset Linear4bit"]


def test_functions_are_compiled_at_their_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, object]] = []

    def compile_now(model: object, **settings: object) -> object:
        compiled.append(settings)
        return model

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiled_when_called():

        @torch.compile(mode="default")
        def plain(x: int) -> int:
            return x + 1

        shaped = torch.compile(lambda x: x + 2, dynamic=False)

    assert (compiled, plain.__name__) == ([], "plain")
    assert [plain(1), plain(2), shaped(1)] == [2, 3, 3]
    assert compiled == [{"mode": "default"}, {"dynamic": False}]


def test_hidden_packages_are_back_afterwards() -> None:
    with hidden("tabnanny", "json"):  # the second has been imported
        import json

        with pytest.raises(ImportError):
            import tabnanny
    assert json.dumps(1) == "1"
    import tabnanny

    assert tabnanny.__version__
