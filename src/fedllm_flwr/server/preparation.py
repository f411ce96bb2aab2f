"""Loads the server's inputs: data, model, held-out records and the initial adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm_flwr.config import Config
from fedllm_flwr.data.client_data import (
    client_sizes,
    divided_data,
    encode_records,
    require_clients_examples,
    require_examples,
    simulated_data,
    truncation_report,
)
from fedllm_flwr.data.federated import load_evaluation_data
from fedllm_flwr.data.partition import ClientStats, describe
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.evaluation.suites.during_training import CentralSuites, central_suites
from fedllm_flwr.federation.updates.cast import round_trip
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.models.device import cpu_count, torch_threads
from fedllm_flwr.models.tokenizer import load_tokenizer
from fedllm_flwr.params import Groups, Params
from fedllm_flwr.runs.adapter_files import load_adapter
from fedllm_flwr.runs.fit import fit_warnings
from fedllm_flwr.tasks import task_of
from fedllm_flwr.tasks.base import HeldOut

_NAMED = 5  # clients in a remark


@dataclass(frozen=True)
class Prepared:
    """The loaded inputs of a run."""

    num_clients: int  # clients that the run waits for
    clients: list[ClientStats]  # of a simulation; sites describe themselves
    sizes: dict[str, int]  # training examples by simulated client, in client order
    warnings: list[str]  # data that were left out or truncated
    model: AdaptedModel
    evaluation: HeldOut | None
    initial: Params
    sent: Groups  # tensors that the training task sends to clients in every round
    suites: CentralSuites | None = None  # benchmark suites to score with the held-out records


def prepare(config: Config) -> Prepared:
    """Load everything that the configuration names, so that errors occur before training.

    Raises:
        FedLLMError: names the key, the value and the remedy.
    """
    load_tokenizer(config.model)  # detects a wrong path before the data are read
    suites = central_suites(config)
    kind = task_of(config).records
    if config.federation.engine == "deployment":
        records = load_evaluation_data(config, kind)
        clients: list[ClientStats] = []
        sizes: dict[str, int] = {}
        warnings = fit_warnings(config, None, records)
    else:
        data = simulated_data(config, kind, load_tokenizer(config.model))
        require_clients_examples(config, data)
        records, clients = data.source.eval, describe(data.partition, data.source.train)
        sizes = client_sizes(config, data)
        train = data.source.report.train
        any_left_out = train.empty or train.equal or train.bad or train.duplicates
        warnings = data.source.report.lines() if any_left_out else []
        if data.left_out:
            warnings.append(
                f"clients without an example left, which take no part ({len(data.left_out)} of "
                f"{len(data.left_out) + len(clients)}): {', '.join(data.left_out[:_NAMED])}"
                + (", ..." if len(data.left_out) > _NAMED else "")
            )
        warnings += task_of(config).remarks(config, data)
        warnings += truncation_report(config, data.encoded)
        warnings += fit_warnings(config, data, records)
    model = load_model(config)
    initial = model.initial
    if config.init_adapter is not None:
        initial = load_adapter(Path(config.init_adapter).expanduser(), model)
    sent = _sent(config, model)
    evaluation = _held_out(config, records, model, sent)
    num_clients = len(clients) or config.federation.num_clients or 1
    if suites is not None and evaluation is None:
        raise ConfigError(
            "evaluation.suites are scored with the held-out records, and there are none; give "
            "data.eval_path and evaluation.central=true, or use fedllm evaluate afterwards."
        )
    return Prepared(num_clients, clients, sizes, warnings, model, evaluation, initial, sent, suites)


def _sent(config: Config, model: AdaptedModel) -> Groups:
    """The training task's further adapters, exactly as clients will receive them."""
    dtype = config.communication.dtype
    return {
        group: round_trip(load_adapter(Path(path).expanduser(), model), dtype)
        for group, path in task_of(config).adapter_paths(config).items()
    }


def held_out_records(config: Config, model: AdaptedModel) -> HeldOut | None:
    """The held-out records of a configuration, ready to score adapters in `model`.

    Raises:
        FedLLMError: the data cannot be read.
    """
    if config.federation.engine == "deployment":
        records = load_evaluation_data(config, task_of(config).records)
    else:
        records = divided_data(config, task_of(config).records)[0].eval
    return _held_out(config, records, model, _sent(config, model))


def _held_out(config: Config, records: Any, model: AdaptedModel, sent: Groups) -> HeldOut | None:
    """Held-out `records`, a data set or None, prepared for scoring."""
    if records is None or not (config.evaluation.central and len(records)):
        return None
    entry = task_of(config)
    entry.check_held_out(config, records)
    encoded = encode_records(config, entry.records, model.tokenizer, records)
    require_examples(config, "the held-out records", len(encoded))
    with torch_threads(evaluation_threads(config)):
        return entry.held_out(config, model, records, encoded, sent)


def evaluation_threads(config: Config) -> int:
    """CPU threads of central evaluation: all, or the client's number in a shared process."""
    in_process = config.federation.engine == "inprocess"
    return config.federation.client_cpus if in_process else cpu_count()
