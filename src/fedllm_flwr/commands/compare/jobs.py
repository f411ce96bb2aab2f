"""The runs of a comparison: their configurations, and carrying them out side by side."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path

from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import compose
from fedllm_flwr.config.participation import num_sampled
from fedllm_flwr.config.schema import AlgorithmConfig, PartitionConfig
from fedllm_flwr.config.validation import validate
from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.errors import ConfigError, FedLLMError
from fedllm_flwr.runs.directory import PlannedRun, RunDirectory


@dataclass(frozen=True)
class Job(PlannedRun):
    """One run of a comparison."""

    algorithm: str
    seed: int


def make_jobs(
    overrides: Sequence[str], config_dir: str | None, algorithms: Sequence[str], root: Path
) -> list[Job]:
    """The runs, all seeds of one algorithm after those of another, seeds outermost.

    Raises:
        ConfigError: a configuration that cannot work.
    """
    jobs = []
    for name in algorithms:
        config = compose([*overrides, f"algorithm={name}"], config_dir)
        config = _with_own_settings(config)
        if name == "centralized":
            federated = compose([*overrides, "algorithm=fedavg"], config_dir)
            config = _centralized(federated, config.algorithm)
        for seed in range(config.seed, config.seed + config.compare.seeds):
            path = root / "runs" / f"{name}-seed{seed}"
            federation = replace(config.federation, engine="inprocess")
            seeded = replace(config, seed=seed, output_dir=str(path), federation=federation)
            jobs.append(Job(name, seed, config=seeded))
    return sorted(jobs, key=lambda job: (job.seed, algorithms.index(job.algorithm)))


def carry_out(jobs: Sequence[Job], workers: int, report: Callable[[Job, str | None], None]) -> None:
    """Run what is not done yet, `workers` at a time; a run that stopped goes on.

    Every worker is a process that keeps its base model from run to run.

    Args:
        report: called when a run has ended, with its error or None.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), prepare_environment)
    try:
        futures: dict[Future[str | None], Job] = {
            pool.submit(_run, job.config): job for job in jobs if not job.done
        }
        for future in as_completed(futures):
            report(futures[future], future.result())
    except BaseException:
        for process in list((pool._processes or {}).values()):  # a run takes minutes to end
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run(config: Config) -> str | None:
    """Carry out one run in a worker; its error in one line, or None."""
    from fedllm_flwr.reporting.console import Console
    from fedllm_flwr.server.run import run_simulation

    directory = RunDirectory(Path(str(config.output_dir)))
    if any(directory.checkpoints.glob("round-*")):
        config = replace(config, resume=str(directory.path))
    elif directory.config.is_file():  # stopped before its first checkpoint
        directory.config.unlink()
    try:
        run_simulation(config, Console(quiet=True), time.monotonic())
    except FedLLMError as error:
        return str(error)
    return None


def _with_own_settings(config: Config) -> Config:
    """The configuration with what ``compare.settings`` says for its algorithm."""
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


def _centralized(federated: Config, algorithm: AlgorithmConfig) -> Config:
    """All data in one client, which takes as many steps a round as all sampled clients do."""
    federation, training = federated.federation, federated.training
    sampled = num_sampled(federated, _num_clients(federated))
    if training.max_steps > 0:
        training = replace(training, max_steps=training.max_steps * sampled)
    else:
        share = sampled / _num_clients(federated)
        training = replace(training, num_epochs=training.num_epochs * share)
    return replace(
        federated,
        algorithm=algorithm,
        training=training,
        partition=PartitionConfig(),
        federation=replace(
            federation, num_clients=1, sample_clients=None, sample_fraction=1.0, min_replies=1
        ),
    )


def _num_clients(config: Config) -> int:
    from fedllm_flwr.data.client_data import divided_data
    from fedllm_flwr.tasks import task_of

    return divided_data(config, task_of(config).records)[1].num_clients
