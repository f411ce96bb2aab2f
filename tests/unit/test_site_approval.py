"""A site waits for its operator, and notes in its audit log what it was asked and what left."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict

from deployments import SMALL
from fedllm_flwr.client.disclosure import audited
from fedllm_flwr.client.requests import answer
from fedllm_flwr.client.site import Site
from fedllm_flwr.commands import main as cli
from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import FederationConfig
from fedllm_flwr.deployment.approval import Requests
from fedllm_flwr.deployment.audit import AuditLog, Entry
from fedllm_flwr.deployment.node import node_config, site_folder
from fedllm_flwr.deployment.policy import read_policy
from fedllm_flwr.deployment.site_directory import SiteOptions, init_site
from fedllm_flwr.errors import ApprovalPending, ConfigError
from fedllm_flwr.federation.messages import Assignment, ClientInfo, Failure, Update
from fedllm_flwr.federation.wire import (
    pack_assignment,
    pack_info,
    pack_query,
    pack_update,
    unpack_failure,
    unpack_info,
)

CONFIG = Config(federation=FederationConfig(engine="deployment", num_clients=1))
OTHER = replace(CONFIG, lora=replace(CONFIG.lora, r=16))
Ask = Callable[..., Failure | None]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site's directory, whose policy lets every run wait."""
    data = tmp_path / "notes.jsonl"
    data.write_text('{"instruction": "Why?", "output": "Because."}\n' * 40)
    options = SiteOptions(
        "ward", str(data), "fl.example.org:9092", device="cpu", insecure=True, policy=SMALL
    )
    init_site(tmp_path / "site", options)
    return tmp_path / "site"


@pytest.fixture
def ask(site: Path) -> Ask:
    """Query the site as its ClientApp does; its failure."""

    def query(config: Config = CONFIG, run_id: int = 11) -> Failure | None:
        node = Site(node_config(site), run_id, 7)
        question, started = pack_query(config), time.monotonic()
        reply = audited("query", question, answer("query", question, node), node, started)
        if (failure := unpack_failure(reply)) is None:
            assert unpack_info(reply).num_examples == 40
        return failure

    return query


def entries(site: Path) -> list[Entry]:
    report = AuditLog(site / "audit").read()
    assert report.problems == []
    return report.entries


def rule(site: Path, name: str) -> None:
    file = site / "policy.yaml"
    file.write_text(file.read_text().replace("approval: every-run", f"approval: {name}"))


