"""Clients whose loss is a quadratic, behind the real strategy, wire and client memory.

Client i minimises h_i/2 ||w - t_i||^2, so that the optimum of the sum is known and client drift is
strong. What a client does with a task is the package's own code, but for the model: `ClientMemory`,
the rule, and `DriftCorrection` on torch's SGD.
"""

import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from hypothesis import strategies as st

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import (
    AlgorithmConfig,
    CommunicationConfig,
    FederationConfig,
    TrainingConfig,
)
from fedllm_flwr.errors import LostDownloadError
from fedllm_flwr.federation.client_memory import ClientMemory
from fedllm_flwr.federation.downlink import received
from fedllm_flwr.federation.messages import Assignment, ClientInfo, Failure, Update
from fedllm_flwr.federation.roster import Client
from fedllm_flwr.federation.round_store import RoundStore, folder_name
from fedllm_flwr.federation.rule import find_rule
from fedllm_flwr.federation.state import ServerState, kept_rounds, load_state, save_state
from fedllm_flwr.federation.strategies import STRATEGIES, FederatedStrategy
from fedllm_flwr.federation.wire import pack_failure, pack_update, unpack_assignment
from fedllm_flwr.params import Kept, Params, subtract
from fedllm_flwr.training.drift import DriftCorrection
from fedllm_flwr.training.local_terms import LocalResult
from memory_grid import MemoryGrid, superlink_error
from strategy_runs import Listener

SIZE, STEPS, LEARNING_RATE = 3, 5, 0.1
START = {"w": np.zeros(SIZE, np.float32)}
GONE = 5  # the SuperLink's code for a node that it has lost
NUM_CLIENTS = 3
FATES = ("ok", "ok", "ok", "lost", "refused", "late", "idle")
one_round = st.tuples(
    st.sampled_from(["go on", "go on", "go on", "restart", "go back", "a client joins"]),
    st.lists(st.sampled_from(FATES), min_size=NUM_CLIENTS, max_size=NUM_CLIENTS),
    st.sets(st.integers(0, NUM_CLIENTS - 1), max_size=1),  # who loses its disk before
)
ZERO = {"control": {"w": np.zeros(SIZE, np.float32)}}


def config_of(
    algorithm: str = "scaffold",
    optimizer: str = "sgd",
    downlink: Any = "whole",
    dtype: Any = "float32",
    **federation: Any,
) -> Config:
    federation.setdefault("sample_fraction", 1.0)
    return Config(
        algorithm=AlgorithmConfig(name=algorithm),
        training=TrainingConfig(
            learning_rate=LEARNING_RATE,
            min_learning_rate=LEARNING_RATE,
            max_steps=STEPS,
            optimizer=optimizer,
        ),
        federation=FederationConfig(min_replies=1, round_timeout_s=5.0, **federation),
        communication=CommunicationConfig(dtype=dtype, downlink=downlink),
    )


@dataclass
class QuadraticClient:
    """h/2 ||w - t||^2, and what happens to its replies.

    ``fate`` of the next message: ok; lost (it trains, the reply never arrives); refused (the reply
    holds NaN); late (it trains after the server has given up, before its next message); idle (the
    message never arrives).
    """

    directory: Path
    curvature: float
    target: np.ndarray
    fate: str = "ok"
    late: list[Message] = field(default_factory=list)
    started: list[Assignment] = field(default_factory=list)  # what it has trained from

    def __call__(self, message: Message) -> Message:
        for older in self.late:
            with suppress(LostDownloadError):
                self.train(older)
        self.late.clear()
        if self.fate in ("idle", "late"):
            self.late += [message] if self.fate == "late" else []
            return superlink_error(message.metadata.message_id, GONE, "gone")
        try:
            update = self.train(message)
        except LostDownloadError as error:
            failure = Failure(type(error).__name__, str(error))
            return Message(pack_failure(failure), reply_to=message)
        if self.fate == "lost":
            return superlink_error(message.metadata.message_id, GONE, "gone")
        if self.fate == "refused":
            update.delta["w"][0] = np.nan
        return Message(pack_update(update, "float32"), reply_to=message)

    def train(self, message: Message) -> Update:
        task = received(unpack_assignment(message.content), self.directory)
        self.started.append(task)
        rule = find_rule(task.config.algorithm)
        memory = ClientMemory.recall(task, self.directory, rule.remembers)
        terms = rule.local_terms(task.tensors, memory.tensors)
        weight = torch.nn.Parameter(torch.from_numpy(terms.start["w"].copy()))
        drift = DriftCorrection({"w": weight}, terms, task.learning_rate)
        optimizer = torch.optim.SGD([weight], lr=task.learning_rate)
        arguments = SimpleNamespace(fp16=False)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = self.curvature / 2 * (weight - torch.from_numpy(self.target)).square().sum()
            loss.backward()
            drift.on_pre_optimizer_step(arguments, None, None)
            optimizer.step()
            drift.on_optimizer_step(arguments, None, None)
        delta = subtract({"w": weight.detach().numpy()}, task.params)
        end = {"w": weight.detach().numpy()}
        optimizer_name = task.config.training.optimizer
        gradient, steps = drift.mean_gradient(), drift.steps
        result = LocalResult(end, delta, gradient, steps, task.learning_rate, optimizer_name)
        after = rule.finish(result, task.tensors, memory.tensors, dict)
        kept = {kind: Kept(tensors) for kind, tensors in after.memory.items()}
        ClientMemory.keep(task, self.directory, kept)
        loss_value = {"loss": float(loss.detach())}
        return Update(delta, 1, loss_value, after.contributions, memory.lost)


