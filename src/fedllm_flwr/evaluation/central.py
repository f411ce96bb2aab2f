"""Evaluation of adapters on the server's held-out records."""

from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.device import torch_threads
from fedllm_flwr.params import Params
from fedllm_flwr.tasks.base import HeldOut, Scores


def evaluate(
    model: AdaptedModel, params: Params, data: HeldOut, batch_tokens: int, threads: int
) -> Scores:
    """Scores of the adapter `params` on `data`."""
    with torch_threads(threads):
        model.load(params)
        return data.score(model, batch_tokens)
