"""A dry run asks every site, shows the plan, trains nothing, and fails where a site refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict

from fedllm_flwr import __version__
from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.compose import compose
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import ClientInfo, Failure
from fedllm_flwr.federation.wire import pack_failure, pack_info
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.server.dry_run import rehearse
from memory_grid import Handler, MemoryGrid


def answering(content: RecordDict) -> Handler:
    return lambda message: Message(content, reply_to=message)


def there(name: str) -> Handler:
    return answering(pack_info(ClientInfo(name, 1200, __version__)))


def refusing(name: str) -> Handler:
    reason = "the site refuses lora.r=64: it is above its max_lora_rank (16)"
    return answering(pack_failure(Failure("RefusedError", reason, name)))


def waiting(name: str) -> Handler:
    failure = Failure("ApprovalPending", f"waiting for approval at {name}", name)
    return answering(pack_failure(failure))


Rehearse = Callable[[dict[int, Handler]], str]


@pytest.fixture
def config() -> Config:
    overrides = ["federation.engine=deployment", "federation.num_clients=2", "lora.r=4"]
    overrides += ["federation.start_timeout_s=3", "evaluation.central=false"]
    return compose(overrides)


@pytest.fixture
def rehearsed(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Rehearse:
    """What a dry run with these nodes prints; it writes nothing and sends questions alone."""
    monkeypatch.chdir(tmp_path)

    def rehearse_on(nodes: dict[int, Handler]) -> str:
        grid = MemoryGrid(nodes)
        try:
            with Console(interactive=False) as console:
                rehearse(config, grid, console)
        finally:
            assert {message.metadata.message_type for message in grid.sent} == {"query"}
            assert list(tmp_path.iterdir()) == []
        return capsys.readouterr().out

    return rehearse_on


def test_sites_and_plan_are_shown(rehearsed: Rehearse) -> None:
    said = rehearsed({1: there("amy"), 2: waiting("bob")})

    assert "fedavg" in said
    assert "the sites' own data (2 clients)" in said
    assert "amy: 1,200 examples, would take part" in said
    assert "bob: waiting for approval at bob" in said
    assert "the run could start; nothing was trained" in said


def test_refusal_fails_it(rehearsed: Rehearse, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FederationError, match="dry run: bob would not take part"):
        rehearsed({1: there("amy"), 2: refusing("bob")})
    assert "bob: refuses: the site refuses lora.r=64" in capsys.readouterr().out


def test_too_few_sites_fail_it(rehearsed: Rehearse) -> None:
    with pytest.raises(FederationError, match="dry run: 1 of 2 sites are there"):
        rehearsed({1: there("amy")})


def test_fewer_may_do(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    enough = changed(config, federation={"min_clients": 1})
    with Console(interactive=False) as console:
        rehearse(enough, MemoryGrid({1: there("amy")}), console)
    assert "could start" in capsys.readouterr().out
