"""Common parts of the preference tasks: records, the reference model, scores and answers."""

from fedllm_flwr.tasks.base import Metric

LOSS = Metric("loss", "loss", 3, "loss", 3, "eval loss", 12)
ACCURACY = Metric("accuracy", "accuracy", 3, "accuracy", 2, "accuracy", 10)
MARGIN = Metric("margin", "reward margin", 3, "margin", 2, "margin", 9)
ANSWER_TOKENS = Metric("answer_tokens", "tokens per answer", 1, "answer tokens", 1)
