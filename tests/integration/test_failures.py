"""Clients and disks that fail: named, survived where that is possible, never hidden."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message

from fedllm_flwr.commands import main as cli
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import Update
from fedllm_flwr.federation.wire import pack_update, unpack_update
from tiny_runs import WrappedApp, outcome, records, resume, run_intercepted, run_tiny, tiny

EVERYONE = "federation.sample_clients=3"


def sending(change: str, only: str = "client-1") -> WrappedApp:
    """One client's updates are spoilt on their way: by NaN, or by a foreign tensor name."""

    def after(message: Message, context: Context, reply: Message) -> Message:
        mine = f"client-{context.node_config['partition-id']}" == only
        if message.metadata.message_type != "train" or not mine:
            return reply
        update = unpack_update(reply.content)
        delta = dict(update.delta)
        name = min(delta)
        if change == "nan":
            delta[name] = delta[name] + np.float32(np.nan)
        else:
            delta["foreign"] = delta.pop(name)
        spoilt = Update(delta, update.num_examples, update.metrics, update.contributed)
        return Message(pack_update(spoilt, "bfloat16"), reply_to=message)

    return WrappedApp(after=after)


@pytest.mark.parametrize(
    ("change", "reason"), [("nan", "is not finite|holds NaN"), ("name", "_proj.* is missing")]
)
def test_bad_update_is_refused_by_name_and_the_run_goes_on(
    change: str, reason: str, tmp_path: Path
) -> None:
    directory = run_intercepted(tmp_path / "run", sending(change), EVERYONE)
    for record in records(directory)[1:]:
        assert sorted(record["clients"]) == ["client-0", "client-2"]
        assert list(record["failures"]) == ["client-1"]
        assert np.isfinite(record["loss"])
    assert re.search(reason, records(directory)[1]["failures"]["client-1"])
    state = outcome(directory)
    for key, value in state.items():
        if key.startswith("checkpoints/"):
            assert np.isfinite(np.frombuffer(value[2], value[0])).all()


def test_client_that_raises_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    directory = run_intercepted(tmp_path / "run", _raising("client-2"), EVERYONE)
    for record in records(directory)[1:]:
        assert sorted(record["clients"]) == ["client-0", "client-1"]
        assert "disk on fire" in record["failures"]["client-2"]


def _raising(*names: str) -> WrappedApp:
    """The state of these clients cannot be opened: their own code raises while they train."""

    def before(message: Message, context: Context) -> None:
        mine = f"client-{context.node_id - 1}" in names
        if mine and message.metadata.message_type == "train":
            # The client reads its place as a number inside its own error handling.
            message.content["simulation"]["client"] = "no number: disk on fire"

    return WrappedApp(before)


def test_all_clients_fail(tmp_path: Path) -> None:
    clients = ("client-0", "client-1", "client-2")
    with pytest.raises(FederationError) as caught:
        run_intercepted(tmp_path / "run", _raising(*clients), EVERYONE)
    message = str(caught.value)
    assert message.startswith("round 1: 0 of 3 replies could be used, federation.min_replies=2. ")
    assert all(f"{name}: " in message for name in clients)
    assert message.endswith(
        f"(the start is saved; resume with: fedllm run resume={tmp_path / 'run'})"
    )
    assert "\n" not in message
    # Once the cause is mended the run goes on, as if nothing had been.
    assert outcome(resume(tmp_path / "run")) == outcome(run_tiny(tmp_path / "whole", EVERYONE))


def test_diverging_clients_end_the_command_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    overrides = tiny(
        "federation.engine=inprocess",
        "training.learning_rate=1e15",
        "training.max_grad_norm=0",
        "communication.dtype=float32",
        f"output_dir={run}",
    )
    assert cli.main(["run", "--quiet", *overrides]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: round 1: 0 of 2 replies could be used")
    assert "nan" in lines[0].lower()
    assert "start a new run with a lower training.learning_rate than 1e+15" in lines[0]
    assert "resume=" not in lines[0]  # it would diverge again


def test_too_few_replies_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"2 of 3 replies.*min_replies=3\. client-1"):
        run_intercepted(tmp_path / "run", sending("nan"), EVERYONE, "federation.min_replies=3")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a small tmpfs")
@pytest.mark.slow
def test_full_disk_keeps_the_checkpoints_before(tmp_path: Path) -> None:
    """A disk of 700 kB holds a few checkpoints; `checkpoint.keep` wants more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    fedllm = Path(sys.executable).with_name("fedllm")
    overrides = tiny(
        "federation.engine=inprocess",
        "federation.num_rounds=20",
        "training.max_steps=1",
        "checkpoint.keep=20",
        f"output_dir={disk}/run",
    )
    script = (
        f"mount -t tmpfs -o size=700k tmpfs {disk} && "
        '{ "$@"; echo "status $?"; '
        f"ls {disk}/run/checkpoints; cp -r {disk}/run {tmp_path}/kept; }}"
    )
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh"]
    done = subprocess.run(
        [*command, str(fedllm), "run", "--quiet", *overrides],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    if "status" not in done.stdout:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    status, *checkpoints = done.stdout.splitlines()
    assert status == "status 1"
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"error: cannot write {disk}/run/checkpoints/round-")
    assert os.strerror(errno.ENOSPC) in done.stderr
    last = int(checkpoints[-1].split("-")[1].split(".")[0])
    assert f"(round {last} is saved; resume with: fedllm run resume={disk}/run)" in done.stderr
    # On a disk with room the run goes on and ends as one that always had room.
    overrides = [text for text in overrides if not text.startswith("output_dir")]
    whole = run_tiny(tmp_path / "whole", *overrides)
    assert outcome(resume(tmp_path / "kept")) == outcome(whole)
