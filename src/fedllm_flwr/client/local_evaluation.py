"""Evaluation of the global adapter on a client's own held-out examples."""

from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.errors import DataError
from fedllm_flwr.federation.messages import Task
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.models.device import torch_threads
from fedllm_flwr.tasks import task_of


def evaluate_locally(task: Task, data: ClientData) -> dict[str, float]:
    """The training task's scores of a client; only these numbers leave it."""
    if not len(data.held_out):
        raise DataError(f"{data.name} holds no examples back; raise data.validation_fraction")
    tensors = {"params": task.params}
    if task.reference is not None:
        tensors["reference"] = task.reference
    with torch_threads(task.config.federation.client_cpus):
        model = load_model(task.config)
        task.check_fits(model.check)
        return task_of(task.config).score_client(task.config, model, data.held_out, tensors)
