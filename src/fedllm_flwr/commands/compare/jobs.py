"""The runs of a comparison: their configurations and their parallel execution."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import compose
from fedllm_flwr.config.participation import num_sampled
from fedllm_flwr.config.schema import AlgorithmConfig, PartitionConfig
from fedllm_flwr.config.validation import validate
from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.errors import ConfigError, FedLLMError
from fedllm_flwr.runs.directory import PlannedRun


@dataclass(frozen=True)
class Job(PlannedRun):
    """One run of a comparison."""

    algorithm: str
    seed: int


def make_jobs(
    overrides: Sequence[str], config_dir: str | None, algorithms: Sequence[str], root: Path
) -> list[Job]:
    """The runs, ordered by seed and then by algorithm.

    Raises:
        ConfigError: a configuration is invalid.
    """
    jobs = []
    for name in algorithms:
        config = compose([*overrides, f"algorithm={name}"], config_dir)
        config = _with_own_settings(config)
        if name == "centralized":
            federated = compose([*overrides, "algorithm=fedavg"], config_dir)
            config = centralized_like(federated, config.algorithm)
        for seed in range(config.seed, config.seed + config.compare.seeds):
            path = root / "runs" / f"{name}-seed{seed}"
            federation = replace(config.federation, engine="inprocess")
            tracking = replace(config.tracking, group=config.tracking.group or root.name)
            seeded = replace(
                config,
                seed=seed,
                output_dir=str(path),
                federation=federation,
                tracking=tracking,
            )
            jobs.append(Job(name, seed, config=seeded))
    return sorted(jobs, key=lambda job: (job.seed, algorithms.index(job.algorithm)))


_Planned = TypeVar("_Planned", bound=PlannedRun)


def carry_out(
    jobs: Sequence[_Planned], workers: int, report: Callable[[_Planned, str | None], None]
) -> None:
    """Execute or resume unfinished runs in `workers` processes.

    A worker process keeps its base model between runs.

    Args:
        report: called at the end of each run with its error, or None.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), prepare_environment)
    try:
        futures: dict[Future[str | None], _Planned] = {
            pool.submit(carry_out_one, job): job for job in jobs if not job.done
        }
        for future in as_completed(futures):
            report(futures[future], future.result())
    except BaseException:
        for process in list((pool._processes or {}).values()):  # a run may take minutes to end
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def carry_out_one(job: PlannedRun) -> str | None:
    """Execute or resume one run without output; return its error in one line, or None."""
    from fedllm_flwr.reporting.console import Console
    from fedllm_flwr.server.run import run_simulation

    try:
        run_simulation(job.begin(), Console(quiet=True), time.monotonic())
    except FedLLMError as error:
        return str(error)
    return None


def _with_own_settings(config: Config) -> Config:
    """The configuration with its algorithm's ``compare.settings`` applied."""
    settings = config.compare.settings or {}
    known = {item.name for item in fields(AlgorithmConfig)} - {"name"}
    own = settings.get(config.algorithm.name, {})
    for key in own:
        if key not in known:
            raise ConfigError(
                f"compare.settings.{config.algorithm.name}.{key}: unknown key; choose from "
                f"{', '.join(sorted(known))}."
            )
    config = replace(config, algorithm=replace(config.algorithm, **own))
    validate(config)
    return config


def centralized_like(federated: Config, algorithm: AlgorithmConfig) -> Config:
    """One client with all data and as many steps per round as all sampled clients together."""
    from fedllm_flwr.data.client_data import divided_data
    from fedllm_flwr.tasks import task_of

    federation, training = federated.federation, federated.training
    num_clients = federation.num_clients
    if num_clients is None:
        num_clients = divided_data(federated, task_of(federated).records)[1].num_clients
    sampled = num_sampled(federated, num_clients)
    if training.max_steps > 0:
        training = replace(training, max_steps=training.max_steps * sampled)
    else:
        training = replace(training, num_epochs=training.num_epochs * (sampled / num_clients))
    return replace(
        federated,
        algorithm=algorithm,
        training=training,
        partition=PartitionConfig(),
        federation=replace(
            federation, num_clients=1, sample_clients=None, sample_fraction=1.0, min_replies=1
        ),
    )
