"""Runs of seconds that the integration and system tests share, and how their results compare."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedllm_flwr.client.app import app
from fedllm_flwr.config.compose import compose
from fedllm_flwr.federation.tensor_files import load_params
from fedllm_flwr.federation.wire import unpack_assignment
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.server.run import run_on_grid, run_simulation
from fedllm_flwr.simulation.inprocess import InProcessGrid

ALGORITHMS = ("fedavg", "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam")

NUM_CLIENTS = 3
TINY = [
    "partition=iid",
    f"federation.num_clients={NUM_CLIENTS}",
    "federation.sample_clients=2",
    "federation.num_rounds=2",
    "federation.client_cpus=1",
    "training.max_steps=2",
    "training.batch_size=4",
    "data.max_samples=100",
    "data.eval_max_samples=10",
    "tracking.figures=false",
]

Intercept = Callable[[Message, Context], None]


def tiny(*overrides: str) -> list[str]:
    """`TINY` with `overrides` in the place of those of the same key."""
    keys = {text.partition("=")[0] for text in overrides}
    return [*(text for text in TINY if text.partition("=")[0] not in keys), *overrides]


def run_tiny(output_dir: Path, *overrides: str) -> RunDirectory:
    """Run the tiny federation in this process; overrides may be groups and keys."""
    config = compose(tiny("federation.engine=inprocess", f"output_dir={output_dir}", *overrides))
    return run_simulation(config, Console(quiet=True), 0.0)


def resume(output_dir: Path, *overrides: str) -> RunDirectory:
    """Go on with a stopped run."""
    config = compose([f"resume={output_dir}", *overrides])
    return run_simulation(config, Console(quiet=True), 0.0)


def run_intercepted(output_dir: Path, client_app: ClientApp, *overrides: str) -> RunDirectory:
    """As `run_tiny`, with another client app behind the grid."""
    config = compose(tiny("federation.engine=inprocess", f"output_dir={output_dir}", *overrides))
    num_clients = config.federation.num_clients or NUM_CLIENTS
    grid = InProcessGrid(client_app, num_clients)
    return run_on_grid(config, grid, Console(quiet=True), run_id=id(grid))


class WrappedApp(ClientApp):
    """The real client app; `before` sees each message, `after` may replace each reply."""

    def __init__(
        self,
        before: Intercept | None = None,
        after: Callable[[Message, Context, Message], Message] | None = None,
    ) -> None:
        super().__init__()
        self._before, self._after = before, after

    def __call__(self, message: Message, context: Context) -> Message:
        if self._before:
            self._before(message, context)
        reply = app(message, context)
        return self._after(message, context, reply) if self._after else reply


def interrupting(at_round: int, after: int) -> WrappedApp:
    """A client app under which the user presses Ctrl-C once `after` clients of a round are done."""
    seen: list[str] = []

    def before(message: Message, context: Context) -> None:
        if message.metadata.message_type != "train":
            return
        if unpack_assignment(message.content).round == at_round:
            seen.append(message.metadata.message_id)
            if len(seen) > after:
                raise KeyboardInterrupt

    return WrappedApp(before)


ADAPTER = "adapter/adapter_model.safetensors"


def records(directory: RunDirectory | Path) -> list[dict[str, Any]]:
    """The metrics log without what differs between two equal runs: the seconds."""
    path = directory.metrics if isinstance(directory, RunDirectory) else directory / "metrics.jsonl"
    return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        timed = ("seconds", "phases")
        return {key: _timeless(item) for key, item in value.items() if key not in timed}
    return value


def outcome(directory: RunDirectory | Path) -> dict[str, Any]:
    """All that a run has computed, for comparison bit by bit.

    Tensors of the newest checkpoint, of every client's newest state and of the exported adapters,
    as bytes by name, and the metrics log.
    """
    path = directory.path if isinstance(directory, RunDirectory) else directory
    found: dict[str, Any] = {"metrics": records(path)}
    files = [max(path.glob("checkpoints/round-*"))]
    files += [max(client.glob("*.safetensors")) for client in path.glob("clients/*")]
    for file in files:
        for group, params in load_params(file)[0].items():
            for name, value in params.items():
                key = f"{file.relative_to(path)}/{group}/{name}"
                found[key] = (value.dtype.str, value.shape, value.tobytes())
    for file in path.glob("adapter*/**/adapter_model.safetensors"):
        found[str(file.relative_to(path))] = file.read_bytes()
    return found
