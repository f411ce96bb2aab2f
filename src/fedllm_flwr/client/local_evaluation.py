"""Evaluation of the global adapter and the client's personal adapter on its held-out examples."""

from pathlib import Path

from fedllm_flwr.client.local_round import check_sent, completed
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.errors import DataError
from fedllm_flwr.factors import joined
from fedllm_flwr.federation.client_memory import ClientMemory
from fedllm_flwr.federation.messages import FROZEN, PERSONAL, Assignment
from fedllm_flwr.federation.rule import find_rule
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.models.device import torch_threads
from fedllm_flwr.tasks import task_of


def evaluate_locally(
    assignment: Assignment, data: ClientData, memory_folder: Path
) -> dict[str, float]:
    """The task's scores of the global adapter; only these numbers leave the client.

    If the rule has personal adapters, the scores of the client's own adapter are included, as
    ``personal_loss`` and so on.
    """
    if not len(data.held_out):
        raise DataError(f"{data.name} holds no examples back; raise data.validation_fraction")
    config = assignment.config
    with torch_threads(config.federation.client_cpus):
        model, rule, task = load_model(config), find_rule(config.algorithm), task_of(config)
        assignment = completed(assignment, rule, model)
        check_sent(assignment, rule, task, model)
        tensors = dict(assignment.tensors)
        tensors["params"] = joined(assignment.params, tensors.pop(FROZEN, {}))
        scores = task.score_client(config, model, data.held_out, tensors)
        if rule.personal is None:
            return scores
        memory = ClientMemory.recall(assignment, memory_folder, rule.remembers).tensors
        own = rule.personal_adapter(assignment.tensors, memory)
        if own is not None:
            own_scores = task.score_client(config, model, data.held_out, {**tensors, "params": own})
            scores |= {f"{PERSONAL}{name}": score for name, score in own_scores.items()}
        return scores
