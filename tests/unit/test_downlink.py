"""The compressed downlink: which steps travel, what a client does without them, bad messages."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import compose
from fedllm_flwr.config.schema import changed
from fedllm_flwr.errors import FederationError, LostDownloadError
from fedllm_flwr.federation.algorithms.fedavg import FedAvg
from fedllm_flwr.federation.client_memory import ClientMemory
from fedllm_flwr.federation.downlink import Downlink, received
from fedllm_flwr.federation.messages import Acknowledged, Assignment, Download
from fedllm_flwr.federation.packing import pack
from fedllm_flwr.federation.recorder import Recorder, RoundReport
from fedllm_flwr.federation.rounds import Rounds
from fedllm_flwr.federation.rule import find_rule
from fedllm_flwr.federation.state import ServerState, read_state, save_state
from fedllm_flwr.federation.wire import pack_assignment, unpack_assignment
from fedllm_flwr.params import Groups, Params, digest
from quadratics import Federation, config_of
from strategy_runs import Listener, roster_of

PARAMS = {"a": np.zeros((20, 30), np.float32), "b": np.ones(7, np.float32)}
CONFIG = compose(["communication.downlink=int4", "communication.dtype=bfloat16"])
BITS = {"int8": 8.25, "int4": 4.25, "bfloat16": 16, "float32": 32}


def drifting(downlink: str, dtype: str, rounds: int) -> tuple[Downlink, ServerState]:
    """The state after some rounds, in each of which the adapter has moved."""
    chosen = changed(CONFIG, communication={"downlink": downlink, "dtype": dtype})
    made = Downlink.of(chosen)
    assert made is not None
    rng, params = np.random.default_rng(0), {"w": np.zeros(128 * 50, np.float32)}
    tensors = dict(made.advanced({}, {"params": params}, 1))
    for number in range(1, rounds + 1):
        params = {"w": params["w"] + rng.normal(size=128 * 50).astype(np.float32)}
        tensors = dict(made.advanced(tensors, {"params": params}, number + 1))
    return made, ServerState(rounds, params, tensors)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("downlink", ["int8", "int4"])
def test_a_client_gets_the_steps_since_its_round_if_they_are_smaller(
    downlink: str, dtype: str
) -> None:
    made, state = drifting(downlink, dtype, 12)
    most = int(np.ceil(BITS[dtype] / BITS[downlink])) - 1  # 1 or 3; 3 or 7
    for missed in range(13):
        acknowledged = {"ann": Acknowledged(12 - missed, 1)}
        download = made.downloads(replace(state, clients=acknowledged), ["ann"])["ann"]
        if missed < most:
            assert (download.whole, len(download.steps)) == (None, missed + 1)
        else:
            assert download.whole is state.tensors["downlink"]
            assert download.steps == ()
    kept = [name for name in state.tensors if name.startswith("downlink.")]
    assert kept == [f"downlink.{13 - age}" for age in range(most)]


def test_tensors_that_do_not_change_do_not_travel(tmp_path: Path) -> None:
    """The reference model of DPO, or w in local training: in no step, and in no checkpoint."""
    made = Downlink.of(CONFIG)
    assert made is not None
    sent = {"params": PARAMS, "reference": {"a": -PARAMS["a"]}}  # -0.0 stays it
    tensors = made.advanced(made.advanced({}, sent, 1), sent, 2)
    assert tensors["downlink.2"] == {}
    assert np.signbit(tensors["downlink"]["reference/a"]).all()
    moved = {**sent, "params": {**PARAMS, "a": PARAMS["a"] + 1}}
    tensors = made.advanced(tensors, moved, 3)
    assert list(tensors["downlink.3"]) == ["params/a"]
    state = ServerState(2, PARAMS, tensors, clients={"ann": Acknowledged(1, 1)})
    found = read_state(save_state(tmp_path, state, keep=1))
    assert found.tensors["downlink.2"] == {}
    download = made.downloads(found, ["ann"])["ann"]
    assert [list(step) for step in download.steps] == [["params/a"]]


def outcome(federation: Federation) -> dict[str, bytes]:
    state = federation.strategy.state
    groups = {"params": state.params, **state.tensors}
    return {f"{g}/{n}": v.tobytes() for g, params in groups.items() for n, v in params.items()}


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_a_server_that_is_started_again_goes_on_with_the_same_bits(
    algorithm: str, tmp_path: Path
) -> None:
    config = config_of(algorithm, downlink="int8", dtype="bfloat16")
    whole, stopped = (Federation(tmp_path / name, config, 2) for name in ("whole", "stopped"))
    for number in range(4):
        whole.round()
        stopped.round()
        stopped.restart(back=number == 2)
    stopped.round()
    assert outcome(stopped) == outcome(whole)


def test_a_client_that_lost_what_it_received_is_asked_again_in_the_same_round(
    tmp_path: Path,
) -> None:
    """Under FedAvg, which keeps nothing else, that changes no bit."""
    reports: list[RoundReport] = []
    config = config_of("fedavg", downlink="int8")
    whole, losing = (Federation(tmp_path / name, config, 2) for name in ("whole", "losing"))
    listening = losing.strategy.recorder
    assert isinstance(listening, Listener)
    listening.on_round = lambda _, report: reports.append(report)
    for number in range(3):
        if number == 2:
            losing.wipe("client-1")
        whole.round()
        losing.round()
    assert outcome(losing) == outcome(whole)
    assert [report.failures for report in reports] == [{}] * 3
    again = "client-1: asked again, with the whole adapter"
    assert [report.ignored for report in reports] == [[], [], [again]]
    step, adapter = 3 + 4, 4 * 3  # bytes: values, a scale; float32
    assert [report.bytes_down for report in reports] == [2 * adapter, 2 * step, 2 * step + adapter]


def test_a_client_with_other_bits_says_so(tmp_path: Path) -> None:
    made, state = drifting("int4", "bfloat16", 2)
    other = {"params/w": state.tensors["downlink"]["params/w"] + np.float32(1)}
    keep(tmp_path, CONFIG, Download(digest(other), other))
    asked = Acknowledged(1, 1)
    download = Download(digest(state.tensors["downlink"]), None, (state.tensors["downlink.3"],))
    task = Assignment(3, {}, 1e-3, CONFIG, acknowledged=asked, download=download)
    with pytest.raises(LostDownloadError, match="no tensors of round 1"):
        received(task, tmp_path)
    assert made.whole(state).digest == download.digest


def keep(folder: Path, config: Config, download: Download) -> None:
    """What a client receives in round 1, and keeps."""
    first = received(Assignment(1, {}, 1e-3, config, download=download), folder)
    ClientMemory.keep(first, folder, {})


def honest(folder: Path) -> RecordDict:
    """Round 3 for a client that has kept its download of round 1."""
    made = Downlink.of(CONFIG)
    assert made is not None
    tensors: dict[str, Params] = {}
    for number in (1, 2, 3):
        params = {name: value + np.float32(number) for name, value in PARAMS.items()}
        tensors = dict(made.advanced(tensors, {"params": params}, number))
        if number == 1:
            keep(folder, CONFIG, Download(digest(tensors["downlink"]), tensors["downlink"]))
    state = ServerState(2, PARAMS, tensors, clients={"ann": Acknowledged(1, 1)})
    download = made.downloads(state, ["ann"])["ann"]
    assert len(download.steps) == 2
    acknowledged = state.clients["ann"]
    task = Assignment(3, params, 1e-3, CONFIG, acknowledged=acknowledged, download=download)
    return pack_assignment(task)


def test_an_honest_download_is_followed(tmp_path: Path) -> None:
    task = received(unpack_assignment(honest(tmp_path)), tmp_path)
    np.testing.assert_allclose(task.params["a"], PARAMS["a"] + 3, atol=0.02)
    np.testing.assert_allclose(task.params["b"], PARAMS["b"] + 3, atol=0.02)


def step(**tensors: np.ndarray) -> ArrayRecord:
    return ArrayRecord({"tensors": pack((f"params/{n}", value) for n, value in tensors.items())})


def renamed(content: RecordDict, old: str, new: str) -> None:
    content[new] = content.array_records[old]
    del content[old]


def without_downlink(content: RecordDict) -> None:
    own = unpack_assignment(content)
    plain = changed(CONFIG, communication={"downlink": "whole"})
    content["task"] = pack_assignment(replace(own, config=plain))["task"]


A = np.zeros(300 + 20, np.uint8)  # bytes of an honest step of ``a``: 600 codes, 5 scales
HOSTILE: dict[str, tuple[Callable[[RecordDict], Any], str]] = {
    "of another tensor": (
        lambda c: c.__setitem__("step.1", step(c=A)),
        "'params/c' is not a tensor of this adapter",
    ),
    "too short": (
        lambda c: c.__setitem__("step.1", step(a=A[:-1])),
        "'params/a' has 319 values of uint8, expected 320 bytes",
    ),
    "too long": (
        lambda c: c.__setitem__("step.1", step(a=np.tile(A, 2))),
        "'params/a' has 640 values of uint8, expected 320 bytes",
    ),
    "of numbers": (
        lambda c: c.__setitem__("step.1", step(a=A.astype(np.int16))),
        "'params/a' has 320 values of float32, expected 320 bytes",
    ),
    "more than the adapter": (
        lambda c: [c.__setitem__(f"step.{n}", step(a=A)) for n in range(1, 9)],
        "the steps of the download take 2560 bytes, more than the adapter",
    ),
    "without its beginning": (lambda c: renamed(c, "step.1", "step.3"), "cannot be read"),
    "beside an adapter": (lambda c: c.__setitem__("params", step(a=A)), "cannot be read"),
    "without digest": (lambda c: c["download"].clear(), "it lacks 'digest'"),
    "with no text for digest": (
        lambda c: c.__setitem__("download", ConfigRecord({"digest": 3})),
        "digest=3 is no text",
    ),
    "that nobody asked for": (without_downlink, "but communication.downlink=whole"),
    "of NaN": (
        lambda c: c.__setitem__("step.2", step(a=np.full_like(A, 255))),
        "no tensors of round 1",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_download_that_no_server_sends_is_refused(case: str, tmp_path: Path) -> None:
    change, expected = HOSTILE[case]
    content = honest(tmp_path)
    change(content)
    with pytest.raises(FederationError, match=expected):
        received(unpack_assignment(content), tmp_path)


def test_clients_score_the_adapter_itself(tmp_path: Path) -> None:
    config = replace(config_of("fedavg", downlink="int8"), algorithm=CONFIG.algorithm)
    rounds = Rounds(find_rule(config.algorithm), config, Recorder(), tmp_path)
    state = rounds.begin(ServerState(0, PARAMS), roster_of())
    assert all(each.download for each in rounds.open(state, roster_of(), 1).assignments.values())
    questions = rounds.questions(state, roster_of())
    assert [each.download for each in questions.values()] == [None] * 3
    assert all(each.params is state.params for each in questions.values())


class Personal(FedAvg):
    """Every client gets an adapter of its own, as a plug-in's rule may decide."""

    def send(self, state: ServerState, client: str) -> Groups:
        return {"params": dict(state.params)}


def test_a_rule_that_sends_clients_different_tensors_is_refused(tmp_path: Path) -> None:
    rounds = Rounds(Personal(), config_of("fedavg", downlink="int8"), Recorder(), tmp_path)
    expected = "algorithm=fedavg sends clients different tensors; set communication.downlink=whole"
    with pytest.raises(FederationError, match=expected):
        rounds.begin(ServerState(0, PARAMS), roster_of())
