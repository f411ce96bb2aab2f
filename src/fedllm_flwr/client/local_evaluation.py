"""Evaluation of the global adapter on a client's own held-out examples."""

from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.data.pairs import EncodedPairs
from fedllm_flwr.errors import DataError
from fedllm_flwr.evaluation.preferences import preference_scores
from fedllm_flwr.federation.messages import Task
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.models.device import torch_threads
from fedllm_flwr.models.scoring import score_examples
from fedllm_flwr.training.reference import reference_log_probs


def evaluate_locally(task: Task, data: ClientData) -> dict[str, float]:
    """Loss (nats per answer token) and token accuracy, or the scores of preference pairs.

    Only these numbers leave the client.
    """
    if not len(data.held_out):
        raise DataError(f"{data.name} holds no examples back; raise data.validation_fraction")
    with torch_threads(task.config.federation.client_cpus):
        model = load_model(task.config)
        task.check_fits(model.check)
        if isinstance(data.held_out, EncodedPairs):
            return _preferences(task, data.held_out, model)
        model.load(task.params)
        scores = score_examples(model, data.held_out, task.config.evaluation.batch_tokens)
    return {"loss": scores.loss, "token_accuracy": scores.token_accuracy}


def _preferences(task: Task, pairs: EncodedPairs, model: AdaptedModel) -> dict[str, float]:
    batch_tokens = task.config.evaluation.batch_tokens
    reference = reference_log_probs(model, task.reference, pairs, batch_tokens)
    model.load(task.params)
    policy = score_examples(model, pairs.rows, batch_tokens).log_probs.reshape(-1, 2)
    return preference_scores(policy, reference, task.config.dpo.beta)
