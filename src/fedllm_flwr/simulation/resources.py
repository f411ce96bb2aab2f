"""Checks that the machine, or a Ray cluster, has the resources that simulated clients need.

Otherwise Ray would wait forever for a worker that fits on no machine.
"""

import os
import re
import socket
import sys
from collections.abc import Mapping
from typing import Any

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import FederationConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.device import check_devices, cpu_count, gpu_count, resolve_device
from fedllm_flwr.simulation.access import check_asks_for_token, check_is_private, use_cluster_token

_CONNECT_S, _ANSWER_S = 5.0, 15.0  # seconds


def check_machine(config: Config) -> None:
    """Reject clients that exceed this machine's resources, if they run on it.

    Raises:
        ConfigError: they need more CPUs, GPUs or devices for processes than the machine has.
    """
    federation = config.federation
    on_cluster = federation.engine == "ray" and federation.ray_address is not None
    if on_cluster or federation.engine == "deployment":
        return
    resources = {"CPU": cpu_count(), "GPU": gpu_count()}
    _check_fit(federation, resources, "this machine")
    if federation.client_processes > 1:
        check_devices(federation.client_processes, resolve_device(config.training.device))


def join_cluster(address: str, init_args: Mapping[str, Any], federation: FederationConfig) -> None:
    """Connect this process to a running Ray cluster, on which Flower then starts its workers.

    Raises:
        ConfigError: no cluster answers, or a client needs more than any of its machines has.
        FederationError: the cluster requires no token, or rejects the given one.
    """
    _check_answers(address)
    use_cluster_token(address)
    import ray

    try:
        start_ray(init_args)
    except Exception as error:  # Ray raises many kinds
        raise _no_cluster(address, error) from error
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = {kind: max(m.get(kind, 0.0) for m in machines) for kind in ("CPU", "GPU")}
    try:
        _check_fit(federation, largest, "the largest machine of the Ray cluster")
    except ConfigError:
        ray.shutdown()
        raise


def start_ray(init_args: Mapping[str, Any]) -> None:
    """Connect this process to Ray, whose workers can import this package and its dependencies.

    Ray gives its own processes 30 s to start; on a busy machine that takes longer, this is retried.
    """
    import ray

    path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH")]))
    environment = {"env_vars": {"PYTHONPATH": path}}
    try:
        ray.init(include_dashboard=False, runtime_env=environment, **init_args)
    except Exception as error:  # Ray's own class is Exception
        if "timed out" not in str(error).lower():
            raise
        ray.shutdown()
        ray.init(include_dashboard=False, runtime_env=environment, **init_args)
    if init_args["address"] == "local":
        check_is_private(ray.get_runtime_context().gcs_address.rpartition(":")[0])


def _check_fit(federation: FederationConfig, resources: Mapping[str, float], whose: str) -> None:
    for kind, key in (("CPU", "client_cpus"), ("GPU", "client_gpus")):
        wanted, there = getattr(federation, key), resources[kind]
        if wanted > there:
            found = f"{there:g} {kind}{'' if there == 1 else 's'}" if there else f"no {kind}"
            found += " that torch can use" if kind == "GPU" and "Ray" not in whose else ""
            raise ConfigError(
                f"federation.{key}={wanted:g}, but {whose} has {found}; set "
                f"federation.{key}={there:g}{' or less' if there else ''}."
            )


def _check_answers(address: str) -> None:
    """Reject an address where no Ray cluster answers, which Ray itself would retry for minutes.

    Another kind of server, or a hung one, accepts the connection but does not answer.
    """
    match = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)
    if not match:
        return  # "auto" and similar values, which Ray resolves
    try:
        socket.create_connection((match[1], int(match[2])), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return  # Ray checks certificates itself
    import grpc

    target = f"[{match[1]}]:{match[2]}" if ":" in match[1] else f"{match[1]}:{match[2]}"
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_ANSWER_S)
        except grpc.FutureTimeoutError as error:
            reason = f"what listens there gave no answer of a Ray cluster within {_ANSWER_S:g} s"
            raise _no_cluster(address, TimeoutError(reason)) from error
        check_asks_for_token(address, channel)


def _no_cluster(address: str, error: Exception) -> ConfigError:
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    reason = text.splitlines()[0].rstrip(".")
    return ConfigError(
        f"federation.ray_address={address}: no Ray cluster answers there ({reason}); give its "
        "host:port, or leave the key out for a local one."
    )