class Federation:
    """A server with its directory, and quadratic clients with theirs."""

    def __init__(self, root: Path, config: Config, num_clients: int, every: int = 1) -> None:
        self.root, self.config, self.every = root, config, every
        self.clients: dict[str, QuadraticClient] = {}
        for _ in range(num_clients):
            self.join()
        self.strategy = self.serve(ServerState(0, START))
        save_state(self.checkpoints, self.strategy.state, keep=2)

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def join(self) -> None:
        """One more client; it takes part once the server is started again."""
        index = len(self.clients)
        rng = np.random.default_rng(index)
        self.clients[f"client-{index}"] = QuadraticClient(
            self.root / f"client-{index}",
            float(rng.uniform(0.5, 3)),
            rng.normal(size=SIZE).astype(np.float32),
        )

    def serve(self, state: ServerState) -> FederatedStrategy:
        roster = {
            name: Client(100 + i, ClientInfo(name, 1, "0")) for i, name in enumerate(self.clients)
        }
        hooks = Listener(
            on_round=lambda state, _: (
                save_state(self.checkpoints, state, keep=2)
                if state.round % self.every == 0
                else None
            ),
            oldest_checkpoint=lambda: min(kept_rounds(self.checkpoints), default=0),
        )
        make = STRATEGIES[self.config.algorithm.name]
        return make(self.config, roster, state, hooks, self.root / "known")

    def restart(self, back: bool = False) -> None:
        """Start the server again from its newest checkpoint, or go `back` to the one before."""
        files = sorted(self.checkpoints.glob("round-*"))
        if back and len(files) > 1:
            files[-1].unlink()
        self.strategy = self.serve(load_state(self.checkpoints)[0])

    def wipe(self, name: str) -> None:
        """A client loses its disk."""
        shutil.rmtree(self.clients[name].directory, ignore_errors=True)

    def round(self, **fates: str) -> None:
        """One round, in which the clients not named are fine; with no usable reply, a restart."""
        for name, client in self.clients.items():
            client.fate = fates.get(name.replace("-", "_"), "ok")
        nodes = {100 + i: client for i, client in enumerate(self.clients.values())}
        grid = MemoryGrid(nodes)
        self.strategy.start(grid, ArrayRecord(), num_rounds=self.strategy.state.round + 1)

    @property
    def optimum(self) -> np.ndarray:
        pulls = [(c.curvature, c.target.astype(np.float64)) for c in self.clients.values()]
        return np.asarray(sum(h * t for h, t in pulls) / sum(h for h, _ in pulls))

    def error(self) -> float:
        """Distance of the global adapter from the optimum."""
        return float(np.linalg.norm(self.strategy.state.params["w"] - self.optimum))

    def offset(self) -> float:
        """|c - mean c_i| over the c_i that clients start from if asked now, the lost ones apart.

        A client that has lost its c_i counts with what the server is going to take out.
        """
        state = self.strategy.state
        shares: list[Params] = []
        for name, acknowledged in state.clients.items():
            own = RoundStore(self.clients[name].directory).load(acknowledged.round) or None
            copy = RoundStore(self.root / "known" / folder_name(name)).load(acknowledged.round)
            if not acknowledged.round:
                shares.append(ZERO["control"])
                continue
            assert copy is not None
            if own is not None:
                assert (
                    own["control"].tensors["w"].tobytes() == copy["control"].tensors["w"].tobytes()
                )
            shares.append(copy["control"].tensors)
        mean = np.mean([share["w"].astype(np.float64) for share in shares], axis=0)
        return float(np.linalg.norm(state.tensors["control"]["w"] - mean))
