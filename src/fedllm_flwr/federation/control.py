"""SCAFFOLD's client control variate c_i (Karimireddy et al. 2020), which the client remembers."""

from dataclasses import dataclass

import numpy as np

from fedllm_flwr.federation.messages import Task
from fedllm_flwr.federation.wire import round_trip
from fedllm_flwr.params import Params, add, subtract


@dataclass(frozen=True)
class ClientControl:
    """What one round needs of the control variates; inert without them."""

    task: Task
    own: Params | None  # c_i at the start of the round

    @classmethod
    def of(cls, task: Task, remembered: Params | None) -> "ClientControl":
        """The client's control variate for a task: zero where nothing is remembered."""
        if task.control is None or remembered is not None:
            return cls(task, remembered)
        return cls(task, {name: np.zeros_like(value) for name, value in task.control.items()})

    def drift(self) -> Params | None:
        """c - c_i."""
        if self.own is None or self.task.control is None:
            return None
        return subtract(self.task.control, self.own)

    def finish(
        self, delta: Params, mean_gradient: Params, steps: int
    ) -> tuple[Params | None, Params | None]:
        """c_i+ as it is to be remembered, and c_i+ - c_i as it will arrive.

        Option II, c_i+ = c_i - c + (w - w_i) / (K lr), equals the mean gradient under SGD at a
        constant rate. An adaptive optimizer's step is no gradient, so there c_i+ is the mean of
        the gradients themselves. The ``openfedllm`` variant uses option II throughout. What is
        remembered is c_i plus the difference in wire dtype: the server's copy, bit for bit.

        Args:
            steps: K, without those that a gradient scaler has skipped. If it has skipped all,
                the round says nothing about the gradient, and c_i stays.
        """
        if self.own is None or self.task.control is None:
            return None, None
        config = self.task.config
        if not steps:
            new = self.own
        elif config.training.optimizer == "sgd" or self.task.correction.as_openfedllm:
            scale = steps * self.task.learning_rate
            control = self.task.control
            new = {
                name: (value - control[name] - delta[name] / scale).astype(value.dtype)
                for name, value in self.own.items()
            }
        else:
            new = mean_gradient
        change = round_trip(subtract(new, self.own), config.communication.dtype)
        return add(self.own, change), change
