"""The plan of a run, from its configuration and what was loaded for it."""

from pathlib import Path
from typing import Any

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.config.participation import num_sampled
from fedllm_flwr.config.schema import EMBEDDED_DATA
from fedllm_flwr.federation.recorder import Recorder
from fedllm_flwr.federation.roster import Roster
from fedllm_flwr.federation.rounds import Rounds
from fedllm_flwr.federation.rule import find_rule
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.models.device import describe_device
from fedllm_flwr.params import num_values
from fedllm_flwr.reporting.plan import Plan
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.server.preparation import Prepared


def make_plan(
    config: Config,
    prepared: Prepared,
    roster: Roster,
    directory: RunDirectory,
    first_round: int,
    warnings: list[str],
) -> Plan:
    """What will happen; `first_round` is above 1 when a stopped run goes on."""
    model = prepared.model
    return Plan(
        version=__version__,
        algorithm=config.algorithm.name,
        variant=config.algorithm.variant,
        task=config.task.name,
        model_name=config.model.name,
        model_parameters=model.num_base_parameters,
        model_note=_model_note(config),
        data_name="the sites' own data" if _at_sites(config) else config.data.name,
        trainable_parameters=num_values(prepared.initial),
        device=describe_device(model.device),
        threads=config.federation.client_cpus,
        output_dir=str(directory.path.resolve() if _at_sites(config) else directory.path),
        first_round=first_round,
        warnings=warnings,
        **_clients(config, roster),
        **_work(config),
        **_wire(config, prepared, roster),
        **_evaluation(config, prepared),
    )


def _clients(config: Config, roster: Roster) -> dict[str, Any]:
    natural = config.partition.name == "natural" and not _at_sites(config)
    return {
        "num_clients": len(roster),
        "client_names": sorted(roster),
        "divided_by": config.partition.column if natural else None,
        "sampled": num_sampled(config, len(roster)),
    }


def _work(config: Config) -> dict[str, Any]:
    training = config.training
    return {
        "num_rounds": config.federation.num_rounds,
        "steps_per_round": training.max_steps if training.max_steps > 0 else None,
        "epochs": training.num_epochs,
        "batch_size": training.batch_size * training.gradient_accumulation_steps,
    }


def _wire(config: Config, prepared: Prepared, roster: Roster) -> dict[str, Any]:
    """What the algorithm's own messages will hold, with its control variate if it has one."""
    start = ServerState(0, prepared.initial, sent=prepared.sent)
    rounds = Rounds(find_rule(config.algorithm), config, Recorder(), Path())
    down, up = rounds.bytes_per_client(rounds.begin(start, roster))
    return {"wire_dtype": config.communication.dtype, "bytes_down": down, "bytes_up": up}


def _evaluation(config: Config, prepared: Prepared) -> dict[str, Any]:
    evaluation, embedded = prepared.evaluation, config.data.eval_path in EMBEDDED_DATA
    return {
        "eval_records": len(evaluation) if evaluation else 0,
        "eval_name": config.data.eval_path if _at_sites(config) and embedded else None,
        "eval_every": config.evaluation.every,
        "eval_metrics": evaluation.metrics if evaluation else (),
        "client_eval": config.evaluation.clients,
    }


def _at_sites(config: Config) -> bool:
    """Whether each client has data of its own, whatever the server's configuration names."""
    return config.federation.engine == "deployment"


def _model_note(config: Config) -> str | None:
    notes = ["embedded"] if config.model.path == "embedded" else []
    if config.quantization.name != "none":
        notes.append(config.quantization.name)
    return ", ".join(notes) or None
