"""A run whose bundle brings code of its own: it does not run at the sites."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from deployments import Federation, make_site, running_federation
from fedllm_flwr.flower.names import is_http
from processes import command_line, free_ports, relatives, started, wait_for

pytestmark = pytest.mark.slow

PROJECT = """
[project]
name = "other"
version = "1.0.0"
description = "Brings its own code"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "somebody"

[tool.flwr.app.components]
serverapp = "brought.server:app"
clientapp = "{client_app}"

[tool.flwr.app.config]
"""
CLIENT = """
from pathlib import Path
Path({marker!r}).write_text("code of the bundle has run at the site")
from flwr.clientapp import ClientApp
app = ClientApp()
"""
SERVER = """
import json
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(messages, timeout=120))
    answers = [
        dict(reply.content.config_records["failure"]) if reply.has_content() else str(reply.error)
        for reply in replies
    ]
    Path({answers!r}).write_text(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A server and one site, started with the scripts of their directories."""
    root = tmp_path_factory.mktemp("federation")
    with running_federation(root, {"ward": None}) as running:
        assert wait_for(lambda: running.nodes() == ["online"], 180)
        yield running


def bundle(folder: Path, answers: Path, client_app: str = "brought.client:app") -> Path:
    """An app with code for the server, which asks all nodes, and code for the sites."""
    app = folder / "app"
    (app / "brought").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT.format(client_app=client_app))
    (app / "brought" / "__init__.py").write_text("")
    (app / "brought" / "client.py").write_text(CLIENT.format(marker=str(folder / "marker")))
    (app / "brought" / "server.py").write_text(SERVER.format(answers=str(answers)))
    return app


def answers_to(federation: Federation, folder: Path, client_app: str) -> list[Any]:
    """What the nodes answer to a run of such a bundle."""
    answers = folder / "answers.json"
    app = bundle(folder, answers, client_app)
    done = federation.run("flwr", "run", str(app), "federation", "--stream")
    assert wait_for(lambda: answers.exists() and answers.stat().st_size > 0, 180), (
        done.stdout + done.stderr
    )
    found: list[Any] = json.loads(answers.read_text())
    return found


def test_code_of_a_bundle_does_not_run_at_a_site(federation: Federation, tmp_path: Path) -> None:
    """The installed app answers in its place: it finds no question of its own in the message."""
    [answer] = answers_to(federation, tmp_path, "brought.client:app")

    assert not (tmp_path / "marker").exists()
    assert (answer["kind"], answer["client"]) == ("FederationError", "ward")
    assert not list((federation.folder.parent / "ward" / "flwr").rglob("client.py"))


def test_a_runs_token_is_on_no_command_line(federation: Federation, tmp_path: Path) -> None:
    """Neither at the server nor at the site, while both answer for a run."""
    seen: set[str] = set()
    answers = tmp_path / "answers.json"
    app = bundle(tmp_path, answers)
    submitted = federation.run("flwr", "run", str(app), "federation")
    assert submitted.returncode == 0, submitted.stderr

    def answered() -> bool:
        seen.update(map(command_line, relatives(federation.folder.parent)))
        return answers.exists()

    assert wait_for(answered, 180)
    apps = [line for line in seen if "--token" in line]
    for name in ("flwr-clientapp", "flwr-serverapp"):
        assert any(name in line for line in apps), seen
    assert [line for line in apps if "--token-file /proc/self/fd/" not in line] == []


OWN = "--clientappio-api-address"  # where a SuperNode's apps reach it
HTTP_CALLS = ("acquire-task", "pull-task-input", "pull-messages", "push-task-output")


@pytest.mark.skipif(not is_http(), reason="this SuperNode's apps reach it over gRPC")
def test_another_process_claims_no_message_of_a_site_over_http(federation: Federation) -> None:
    """A SuperNode listens on loopback, where every user of its machine can ask."""
    found = relatives(federation.folder.parent)
    [supernode] = [one for one in found if "programs flower-supernode" in command_line(one)]
    listening = [one.laddr.port for one in supernode.net_connections("inet") if not one.raddr]
    statuses = []
    for port in listening:
        for call in HTTP_CALLS:
            with suppress(httpx.HTTPError):  # the health server's port speaks gRPC
                url = f"http://127.0.0.1:{port}/v1/runtime/{call}"
                headers = {"content-type": "application/protobuf"}
                statuses.append(httpx.post(url, content=b"", headers=headers).status_code)
    assert statuses == [401] * len(HTTP_CALLS)


@pytest.mark.skipif(is_http(), reason="this SuperNode's apps reach it over HTTP")
@pytest.mark.parametrize("call", ["PullPendingTasks", "ClaimTask", "PullTaskInput", "PullMessage"])
def test_another_process_claims_no_message_of_a_site(federation: Federation, call: str) -> None:
    """A SuperNode listens on loopback, where every user of its machine can ask."""
    found = relatives(federation.folder.parent)
    [supernode] = [one for one in found if "programs flower-supernode" in command_line(one)]
    listening = [one.laddr.port for one in supernode.net_connections("inet") if not one.raddr]
    refused = []
    for port in listening:
        with (
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            channel.unary_unary(f"/flwr.proto.ClientAppIo/{call}")(b"", timeout=60)
        refused.append(caught.value.code())
    # One port is that of the health server, which knows no such call.
    assert sorted(code.name for code in refused) == ["UNAUTHENTICATED", "UNIMPLEMENTED"]


def test_an_unguarded_site_answers_only_with_trust(federation: Federation, tmp_path: Path) -> None:
    """Flower's own programs, which load the app that a bundle names: here the installed one.

    They speak HTTP with their server under Flower 1.42, its default.
    """
    ca = federation.folder / "ca.crt"
    site = make_site(tmp_path, "careless", federation.ports["fleet"], ca)
    key = site / "careless.pub"
    done = federation.run("fedllm", "server", "register", str(federation.folder), str(key))
    assert "Registered careless" in done.stdout, done.stderr
    port = federation.ports["control" if is_http() else "fleet"]
    command = ["flower-supernode", "--superlink", f"localhost:{port}"]
    command += ["--root-certificates", str(ca)]
    command += ["--auth-supernode-private-key", str(site / "careless.key")]
    own = ["--port", str(free_ports(1))] if is_http() else [OWN, "127.0.0.1:0"]
    command += [*own, "--node-config", "node.toml"]

    variables = {"FLWR_HOME": str(site / "flwr"), "no_proxy": "127.0.0.1,localhost"}
    for trusted in (False, True):
        if trusted:
            config = site / "node.toml"
            config.write_text("trust-server-code = true\n" + config.read_text())
        folder = tmp_path / f"run-{trusted}"
        folder.mkdir()
        with started(command, site, **variables) as supernode:
            assert wait_for(lambda: federation.nodes() == ["online", "online"], 180)
            found = answers_to(federation, folder, "fedllm_flwr.client.app:app")
            supernode.terminate()
            supernode.wait(timeout=180)
            for process in relatives(site):  # its SuperExec and trainer hold the pipes
                process.kill()
            said = "".join(supernode.communicate(timeout=60))
            assert wait_for(lambda: sorted(federation.nodes()) == ["offline", "online"], 180)
        assert all(isinstance(one, dict) for one in found), (found, said[-3000:])
        [answer] = [one for one in found if one["client"] == "careless"]
        if trusted:
            assert answer["kind"] == "FederationError"  # no question of its own in the message
            assert "trust-server-code=true: this SuperNode runs whatever code" in said
        else:
            assert answer["reason"] == "its operator has to start it with `fedllm site start`"
            assert "this SuperNode was started by Flower's own program" in said
