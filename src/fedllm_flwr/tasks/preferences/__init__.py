"""What the tasks that learn preferences share: records, the reference model, scores, answers."""

from fedllm_flwr.tasks.base import Metric

LOSS = Metric("loss", "loss", 3, "loss", 3, "eval loss", 12)
ACCURACY = Metric("accuracy", "accuracy", 3, "accuracy", 2, "accuracy", 10)
MARGIN = Metric("margin", "reward margin", 3, "margin", 2, "margin", 9)
ANSWER_TOKENS = Metric("answer_tokens", "tokens per answer", 1, "answer tokens", 1)
