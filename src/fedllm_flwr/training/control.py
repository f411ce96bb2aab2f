"""SCAFFOLD's client control variate c_i (Karimireddy et al. 2020), kept on the client's disk.

One file per client and round, the last two kept. A task of round r starts from the newest state
older than r, so that a round repeated after a crash starts from the same state.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedllm_flwr.checkpoint import load_params, save_params
from fedllm_flwr.errors import FederationError
from fedllm_flwr.messages import Task
from fedllm_flwr.params import Params, add, check_like, subtract
from fedllm_flwr.wire import round_trip

logger = logging.getLogger(__name__)

_KEPT = 2


@dataclass(frozen=True)
class ClientControl:
    """What one round needs of the control variates; inert without them."""

    task: Task
    directory: Path
    own: Params | None  # c_i at the start of the round

    @classmethod
    def of(cls, task: Task, directory: Path) -> "ClientControl":
        """The client's control variate for a task: from its disk, zero at its first round."""
        if task.control is None:
            return cls(task, directory, None)
        own = _newest_before(directory, task.round, task.control)
        if own is None:
            logger.info("round %d: no control variate on disk, starting at zero", task.round)
            own = {name: np.zeros_like(value) for name, value in task.control.items()}
        return cls(task, directory, own)

    def drift(self) -> Params | None:
        """c - c_i."""
        if self.own is None or self.task.control is None:
            return None
        return subtract(self.task.control, self.own)

    def finish(self, delta: Params, mean_gradient: Params, steps: int) -> Params | None:
        """Store c_i+ and return c_i+ - c_i as it will arrive; None without control variates.

        Option II, c_i+ = c_i - c + (w - w_i) / (K lr), equals the mean gradient under SGD at a
        constant rate. An adaptive optimizer's step is no gradient, so there c_i+ is the mean of
        the gradients themselves. The ``openfedllm`` variant uses option II throughout. What is
        stored is c_i plus the difference in wire dtype, so that server and clients agree on c.
        """
        if self.own is None or self.task.control is None:
            return None
        config = self.task.config
        if config.training.optimizer == "sgd" or self.task.correction.post_step:
            scale = steps * self.task.learning_rate
            control = self.task.control
            new = {
                name: (value - control[name] - delta[name] / scale).astype(value.dtype)
                for name, value in self.own.items()
            }
        else:
            new = mean_gradient
        change = round_trip(subtract(new, self.own), config.communication.dtype)
        path = _file(self.directory, self.task.round)
        save_params(path, {"control": add(self.own, change)}, {"round": str(self.task.round)})
        _remove_outdated(path)
        return change


def _file(directory: Path, server_round: int) -> Path:
    return directory / f"control-{server_round:05d}.safetensors"


def _remove_outdated(newest: Path) -> None:
    """Keep `newest` and the one before; later ones are of rounds that the server took back."""
    states = sorted(newest.parent.glob("control-*.safetensors"))
    place = states.index(newest)
    for path in states[: max(0, place + 1 - _KEPT)] + states[place + 1 :]:
        path.unlink(missing_ok=True)


def _newest_before(directory: Path, server_round: int, like: Params) -> Params | None:
    """The newest usable state of an earlier round; what cannot be used is logged."""
    limit = _file(directory, server_round).name
    for path in sorted(directory.glob("control-*.safetensors"), reverse=True):
        if path.name >= limit:
            continue
        try:
            control = load_params(path)[0].get("control", {})
            check_like(control, like)
        except FederationError as error:
            logger.warning("%s is not used: %s", path, error)
            continue
        return control
    return None
