"""Instruction tuning: next-token cross-entropy on the answers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import ColumnsConfig
from fedllm_flwr.tasks.base import HeldOut, LocalWork, Metric, Scores, TrainingTask

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainerCallback

    from fedllm_flwr.data.client_data import SimulatedData
    from fedllm_flwr.data.kinds import RecordKind
    from fedllm_flwr.data.sources import Records
    from fedllm_flwr.models.adapted_model import AdaptedModel
    from fedllm_flwr.params import Kept, Params
    from fedllm_flwr.training.batches import MicroBatch
    from fedllm_flwr.training.private import ExampleLosses
    from fedllm_flwr.training.trainer import Penalty, Trained


class Sft(TrainingTask):
    """Supervised fine-tuning on instructions or chats."""

    name = "sft"
    has_example_losses = True
    command = "fedllm run"
    can_pack = True
    can_cut_left = True
    comparison = "compare_demo"
    loss_unit = "nats/token"
    metrics = (
        Metric("loss", "loss", 3, "loss", 3, "eval loss", 12),
        Metric("perplexity", "perplexity", 2),
        Metric("token_accuracy", "token accuracy", 3),
        Metric("accuracy", "accuracy", 3, "accuracy", 2, "accuracy", 10),
        Metric("macro_f1", "macro F1", 3, "macro F1", 2),
        Metric("attack_success", "attack success", 3, "attack", 2, "attack", 7),
    )
    prompts: ClassVar[Mapping[str, str]] = {
        "demo": "What is the sentiment of this news? Quarterly profit at the bank falls"
    }

    def distinct_roles(self, columns: ColumnsConfig) -> tuple[str, ...]:
        """Prompt and answer, unless a chat column replaces them."""
        return () if columns.messages is not None else ("instruction", "output")

    @property
    def records(self) -> "RecordKind":
        """Conversations with supervised assistant turns."""
        from fedllm_flwr.tasks.sft.examples import INSTRUCTIONS

        return INSTRUCTIONS

    def optimise(
        self,
        work: LocalWork,
        prepared: "Mapping[str, Kept]",
        callbacks: "list[TrainerCallback]",
        penalty: "Penalty",
    ) -> "Trained":
        """Minimise the mean negative log-likelihood of the answer tokens of a step."""
        from fedllm_flwr.tasks.sft.training import train_sft

        return train_sft(
            work.model,
            work.examples,
            work.batches,
            work.config.training,
            work.learning_rate,
            work.seed,
            callbacks,
            penalty,
        )

    def remarks(self, config: Config, data: "SimulatedData") -> list[str]:
        """A remark on labels that are not the answer of any record."""
        from fedllm_flwr.tasks.sft.labels import unseen_labels

        return unseen_labels(config.data, data.source.train, data.source.eval)

    def check_held_out(self, config: Config, records: "Records") -> None:
        """With ``data.labels``, require that one of them is the answer of some record."""
        from fedllm_flwr.tasks.sft.labels import require_scored

        require_scored(config.data, records)

    def example_losses(self, work: LocalWork, prepared: "Mapping[str, Kept]") -> "ExampleLosses":
        """Mean negative log-likelihood of an example's own answer tokens."""
        from fedllm_flwr.models.scoring import trained_log_probs

        def losses(batch: "MicroBatch") -> "Tensor":
            log_probs, tokens = trained_log_probs(work.model, work.examples, batch)
            return -log_probs.sum(1) / tokens

        return losses

    def held_out(
        self,
        config: Config,
        model: "AdaptedModel",
        records: Any,
        encoded: Any,
        tensors: "Mapping[str, Params]",
    ) -> HeldOut:
        """Records to score the answers' loss and, with ``data.labels``, the most likely label."""
        from fedllm_flwr.tasks.sft.held_out import make_evaluation_set

        return make_evaluation_set(config, model.tokenizer, records, encoded)

    def score_client(
        self, config: Config, model: "AdaptedModel", examples: Any, tensors: "Mapping[str, Params]"
    ) -> Scores:
        """Loss (nats per answer token) and token accuracy."""
        from fedllm_flwr.models.scoring import score_examples

        model.load(tensors["params"])
        scores = score_examples(model, examples, config.evaluation.batch_tokens)
        return {"loss": scores.loss, "token_accuracy": scores.token_accuracy}
