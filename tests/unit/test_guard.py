"""No code of a bundle runs at a site, and nothing is read that could hold code."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.cli.install import install_from_fab

import fedllm_flwr
from fedllm_flwr.client.app import app
from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import FederationConfig
from fedllm_flwr.deployment.programs import confine, hide_tokens, is_confined, require_secret
from fedllm_flwr.federation.wire import pack_query, unpack_failure
from processes import wait_for

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
    assert not is_confined()
    confine(runtime)

    assert is_confined()
    assert runtime.install_from_fab(b"no bundle at all", skip_prompt=True) is None
    load = runtime.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    assert load("somebody/else", "9.9.9", "hash") is app


def test_another_flower_is_refused() -> None:
    with pytest.raises(SystemExit) as caught:
        confine(ModuleType("flwr.new"))
    assert "code of a server cannot be kept away" in str(caught.value)


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Flower's module that starts apps, as it is again after the test."""
    module = importlib.import_module("flwr.supercore.superexec.executor.subprocess_executor")
    monkeypatch.setattr(module, "subprocess", subprocess)
    monkeypatch.setattr(module, "TASK_TYPE_TO_COMMAND", {"app": sys.executable})
    monkeypatch.setattr(module, "TASK_TYPE_TO_APPIO_API_ADDRESS_ARG", {"app": "-c"})
    return module


APP = """
import argparse, pathlib, sys
from flwr.common.args import add_args_flwr_app_common, try_obtain_flwr_app_token
parser = argparse.ArgumentParser()
add_args_flwr_app_common(parser)
line = pathlib.Path("/proc/self/cmdline").read_bytes().split(b"\\0")[3:]
token = try_obtain_flwr_app_token(parser.parse_args())
pathlib.Path({answer!r}).write_text(repr((token, token.encode() in b" ".join(line))))
"""


@pytest.mark.parametrize("hidden", [False, True])
def test_a_runs_token_is_on_no_command_line(executor: Any, tmp_path: Path, hidden: bool) -> None:
    """Flower's executor starts an app that reads its token as Flower's apps do."""
    if hidden:
        hide_tokens(executor)
    answer = tmp_path / "answer"
    spec = SimpleNamespace(
        task_type="app",
        appio_api_address=APP.format(answer=str(answer)),
        runtime_api_address=APP.format(answer=str(answer)),
        token="secret-of-the-run",
        insecure=True,
        root_certificates_path=None,
        parent_pid=None,
        runtime_dependency_install=False,
        suppress_output=False,
    )
    executor.SubprocessExecutor().launch(spec)

    assert wait_for(lambda: answer.exists() and answer.read_text() != "", 60)
    assert answer.read_text() == repr(("secret-of-the-run", not hidden))


def test_an_executor_of_another_kind_is_refused() -> None:
    with pytest.raises(SystemExit) as caught:
        hide_tokens(ModuleType("flwr.new"))
    assert "token cannot be kept off command lines" in str(caught.value)
    with pytest.raises(SystemExit) as caught:
        require_secret(ModuleType("flwr.new"))
    assert "other users of this machine cannot be kept from a site's messages" in str(caught.value)


@pytest.mark.parametrize(
    ("node_config", "said"),
    [
        ({}, "its operator has to start it with `fedllm site start`"),
        ({"trust-server-code": "true"}, "its operator has to start it with `fedllm site start`"),
        ({"trust-server-code": True}, "data-path"),  # goes on, to what else is missing
    ],
)
def test_an_unguarded_site_answers_only_if_its_operator_trusts_the_server(
    node_config: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Loaded by Flower's own program the app cannot know what else a bundle holds."""
    node_config = {"client-name": "ward", "resident": False, **node_config}
    context = Context(1, 2, node_config, RecordDict(), {})
    federation = FederationConfig(engine="deployment", num_clients=1)
    question = pack_query(Config(federation=federation))
    message = Message(question, 2, "query")
    message.metadata.__dict__["_message_id"] = "1"
    with caplog.at_level("WARNING"):
        failure = unpack_failure(app(message, context).content)

    assert failure is not None
    assert said in failure.reason + caplog.text
    assert "trust-server-code" in caplog.text
