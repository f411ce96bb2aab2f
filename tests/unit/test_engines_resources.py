"""Clients that do not fit are refused before an engine starts."""

import os
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedllm_flwr.config import Config
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.device import check_devices, gpu_count
from fedllm_flwr.simulation import resources
from fedllm_flwr.simulation.resources import check_machine, join_cluster, start_ray

MakeConfig = Callable[..., Config]
CPUS = len(os.sched_getaffinity(0))


@pytest.mark.parametrize("engine", ["ray", "inprocess"])
def test_cpus_of_the_machine(engine: str, make_config: MakeConfig) -> None:
    check_machine(make_config(federation={"engine": engine, "client_cpus": CPUS}))
    with pytest.raises(ConfigError) as caught:
        check_machine(make_config(federation={"engine": engine, "client_cpus": CPUS + 1}))
    plural = "" if CPUS == 1 else "s"
    assert str(caught.value) == (
        f"federation.client_cpus={CPUS + 1}, but this machine has {CPUS} CPU{plural}; set "
        f"federation.client_cpus={CPUS} or less."
    )


@pytest.mark.parametrize("engine", ["ray", "inprocess"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_gpus_where_there_is_none(engine: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"federation\.client_gpus=0\.1, .*has no GPU"):
        check_machine(make_config(federation={"engine": engine, "client_gpus": 0.1}))


def test_processes_need_a_device_each() -> None:
    """A machine has one of MPS; of CPUs, processes share what there is."""
    check_devices(64, torch.device("cpu"))
    check_devices(1, torch.device("mps"))
    with pytest.raises(ConfigError) as caught:
        check_devices(2, torch.device("mps"))
    assert str(caught.value) == (
        "federation.client_processes=2 needs a mps device for each, and there is 1; set "
        "federation.client_processes=1."
    )
    more = gpu_count() + 1
    with pytest.raises(ConfigError, match=f"client_processes={more} needs a cuda device for each"):
        check_devices(more, torch.device("cuda"))


@pytest.mark.parametrize(
    "federation",
    [{"engine": "deployment"}, {"engine": "ray", "ray_address": "cluster:6379"}],
)
def test_other_machines_are_not_measured_by_this_one(
    federation: dict[str, Any], make_config: MakeConfig
) -> None:
    check_machine(make_config(federation={**federation, "client_cpus": 10_000}))


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_address_where_nothing_answers(scheme: str, make_config: MakeConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = f"{scheme}127.0.0.1:{port}"
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"Connection refused.*host:port") as caught:
        join_cluster(address, {"address": address}, make_config().federation)
    assert f"federation.ray_address={address}: " in str(caught.value)
    assert time.monotonic() - started < 20  # seconds, the import of Ray included


def test_address_of_something_else(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the connection and says nothing; Ray itself would try again for minutes."""
    monkeypatch.setattr(resources, "_ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"no answer of a Ray cluster within 0\.5 s"):
            join_cluster(address, {"address": address}, make_config().federation)


def test_ray_that_is_slow_to_start_gets_a_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own limit is 30 s; another failure is not tried again."""
    late = Exception("The current node timed out during startup.")
    outcomes: list[Exception | None] = [late, None]
    closed: list[bool] = []

    def init(**_: object) -> None:
        if (error := outcomes.pop(0)) is not None:
            raise error

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: closed.append(True))
    start_ray({"address": "elsewhere:6379"})
    assert (outcomes, closed) == ([], [True])
    outcomes += [ValueError("no such address"), None]
    with pytest.raises(ValueError, match="no such address"):
        start_ray({"address": "elsewhere:6379"})
    assert outcomes == [None]
