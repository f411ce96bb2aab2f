"""SCAFFOLD's client control variate c_i (Karimireddy et al. 2020), kept on the client's disk."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedllm_flwr.messages import Task
from fedllm_flwr.params import Params, add, subtract
from fedllm_flwr.versions import newest_version, store_version, versions_to_keep
from fedllm_flwr.wire import round_trip

logger = logging.getLogger(__name__)


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
        own = newest_version(directory, "control", task.round, task.control)
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
        keep, new = versions_to_keep(config), add(self.own, change)
        store_version(self.directory, "control", self.task.round, new, keep)
        return change
