"""The plan of a run, from its configuration and its loaded inputs."""

from collections import Counter
from pathlib import Path

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.config.participation import num_sampled
from fedllm_flwr.config.schema import EMBEDDED_DATA
from fedllm_flwr.federation.mechanism import describe_budget
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
    """The plan of a run; `first_round` is above 1 for a resumed run."""
    model, evaluation, training = prepared.model, prepared.evaluation, config.training
    at_sites = config.federation.engine == "deployment"  # each client has its own data
    natural = config.partition.name == "natural" and not at_sites
    notes = ["embedded"] if config.model.path == "embedded" else []
    notes += [config.quantization.name] if config.quantization.name != "none" else []
    embedded_eval = at_sites and config.data.eval_path in EMBEDDED_DATA
    bytes_down, bytes_up = bytes_per_client(config, prepared, roster)
    rule, last = find_rule(config.algorithm), config.federation.num_rounds
    params = rule.start(ServerState(0, prepared.initial), len(roster)).params
    trained = num_values({name: v for name, v in params.items() if rule.trains(name, last)})
    ranks = Counter(client.info.rank or config.lora.r for client in roster.values())
    return Plan(
        version=__version__,
        algorithm=config.algorithm.name,
        variant=config.algorithm.variant,
        task=config.task.name,
        model_name=config.model.name,
        model_parameters=model.num_base_parameters,
        model_note=", ".join(notes) or None,
        data_name="the sites' own data" if at_sites else config.data.name,
        trainable_parameters=num_values(prepared.initial),
        trained_parameters=trained if trained < num_values(prepared.initial) else None,
        ranks=ranks if len(ranks) > 1 or config.lora.ranks else {},
        device=describe_device(model.device),
        threads=config.federation.client_cpus,
        output_dir=str(directory.path.resolve() if at_sites else directory.path),
        first_round=first_round,
        warnings=warnings,
        num_clients=len(roster),
        client_names=sorted(roster),
        divided_by=config.partition.column if natural else None,
        sampled=num_sampled(config, len(roster)),
        num_rounds=config.federation.num_rounds,
        steps_per_round=training.max_steps if training.max_steps > 0 else None,
        epochs=training.num_epochs,
        batch_size=training.batch_size * training.gradient_accumulation_steps,
        wire_dtype=config.communication.dtype,
        bytes_down=bytes_down,
        bytes_up=bytes_up,
        eval_records=len(evaluation) if evaluation else 0,
        eval_name=config.data.eval_path if embedded_eval else None,
        eval_every=config.evaluation.every,
        eval_metrics=evaluation.metrics if evaluation else (),
        client_eval=config.evaluation.clients,
        privacy=describe_budget(
            config, {name: client.info.num_examples for name, client in roster.items()}
        ),
    )


def bytes_per_client(config: Config, prepared: Prepared, roster: Roster) -> tuple[int, int]:
    """Bytes of tensors sent to a client and back in a round, including control variates."""
    start = ServerState(0, prepared.initial, sent=prepared.sent)
    rounds = Rounds(find_rule(config.algorithm), config, Recorder(), Path())
    return rounds.bytes_per_client(rounds.begin(start, roster))
