"""Sums of several processes over gloo; threads take the place of processes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from fedllm_flwr.training.group import ALONE, Group, PeerLost


def together(folder: Path, size: int, act: Callable[[Group], Any], timeout_s: float = 60) -> Any:
    """What `act` gives in each member of a group."""

    def member(rank: int) -> Any:
        return act(Group.connect(rank, size, folder, timeout_s))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(member, range(size)))


def test_three_sum_and_gather_the_same_bits(tmp_path: Path) -> None:
    rows = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0))

    def act(group: Group) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count = group.sum(torch.tensor(group.rank + 1))
        return count, group.sum(rows[group.rank]), group.gather(rows[group.rank, : group.rank])

    for count, total, parts in (results := together(tmp_path, 3, act)):
        assert count == 6
        torch.testing.assert_close(total, rows.double().sum(0).float())
        assert torch.equal(total, results[0][1])
        assert torch.equal(parts, torch.cat([rows[1, :1], rows[2, :2]]))


def test_a_gradient_that_only_some_have_is_that_of_these(tmp_path: Path) -> None:
    """As of the experts of a model that no token of a process has reached."""
    gradients = [[torch.ones(2, 3), None, None], [torch.full((2, 3), 2.0), torch.ones(4), None]]

    def act(group: Group) -> list[torch.Tensor | None]:
        parameters = [Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (5,))]
        for parameter, gradient in zip(parameters, gradients[group.rank], strict=True):
            parameter.grad = gradient
        group.sum_gradients(parameters)
        return [parameter.grad for parameter in parameters]

    for first, second, third in together(tmp_path, 2, act):
        assert torch.equal(first, torch.full((2, 3), 3.0))
        assert torch.equal(second, torch.ones(4))
        assert third is None


def test_a_process_alone_changes_nothing() -> None:
    parameter, value = Parameter(torch.zeros(2)), torch.tensor([1.5, -0.0])
    parameter.grad = value
    ALONE.sum_gradients([parameter])
    assert parameter.grad is value
    assert ALONE.sum(value) is value
    assert torch.equal(ALONE.gather(value), value)


def test_a_member_that_does_not_come_or_answer_is_missed_in_time(tmp_path: Path) -> None:
    with pytest.raises(PeerLost):
        Group.connect(0, 2, tmp_path, 0.5)

    def act(group: Group) -> None:
        if group.rank == 0:
            group.sum(torch.ones(3))

    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(PeerLost):
        together(other, 2, act, 2.0)
