"""Secure aggregation in whole runs: the adapter of a plain one, dropouts, refusals, resume."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedllm_flwr.client.app import app
from fedllm_flwr.config.compose import compose
from fedllm_flwr.errors import ConfigError, FederationError, RunInterrupted
from fedllm_flwr.federation.messages import Failure
from fedllm_flwr.federation.secure.graph import Session
from fedllm_flwr.federation.secure.masks import Words
from fedllm_flwr.federation.secure.server import MaskedSum
from fedllm_flwr.federation.secure.site import SecureSite
from fedllm_flwr.federation.state import load_state
from fedllm_flwr.federation.wire import pack_failure, unpack_assignment, unpack_unmask
from fedllm_flwr.params import Params
from fedllm_flwr.runs.directory import RunDirectory
from tiny_runs import ALGORITHMS, WrappedApp, outcome, records, resume, run_intercepted, run_tiny

SECURE = ("privacy.secure_aggregation=true", "communication.dtype=float32")
THREE = (*SECURE, "federation.sample_clients=3")


def adapter(directory: RunDirectory | Path) -> Params:
    path = directory if isinstance(directory, Path) else directory.path
    return load_state(path / "checkpoints")[0].params


def distance(one: Params, other: Params) -> float:
    """L2 norm of the difference, relative to what LoRA's B, which starts at zero, has become."""
    moved = {name: value for name, value in other.items() if "lora_B" in name}
    length = sum(float(np.square(value).sum()) for value in moved.values()) ** 0.5
    apart = sum(float(np.square(one[name] - value).sum()) for name, value in other.items()) ** 0.5
    return apart / length


@pytest.mark.parametrize(
    "algorithm",
    ["scaffold", *(pytest.param(a, marks=pytest.mark.slow) for a in ALGORITHMS if a != "scaffold")],
)
def test_the_adapter_is_that_of_a_plain_run(algorithm: str, tmp_path: Path) -> None:
    """As near as the fixed point is fine: of SGD, which does not enlarge what it rounds."""
    chosen = (f"algorithm={algorithm}", "training.optimizer=sgd", "training.learning_rate=0.5")
    plain = adapter(run_tiny(tmp_path / "plain", *chosen, "communication.dtype=float32"))
    run = run_tiny(tmp_path / "secure", *chosen, *SECURE)
    secure = adapter(run)
    assert distance(secure, plain) < 1e-4
    assert len(records(run)[-1]["clients"]) == 2
    again = adapter(run_tiny(tmp_path / "again", *chosen, *SECURE))
    assert all(np.array_equal(secure[name], again[name]) for name in secure)


Reply = Callable[[Message, Context, Message], Message]


def silent(client: int, kind: str, server_round: int) -> Reply:
    """Client number `client` answers messages of a kind with a failure in a round."""
    now = [0]

    def after(message: Message, context: Context, reply: Message) -> Message:
        if message.metadata.message_type == "train":
            now[0] = unpack_assignment(message.content).round
        mine = context.node_config["partition-id"] == client and now[0] == server_round
        if mine and message.metadata.message_type == kind:
            return Message(pack_failure(Failure("Gone", "it went away")), reply_to=message)
        return reply

    return after


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "query.sign", "query.unmask"])
def test_one_of_three_may_drop_out_at_any_point(kind: str, tmp_path: Path) -> None:
    app = WrappedApp(after=silent(1, kind, 2))
    run = run_intercepted(tmp_path / "secure", app, *THREE)
    last = records(run)[-1]
    assert len(last["clients"]) == (2 if kind == "train" else 3)
    assert ("ignored" in last) == (kind != "train")
    plain = run_intercepted(
        tmp_path / "plain",
        WrappedApp(after=silent(1, kind, 2)),
        "federation.sample_clients=3",
        "communication.dtype=float32",
    )
    assert distance(adapter(run), adapter(plain)) < 0.03  # two steps of AdamW after the rounding


PROMISE = ("privacy.unit=client", "privacy.sampling=visible", "privacy.delta=1e-3")
SIXTEEN = (*PROMISE, "privacy.secure_ring=16", "privacy.noise_multiplier=1")
DROPOUTS: dict[int, dict[int, str]] = {  # by round: clients, and before or after what they go
    1: {},
    2: {0: "before sending"},
    3: {1: "after masking"},
    4: {2: "before unmasking"},
    5: {0: "before sending", 3: "before sending"},
    6: {1: "after masking", 4: "after masking"},
    7: {2: "before unmasking", 5: "before unmasking"},
    8: {0: "before signing", 1: "before unmasking"},
    9: {3: "before signing", 4: "before signing"},
}


