"""A run whose bundle brings code of its own: it does not run at the sites."""

import json
from pathlib import Path

import pytest

from deployments import running_federation
from processes import wait_for

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
clientapp = "brought.client:app"

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


def test_code_of_a_bundle_does_not_run_at_a_site(tmp_path: Path) -> None:
    """The installed app answers in its place: it finds no question of its own in the message."""
    marker, answers = tmp_path / "marker", tmp_path / "answers.json"
    app = tmp_path / "app"
    (app / "brought").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "brought" / "__init__.py").write_text("")
    (app / "brought" / "client.py").write_text(CLIENT.format(marker=str(marker)))
    (app / "brought" / "server.py").write_text(SERVER.format(answers=str(answers)))

    root = tmp_path / "federation"
    root.mkdir()
    with running_federation(root, {"ward": None}) as federation:
        assert wait_for(lambda: federation.nodes() == ["online"], 90)
        done = federation.run("flwr", "run", str(app), "federation", "--stream")
        assert wait_for(answers.exists, 150), done.stdout + done.stderr

    assert not marker.exists()
    [answer] = json.loads(answers.read_text())
    assert (answer["kind"], answer["client"]) == ("FederationError", "ward")
    assert not list((root / "ward" / "flwr").rglob("client.py"))
