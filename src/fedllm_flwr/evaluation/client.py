"""Evaluation of the global adapter on a client's own held-out examples."""

from fedllm_flwr.data.client import ClientData
from fedllm_flwr.errors import DataError
from fedllm_flwr.evaluation.scoring import score_tokens
from fedllm_flwr.messages import Task
from fedllm_flwr.training.device import torch_threads
from fedllm_flwr.training.model import load_model


def evaluate_locally(task: Task, data: ClientData) -> dict[str, float]:
    """Loss (nats per answer token) and token accuracy; only these numbers leave the client."""
    if not len(data.held_out):
        raise DataError(f"{data.name} holds no examples back; raise data.validation_fraction")
    with torch_threads(task.config.federation.client_cpus):
        model = load_model(task.config)
        model.load(task.params)
        scores = score_tokens(model, data.held_out, task.config.evaluation.batch_tokens)
    return {
        "loss": scores.nll / scores.num_tokens,
        "token_accuracy": scores.num_correct / scores.num_tokens,
    }