class LeavingApp(ClientApp):
    """The real client app of six clients, which go as `DROPOUTS` says."""

    def __init__(self) -> None:
        super().__init__()
        self._round = 0

    def __call__(self, message: Message, context: Context) -> Message:
        kind, client = message.metadata.message_type, int(context.node_config["partition-id"])
        if kind == "train":
            self._round = unpack_assignment(message.content).round
        gone = Message(pack_failure(Failure("Gone", "it went away")), reply_to=message)
        point = DROPOUTS.get(self._round, {}).get(client)
        at = {"train": "sending", "query.sign": "signing", "query.unmask": "unmasking"}
        if point == f"before {at.get(kind)}":
            return gone
        reply = app(message, context)
        return gone if (kind, point) == ("train", "after masking") else reply


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "chosen"), [*((name, ()) for name in ALGORITHMS), ("scaffold", SIXTEEN)]
)
def test_the_sum_is_the_plain_one_bit_for_bit_whoever_goes_and_when(
    algorithm: str, chosen: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, one, and the most that may go, at each point of the protocol."""
    vectors: dict[tuple[str, str], Words] = {}
    added: list[int] = []
    mask, unmasked = SecureSite.mask, MaskedSum.unmasked

    def noting(self: SecureSite, session: Session, words: Words) -> dict[str, bytes]:
        vectors[session.id, self._name] = words.copy()
        return mask(self, session, words)

    def checked(self: MaskedSum) -> Words:
        found, session = unmasked(self), self.session
        each = [vectors[session.id, name] for name in self.survivors]
        np.testing.assert_array_equal(found, np.sum(each, axis=0, dtype=found.dtype))
        assert found.itemsize == (2 if chosen else 4)
        added.append(len(each))
        return found

    monkeypatch.setattr(SecureSite, "mask", noting)
    monkeypatch.setattr(MaskedSum, "unmasked", checked)
    six = ("federation.num_clients=6", "federation.sample_clients=6", "federation.num_rounds=9")
    short = (*six, "training.max_steps=1", "evaluation.every=0", "federation.min_replies=4")
    run = run_intercepted(
        tmp_path, LeavingApp(), SECURE[0], f"algorithm={algorithm}", *short, *chosen
    )
    assert added == [6, 5, 5, 6, 4, 4, 6, 6, 6]
    assert [len(record["clients"]) for record in records(run)[1:]] == added


def test_a_round_that_cannot_be_unmasked_is_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    gone = [silent(client, "query.unmask", 2) for client in (0, 1)]

    def after(message: Message, context: Context, reply: Message) -> Message:
        for each in gone:
            reply = each(message, context, reply)
        return reply

    promise = ("privacy.unit=client", "privacy.sampling=visible", "privacy.noise_multiplier=1")
    chosen = (*THREE, "federation.num_rounds=3", "algorithm=scaffold", *promise)
    run = run_intercepted(tmp_path / "run", WrappedApp(after=after), *chosen)
    rounds = records(run)
    assert rounds[2]["clients"] == {}
    assert "1 sites have answered for the mask" in rounds[2]["failures"]["client-0"]
    assert len(rounds[3]["clients"]) == 3
    assert 0 < rounds[1]["epsilon"] < rounds[2]["epsilon"] < rounds[3]["epsilon"]  # paid for
    state = load_state(run.path / "checkpoints")[0]
    assert [state.clients[name].updates for name in sorted(state.clients)] == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["query.sign", "query.unmask"])
def test_the_server_dies_between_the_exchanges_and_the_run_goes_on(
    kind: str, tmp_path: Path
) -> None:
    chosen = (*THREE, "algorithm=scaffold")
    whole = run_tiny(tmp_path / "whole", *chosen)
    seen: list[str] = []

    def before(message: Message, context: Context) -> None:
        if message.metadata.message_type == kind:
            seen.append(unpack_unmask(message.content).session)
            if len(seen) == 5:  # three of round 1, one of round 2
                raise KeyboardInterrupt

    with pytest.raises(RunInterrupted):
        run_intercepted(tmp_path / "stopped", WrappedApp(before), *chosen)
    found = outcome(resume(tmp_path / "stopped"))
    assert found == outcome(whole)


@pytest.mark.parametrize(
    ("algorithm", "task"),
    [
        pytest.param(a, t, marks=[] if (a, t) == ("scaffold", "sft") else pytest.mark.slow)
        for a in ALGORITHMS
        for t in ("sft", "dpo", "kto")
    ],
)
def test_clients_add_the_noise(algorithm: str, task: str, tmp_path: Path) -> None:
    promise = ("privacy.unit=client", "privacy.sampling=visible", "privacy.target_epsilon=6")
    chosen = (f"algorithm={algorithm}", f"task={task}", *promise, "privacy.delta=1e-3")
    last = records(run_tiny(tmp_path / "run", *THREE, *chosen))[-1]
    assert 5.9 < last["epsilon"] <= 6
    assert last["eval"]["loss"] == pytest.approx(last["eval"]["loss"])  # finite


@pytest.mark.slow
def test_noise_of_the_clients_reaches_the_adapter_and_a_lost_client_adds_zero(
    tmp_path: Path,
) -> None:
    """One round of SCAFFOLD: what the server adds up is z C sqrt(3) away from what clients sent."""
    promise = ("privacy.unit=client", "privacy.sampling=visible", "privacy.delta=1e-3")
    plainly = (*THREE[1:], *promise, "privacy.clip=0.5", "algorithm=scaffold")
    plainly = (*plainly, "federation.num_rounds=1")
    chosen, still = (THREE[0], *plainly), "privacy.noise_multiplier=0"
    plain = run_tiny(tmp_path / "plain", *plainly, still)
    quiet = run_tiny(tmp_path / "quiet", *chosen, still)
    assert distance(adapter(quiet), adapter(plain)) < 1e-5
    noisy = run_tiny(tmp_path / "noisy", *chosen, "privacy.noise_multiplier=2")
    groups = [load_state(run.path / "checkpoints")[0] for run in (noisy, quiet)]
    parts = [np.concatenate([p.ravel() for _, p in sorted(s.params.items())]) for s in groups]
    control = [
        np.concatenate([p.ravel() for _, p in sorted(s.tensors["control"].items())]) for s in groups
    ]
    deviation = 2 * 0.5 * math.sqrt(3)  # of three sites, of which two may be left
    assert (parts[0] - parts[1]).std() == pytest.approx(deviation / 3, rel=0.05)
    assert (control[0] - control[1]).std() == pytest.approx(deviation / 3, rel=0.05)
    assert records(noisy)[-1]["epsilon"] > 0
    app = WrappedApp(after=silent(1, "train", 1))
    fewer = run_intercepted(tmp_path / "fewer", app, *chosen, still)
    less = run_intercepted(
        tmp_path / "less",
        WrappedApp(after=silent(1, "train", 1)),
        *plainly,
        still,
    )
    assert distance(adapter(fewer), adapter(less)) < 1e-5


@pytest.mark.slow
def test_a_round_whose_sum_was_asked_for_is_charged_again(tmp_path: Path) -> None:
    promise = ("privacy.unit=client", "privacy.sampling=visible", "privacy.noise_multiplier=3")
    seen: list[str] = []

    def before(message: Message, context: Context) -> None:
        if message.metadata.message_type == "query.unmask":
            seen.append("")
            if len(seen) == 5:  # three of round 1, one of round 2
                raise KeyboardInterrupt

    with pytest.raises(RunInterrupted):
        run_intercepted(tmp_path / "run", WrappedApp(before), *THREE, *promise)
    done = resume(tmp_path / "run")
    lines = (done.known_clients / "releases.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 2]


@pytest.mark.slow
def test_no_message_shows_an_update(tmp_path: Path) -> None:
    """What travels is one vector of words, which look like noise, and sealed shares."""
    kinds: set[str] = set()

    def after(message: Message, context: Context, reply: Message) -> Message:
        kinds.update(reply.content.array_records)
        for arrays in reply.content.array_records.values():
            words = arrays["vector"].numpy().view(np.uint32)
            spread = np.bincount(words >> 28, minlength=16) / len(words)
            assert spread == pytest.approx(1 / 16, rel=0.2)
        return reply

    run_intercepted(tmp_path / "run", WrappedApp(after=after), *THREE, "federation.num_rounds=1")
    assert kinds == {"masked"}


@pytest.mark.slow
def test_a_value_beyond_the_range_is_refused_by_the_client(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"beyond privacy.secure_range=1e-06; raise it"):
        run_tiny(tmp_path / "run", *THREE, "privacy.secure_range=0.000001")


@pytest.mark.slow
def test_sixteen_bits_halve_the_upload_and_cost_the_same_epsilon(tmp_path: Path) -> None:
    once = (*THREE, "federation.num_rounds=1", "evaluation.every=0")
    half = records(run_tiny(tmp_path / "16", *once, *SIXTEEN))[-1]
    whole = records(run_tiny(tmp_path / "32", *once, *PROMISE, "privacy.noise_multiplier=1"))[-1]
    assert 2 * half["bytes_up"] == whole["bytes_up"]
    assert half["epsilon"] == whole["epsilon"]


def test_noise_that_sixteen_bits_have_no_room_for_is_refused_before_training(
    tmp_path: Path,
) -> None:
    asked: list[str] = []

    def before(message: Message, context: Context) -> None:
        asked.append(message.metadata.message_type)

    loud = (*PROMISE, "privacy.secure_ring=16", "privacy.noise_multiplier=200")
    with pytest.raises(FederationError, match="would more than double the noise"):
        run_intercepted(tmp_path / "run", WrappedApp(before), *THREE, *loud)
    assert "train" not in asked


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["privacy.secure_ring=16"], "rounds so coarsely that only noise hides it"),
        (["privacy.secure_ring=16", *PROMISE, "privacy.noise_multiplier=0"], "only noise hides it"),
        (["algorithm.combiner=median"], "looks at single updates"),
        (["algorithm=local"], "nothing to add up with algorithm=local"),
        (["algorithm=centralized"], "nothing to add up"),
        (["attack=scale"], "attack=scale changes single updates"),
        (["federation.sample_clients=1"], "needs two clients a round"),
    ],
)
def test_what_needs_single_updates_is_refused_by_name(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(["privacy.secure_aggregation=true", "federation.num_clients=10", *overrides])
