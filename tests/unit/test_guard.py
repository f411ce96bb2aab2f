"""No code of a bundle runs at a site, and nothing is read that could hold code."""

import ast
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flwr.cli.install import install_from_fab

import fedllm_flwr
from fedllm_flwr.client_app import app
from fedllm_flwr.guard import confine

PACKAGE = Path(fedllm_flwr.__file__).parent
RUNTIME = "flwr.supernode.runtime.run_clientapp"

# Modules that execute what they read, and calls that can be told to.
EXECUTING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SAFE_ONLY_WITH = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "AutoTokenizer.from_pretrained": ("trust_remote_code", False),
    "AutoModelForCausalLM.from_pretrained": ("trust_remote_code", False),
}
FORBIDDEN = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"}


def trees() -> list[tuple[str, ast.Module]]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [(str(f.relative_to(PACKAGE)), ast.parse(f.read_text("utf-8"))) for f in files]


def dangers(tree: ast.AST) -> list[str]:
    """What in a module can execute data that it reads."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"imports {name}" for name in names if name.split(".")[0] in EXECUTING]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            needed = SAFE_ONLY_WITH.get(called)
            if needed and given.get(needed[0]) != str(needed[1]):
                found.append(f"{called} without {needed[0]}={needed[1]}")
            if called in FORBIDDEN:
                found.append(f"calls {called}")
            if given.get("shell") == "True" or given.get("trust_remote_code") == "True":
                found.append(f"{called} runs what it is given")
    return found


def test_nothing_executes_what_it_reads() -> None:
    assert {file: found for file, tree in trees() if (found := dangers(tree))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(path)",
        "eval(text)",
        "yaml.load(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_scan_sees(code: str) -> None:
    assert len(dangers(ast.parse(code))) == 1


def test_every_model_is_read_from_safetensors() -> None:
    """transformers would else fall back to a pickled pytorch_model.bin."""
    calls = [
        (file, {keyword.arg for keyword in node.keywords})
        for file, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and re.search(r"Model\w*\.from_pretrained$", ast.unparse(node.func))
        and not ast.unparse(node.func).startswith("PeftModel")
    ]
    assert calls
    assert [file for file, given in calls if "use_safetensors" not in given] == []


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Flower's module, as it is again after the test."""
    module = importlib.import_module(RUNTIME)
    for name in ("install_from_fab", "get_load_client_app_fn"):
        monkeypatch.setattr(module, name, getattr(module, name))
    return module


def test_the_installed_app_answers_for_any_bundle(runtime: Any, tmp_path: Path) -> None:
    assert runtime.install_from_fab is install_from_fab
    confine(runtime)

    assert runtime.install_from_fab(b"no bundle at all", skip_prompt=True) is None
    load = runtime.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    assert load("somebody/else", "9.9.9", "hash") is app


def test_another_flower_is_refused() -> None:
    with pytest.raises(SystemExit) as caught:
        confine(ModuleType("flwr.new"))
    assert "code of a server cannot be kept away" in str(caught.value)
