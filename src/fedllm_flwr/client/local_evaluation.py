"""Evaluation of the global adapter on a client's own held-out examples."""

from fedllm_flwr.client.local_round import check_sent
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.errors import DataError
from fedllm_flwr.federation.messages import Assignment
from fedllm_flwr.federation.rule import find_rule
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.models.device import torch_threads
from fedllm_flwr.tasks import task_of


def evaluate_locally(assignment: Assignment, data: ClientData) -> dict[str, float]:
    """The training task's scores of a client; only these numbers leave it."""
    if not len(data.held_out):
        raise DataError(f"{data.name} holds no examples back; raise data.validation_fraction")
    config = assignment.config
    with torch_threads(config.federation.client_cpus):
        model, rule, task = load_model(config), find_rule(config.algorithm), task_of(config)
        check_sent(assignment, rule, task, model)
        return task.score_client(config, model, data.held_out, assignment.tensors)
