"""The processes that share the optimizer steps of a client, and their sums.

A gradient is a sum over the examples of a step. Each process computes the terms of its own
examples, and one reduction per step adds them up. Every process then takes the same step.
"""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class PeerLost(Exception):  # noqa: N818 - names the event, which another process explains
    """Another process of the group has ended, or did not answer in time."""


class Group:
    """The processes of a client, of which this one has a rank; by default it is the only one.

    Sums have the same bits in every process and in every run. They are computed on the CPU by gloo,
    over the loopback interface, whatever the device. The group is not torch's default one, so that
    transformers and accelerate do not take the training for a distributed one.
    """

    def __init__(self, rank: int = 0, size: int = 1, gloo: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._gloo = gloo

    @classmethod
    def connect(cls, rank: int, size: int, folder: Path, timeout_s: float) -> "Group":
        """Meet the other processes.

        Args:
            folder: an empty folder of this user alone, the same one for all processes.
            timeout_s: seconds to wait for the others, here and in every sum.

        Raises:
            PeerLost: they did not come in time.
        """
        parts: Any = torch.distributed
        options = parts.ProcessGroupGloo._Options()
        options._devices = [parts.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=timeout_s)
        try:
            store = parts.FileStore(str(folder / "store"), size)
            store.set_timeout(options._timeout)
            return cls(rank, size, parts.ProcessGroupGloo(store, rank, size, options))
        except RuntimeError as error:
            raise PeerLost(str(error)) from error

    def close(self) -> None:
        """Leave the other processes; gloo's threads would abort the end of this one."""
        self._gloo = None

    def sum(self, values: Tensor) -> Tensor:
        """The sum of the processes' values, which have the same shape.

        Raises:
            PeerLost: a process has ended, or is late.
        """
        if self.size == 1:
            return values
        total = values.detach().to("cpu", copy=True)
        try:
            self._gloo.allreduce([total]).wait()
        except RuntimeError as error:
            raise PeerLost(str(error)) from error
        return total.to(values.device)

    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes, each (count,), one after the other.

        Raises:
            PeerLost: as in `sum`.
        """
        counts = torch.zeros(self.size, dtype=torch.long)
        counts[self.rank] = len(values)
        counts = self.sum(counts)
        parts = [values.new_zeros(count) for count in counts.tolist()]
        parts[self.rank] = values
        return self.sum(torch.cat(parts))

    def sum_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Replace each gradient by its sum, in one reduction; None where no process has one.

        Raises:
            PeerLost: as in `sum`.
        """
        if self.size == 1:
            return
        own = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters]
        has_one = parameters[0].new_tensor([p.grad is not None for p in parameters])
        total = self.sum(torch.cat([has_one, *(gradient.flatten() for gradient in own)]))
        sizes = [len(own), *(gradient.numel() for gradient in own)]
        found, *sums = torch.split(total, sizes)
        for parameter, any_has, value in zip(parameters, found.tolist(), sums, strict=True):
            parameter.grad = value.view_as(parameter) if any_has else None


ALONE = Group()
