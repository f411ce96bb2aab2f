"""Micro-batches of one client's round, sorted by length to reduce padding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fedllm_flwr.training.group import ALONE, Group

# Largest number of examples divided at once. Larger steps are first split by length, because the
# table of all cuts grows with the square of their number.
_MOST_TOGETHER = 128

MicroBatch = list[int]
"""Indices of the examples of one forward pass."""


def split_step(indices: Sequence[int], lengths: NDArray[np.int64], count: int) -> list[MicroBatch]:
    """Divide the examples of one optimizer step into `count` micro-batches with little padding.

    Examples are sorted by length and split to minimise the padded size, the sum over micro-batches
    of (examples x longest). No micro-batch is larger than an equal share of examples as long as the
    longest one, which bounds memory; within that bound, micro-batches of short examples contain
    more examples.
    """
    order = sorted(indices, key=lambda i: (int(lengths[i]), i))
    count = min(count, len(order))
    allowed = -(-len(order) // count) * int(lengths[order[-1]])
    groups = min(-(-len(order) // _MOST_TOGETHER), count)
    batches: list[MicroBatch] = []
    for group in range(groups):
        first, last = group * count // groups, (group + 1) * count // groups
        members = order[first * len(order) // count : last * len(order) // count]
        batches += _divided(members, lengths, last - first, allowed)
    return batches


def _divided(
    order: list[int], lengths: NDArray[np.int64], count: int, allowed: int
) -> list[MicroBatch]:
    """Sorted examples split into `count` micro-batches of at most `allowed` padded tokens."""
    if count == 1:
        return [order]
    padded = _padded_sizes(lengths[order], allowed)
    # cost[i]: smallest padded size of the first i examples in the micro-batches so far.
    cost = np.full(len(order) + 1, np.inf)
    cost[0] = 0.0
    starts = []  # start of the last micro-batch, by its end
    for _ in range(count):
        options = cost[:-1, None] + padded
        starts.append(options.argmin(0))
        cost[1:] = options.min(0)
        cost[0] = np.inf
    batches: list[MicroBatch] = []
    end = len(order)
    for start_of in reversed(starts):
        start = int(start_of[end - 1])
        batches.append(order[start:end])
        end = start
    return batches[::-1]


def _padded_sizes(ascending: NDArray[np.int64], allowed: int) -> NDArray[np.float64]:
    """Padded size of the examples from `start` to `end`, shape (start, end); inf if not allowed."""
    positions = np.arange(len(ascending))
    sizes = positions[None, :] + 1 - positions[:, None]
    padded = sizes * ascending[None, :].astype(np.float64)
    return np.where((sizes > 0) & (padded <= allowed), padded, np.inf)


@dataclass(frozen=True)
class RoundBatches(Dataset[list[int]]):
    """A round as a data set of micro-batches; an optimizer step has `per_step` of them.

    In a process's share of a round, `batches` and `per_step` are its own, the counts are those of
    all processes of `group`.
    """

    batches: list[MicroBatch]
    per_step: int
    items_per_step: int  # examples (or pairs) per optimizer step
    num_tokens: int  # real tokens of the round
    computed_tokens: int  # tokens that pass through the model, including padding
    packed: bool = False  # examples are concatenated, without padding
    group: Group = ALONE  # the processes that share the steps

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the round."""
        return len(self.batches) // self.per_step

    def share(self, group: Group) -> "RoundBatches":
        """This process's micro-batches of every step, of about the same lengths as the others'."""
        own = self.batches[group.rank :: group.size]
        return replace(self, batches=own, per_step=self.per_step // group.size, group=group)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> MicroBatch:
        return self.batches[index]


def round_batches(
    drawn: NDArray[np.int64],
    lengths: NDArray[np.int64],
    steps: int,
    micro_batch_size: int,
    packed: bool,
    processes: int = 1,
) -> RoundBatches:
    """Micro-batches for `steps` optimizer steps over the examples `drawn`, in drawing order.

    Args:
        drawn: indices of examples, shape (steps * examples per step,).
        lengths: tokens of every example, shape (num_examples,).
        packed: the model gets no padding (see `models.inputs.collate_packed`).
        processes: number of processes, which divide the examples of a step; each gets the same
            number of micro-batches.
    """
    examples_per_step = len(drawn) // steps
    per_step = processes * -(-examples_per_step // (processes * micro_batch_size))
    batches = [
        batch
        for step in drawn.reshape(steps, examples_per_step).tolist()
        for batch in split_step(step, lengths, per_step)
    ]
    num_tokens = int(lengths[drawn].sum())
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    computed = num_tokens if packed else padded
    return RoundBatches(batches, per_step, examples_per_step, num_tokens, computed, packed)