def test_run_waits_until_its_operator_approves(
    site: Path, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    pending = Failure("ApprovalPending", "waiting for approval at ward", "ward")
    assert ask() == pending
    assert ask() == pending
    [request] = Requests(site / "requests").all()

    assert cli.main(["site", "requests", str(site)]) == 0
    shown = capsys.readouterr().out
    assert f"{request.id}  run 11 from fl.example.org:9092   waiting since" in shown
    assert "fedavg, sft, embedded, 12 rounds x 10 steps of 16 records" in shown
    assert "LoRA of rank 8 on auto" in shown
    assert cli.main(["site", "approve", str(site), request.id[:4]]) == 0
    assert "Approved run 11: fedavg, sft, embedded" in capsys.readouterr().out

    assert ask() is None
    assert [entry["verdict"] for entry in entries(site)] == ["waiting", "approved", "answered"]
    assert entries(site)[1]["by"]
    cli.main(["site", "requests", str(site)])
    assert "No request waits. --all shows" in capsys.readouterr().out


def test_approval_is_of_these_settings_and_this_run(site: Path, ask: Ask) -> None:
    ask()
    cli.main(["site", "approve", str(site), "11"])
    assert ask() is None

    for config, run_id in ((OTHER, 11), (CONFIG, 12)):
        failure = ask(config, run_id)
        assert failure is not None
        assert failure.kind == "ApprovalPending"
    decisions = {(r.run, r.digest): r.decision for r in Requests(site / "requests").all()}
    assert sorted(decisions.values()) == ["", "", "approved"]


def test_settings_that_change_between_look_and_decision_are_not_approved(
    site: Path, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's id names no request any more once the run has asked for two things."""
    ask()
    ask(OTHER)

    assert cli.main(["site", "approve", str(site), "11"]) == 2
    assert "several requests" in capsys.readouterr().err
    assert all(request.is_waiting for request in Requests(site / "requests").all())


def test_what_changed_since_the_last_approval_is_shown(
    site: Path, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    ask()
    cli.main(["site", "approve", str(site), "11"])
    ask(OTHER, 12)
    capsys.readouterr()

    cli.main(["site", "requests", str(site)])
    assert "    lora.r: 8 -> 16\n" in capsys.readouterr().out


def test_declined_run_is_told(site: Path, ask: Ask) -> None:
    ask()
    cli.main(["site", "decline", str(site), "11"])

    failure = ask()
    assert failure is not None
    assert failure.kind == "ApprovalDeclined"
    assert failure.reason == "the operator of ward has declined this run"


def test_known_settings_go_on_by_the_rule_new_settings(site: Path, ask: Ask) -> None:
    """A run that is resumed has another id of Flower's and the same settings."""
    rule(site, "new-settings")
    assert ask() is not None
    cli.main(["site", "approve", str(site), "11"])

    assert ask(CONFIG, 12) is None
    assert ask(OTHER, 12) is not None


def test_automatic_asks_nobody(site: Path, ask: Ask) -> None:
    rule(site, "automatic")

    assert ask() is None
    assert Requests(site / "requests").all() == []


def test_run_beyond_the_policy_is_refused_without_a_request(site: Path, ask: Ask) -> None:
    failure = ask(replace(CONFIG, lora=replace(CONFIG.lora, r=4096)))

    assert failure is not None
    assert "max_lora_rank" in failure.reason
    assert Requests(site / "requests").all() == []
    [entry] = entries(site)
    assert (entry["verdict"], entry["reason"]) == ("refused", failure.reason)


def test_task_of_a_run_that_waits_is_refused(site: Path) -> None:
    node = Site(node_config(site), 11, 7)
    failure = unpack_failure(
        answer("train", pack_assignment(Assignment(1, {}, 1e-3, CONFIG)), node)
    )

    assert failure is not None
    assert failure.kind == "ApprovalPending"


def test_server_cannot_fill_the_disk_with_requests(site: Path) -> None:
    requests = Requests(site / "requests")
    for run in range(130):
        with pytest.raises(ApprovalPending):
            requests.require("every-run", CONFIG, str(run), "", "ward")

    assert len(requests.all()) == 100


def test_words_of_a_server_cannot_steer_a_terminal(
    site: Path, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = replace(CONFIG, data=replace(CONFIG.data, name="\x1b[2Jnothing to see"))
    ask(asked)
    model = replace(CONFIG.model, path="\x1b[2J/nothing")
    ask(replace(asked, model=model))
    cli.main(["site", "requests", str(site), "--full"])
    cli.main(["site", "log", str(site)])

    shown = capsys.readouterr().out
    assert "nothing to see" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("value", ["sometimes", "1", "[every-run]"])
def test_unknown_rule_is_an_error(value: str, site: Path, ask: Ask) -> None:
    rule(site, value)
    with pytest.raises(ConfigError, match="is no rule; use one of: every-run, new-settings, auto"):
        read_policy(site / "policy.yaml")
    failure = ask()
    assert failure is not None
    assert failure.reason.startswith("its policy file cannot be read")


def test_policy_without_the_line_lets_runs_wait(site: Path, ask: Ask) -> None:
    file = site / "policy.yaml"
    file.write_text(file.read_text().replace("approval: every-run", ""))
    failure = ask()
    assert failure is not None
    assert failure.kind == "ApprovalPending"


def test_status_of_a_site_names_what_waits(
    site: Path, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    ask()
    [request] = Requests(site / "requests").all()
    cli.main(["status", str(site)])

    assert f"1 waiting ({request.id}): fedllm site requests" in capsys.readouterr().out


def test_log_says_what_left(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Values, bytes and norm of a reply, computed here by hand."""
    generator = np.random.default_rng(0)
    delta = {"a": generator.normal(size=(4, 8)).astype(np.float32), "b": np.ones(3, np.float32)}
    update = pack_update(
        Update(delta, 17, {"loss": 0.5}, {"control_delta": {"a": delta["a"]}}), "float32"
    )
    node = Site(node_config(site), 11, 7)
    task = pack_assignment(Assignment(3, {}, 1e-3, CONFIG))

    assert audited("train", task, update, node, time.monotonic()) is update

    [entry] = entries(site)
    assert (entry["event"], entry["run"], entry["round"]) == ("train", "11", 3)
    assert (entry["server"], entry["verdict"]) == ("fl.example.org:9092", "answered")
    assert (entry["model"], entry["commit"]) == ("embedded", None)
    assert entry["settings"]["lora"]["r"] == 8
    assert entry["records"] == 17
    assert entry["values"] == 32 + 3 + 32
    assert entry["bytes"] >= 4 * entry["values"]
    whole = np.concatenate([delta["a"].ravel(), delta["b"]]).astype(np.float64)
    assert entry["norms"]["delta"] == pytest.approx(np.linalg.norm(whole))
    assert entry["norms"]["control_delta"] == pytest.approx(np.linalg.norm(delta["a"]))
    assert entry["numbers"] == {"loss": 0.5}
    assert cli.main(["site", "log", str(site), "--run", "11"]) == 0
    shown = capsys.readouterr().out
    assert "round 3    17 records  left: 67 values" in shown
    assert "1 entries, chain unbroken" in shown
    assert cli.main(["site", "log", str(site), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hash"] == entry["hash"]


def test_nothing_leaves_that_cannot_be_noted(site: Path) -> None:
    (site / "audit").write_text("a file in the place of the log")
    node = Site(node_config(site), 11, 7)
    reply = audited("query", pack_query(CONFIG), pack_info(ClientInfo("ward", 40, "1")), node, 0.0)

    failure = unpack_failure(reply)
    assert failure is not None
    assert str(site) not in failure.reason
    assert "info" not in reply


def test_message_that_cannot_be_read_is_noted(site: Path) -> None:
    node = Site(node_config(site), 11, 7)
    reply = answer("train", RecordDict(), node)
    audited("train", RecordDict(), reply, node, time.monotonic())

    [entry] = entries(site)
    assert entry["verdict"] == "refused"
    assert "it lacks 'query'" in entry["unreadable"]


def test_no_such_site(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no directory that `fedllm site init` has made"):
        site_folder(tmp_path)


def let_it_rest(site: Path) -> None:
    """Make all requests ones that the server asked for long ago."""
    for file in (site / "requests").glob("*.json"):
        values = json.loads(file.read_text())
        file.write_text(json.dumps({**values, "last_asked": "2020-01-01T00:00:00Z"}))


def test_request_of_a_server_that_no_longer_asks_does_not_wait(
    site: Path, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a dry run: it is not offered for approval, and goes when another one comes."""
    ask(run_id=11)
    let_it_rest(site)
    assert cli.main(["site", "requests", str(site)]) == 0
    assert capsys.readouterr().out.startswith("No request waits.")
    assert cli.main(["site", "requests", str(site), "--all"]) == 0
    assert "no longer asked" in capsys.readouterr().out

    assert ask(run_id=12)
    assert [(r.run, r.is_waiting) for r in Requests(site / "requests").all()] == [("12", True)]


def test_server_that_asks_again_waits_again(site: Path, ask: Ask) -> None:
    ask()
    let_it_rest(site)
    assert ask()
    (request,) = Requests(site / "requests").all()
    assert request.is_waiting


def test_how_long_the_server_waits_is_no_setting_to_approve(site: Path, ask: Ask) -> None:
    rule(site, "new-settings")
    ask(run_id=11)
    (request,) = Requests(site / "requests").all()
    Requests(site / "requests").decide(request.id, "approved")
    patient = replace(CONFIG.federation, start_timeout_s=86400.0)
    assert ask(replace(CONFIG, federation=patient), run_id=12) is None
