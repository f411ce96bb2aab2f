"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024) on desirable and undesirable answers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import ColumnsConfig
from fedllm_flwr.errors import DataError
from fedllm_flwr.tasks.base import (
    ANSWERS_PANEL,
    Bound,
    HeldOut,
    LocalWork,
    Metric,
    Panel,
    Scores,
    TrainingTask,
)
from fedllm_flwr.tasks.preferences import ACCURACY, ANSWER_TOKENS, LOSS, MARGIN

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from fedllm_flwr.data.client_data import SimulatedData
    from fedllm_flwr.data.kinds import RecordKind
    from fedllm_flwr.models.adapted_model import AdaptedModel
    from fedllm_flwr.params import Kept, Params
    from fedllm_flwr.training.private import ExampleLosses
    from fedllm_flwr.training.trainer import Penalty, Trained

_IDEAL = (1.0, 4 / 3)  # range of lambda_D n_D / (lambda_U n_U): the paper's equation 8


class Kto(TrainingTask):
    """Preference alignment without pairs, against a reference model as in DPO."""

    name = "kto"
    has_example_losses = True
    command = "fedllm run task=kto"
    remembers = ("reference",)
    adapters: ClassVar[Mapping[str, str]] = {"reference": "kto.reference_adapter"}
    prompts: ClassVar[Mapping[str, str]] = {"demo_preferences": "When can I expect the refund?"}
    metrics = (
        LOSS,
        ACCURACY,
        MARGIN,
        Metric("desirable_reward", "desirable reward", 3),
        Metric("undesirable_reward", "undesirable reward", 3),
        Metric("kl", "KL estimate", 2),
        ANSWER_TOKENS,
    )
    panels = (
        ANSWERS_PANEL,
        Panel(
            "Rewards of held-out answers",
            "nats",
            ("margin", "desirable_reward", "undesirable_reward"),
        ),
    )
    fixed_keys = ("evaluation.batch_tokens",)  # the reference's values depend on it
    # With a weight near 0, training would use only one kind of answers: fewer than the site counts.
    bounds = (Bound("kto.desirable_weight", 0.1, 10), Bound("kto.undesirable_weight", 0.1, 10))

    def refusal(self, config: Config) -> str | None:
        """The reference point needs the answer of another example."""
        training = config.training
        if training.batch_size * training.gradient_accumulation_steps < 2:
            return (
                "training.batch_size=1 with task=kto: an optimizer step needs two answers or more, "
                "to estimate the KL divergence on mismatched ones; raise it."
            )
        return None

    def distinct_roles(self, columns: ColumnsConfig) -> tuple[str, ...]:
        """Prompt, answer and label."""
        return ("prompt", "answer", "desirable")

    def claims(self, columns: ColumnsConfig, error: DataError) -> bool:
        """Whether the configured columns are those of judged answers."""
        return (columns.answer, columns.desirable) != (
            ColumnsConfig.answer,
            ColumnsConfig.desirable,
        )

    @property
    def records(self) -> "RecordKind":
        """A context with a desirable or an undesirable answer."""
        from fedllm_flwr.tasks.kto.examples import JUDGED

        return JUDGED

    def remarks(self, config: Config, data: "SimulatedData") -> list[str]:
        """A remark if the weights do not balance desirable and undesirable answers."""
        examples: Any = data.encoded
        desirable = int(examples.desirable.sum())
        undesirable = len(examples) - desirable
        if not desirable or not undesirable:
            kind = "undesirable" if not desirable else "desirable"
            return [
                f"task=kto: all {len(examples)} answers are {kind}; no answer of the other kind "
                "balances them"
            ]
        kto, (low, high) = config.kto, _IDEAL
        ratio = kto.desirable_weight * desirable / (kto.undesirable_weight * undesirable)
        if low - 0.01 <= ratio <= high + 0.01:
            return []
        right = kto.undesirable_weight * ratio
        return [
            f"task=kto: {desirable} desirable and {undesirable} undesirable answers; for "
            f"kto.desirable_weight={kto.desirable_weight:g} the paper recommends "
            f"kto.undesirable_weight from {right / high:.2f} to {right / low:.2f}"
        ]

    def prepare(self, work: LocalWork) -> "Mapping[str, Kept]":
        """Compute the reference's log-probabilities of the drawn and of mismatched answers."""
        from fedllm_flwr.params import Kept
        from fedllm_flwr.tasks.kto.training import mismatched_reference
        from fedllm_flwr.tasks.preferences.reference import ReferenceCache

        reference = work.tensors.get("reference")
        batch_tokens = work.config.evaluation.batch_tokens
        cache = ReferenceCache(batch_tokens, work.remembered.get("reference"))
        known = cache.of(work.model, reference, work.examples, work.drawn)
        if work.config.privacy.unit == "record":  # examples must not be mixed
            return {"reference": known}
        return {
            "reference": known,
            "mismatched": Kept({"values": mismatched_reference(work, reference)}),
        }

    def optimise(
        self,
        work: LocalWork,
        prepared: "Mapping[str, Kept]",
        callbacks: "list[TrainerCallback]",
        penalty: "Penalty",
    ) -> "Trained":
        """Increase the implied rewards of desirable answers, decrease those of undesirable ones."""
        from fedllm_flwr.tasks.kto.training import train_kto

        reference, mismatched = prepared["reference"].tensors, prepared["mismatched"].tensors
        return train_kto(work, reference["values"], mismatched["values"], callbacks, penalty)

    def example_losses(self, work: LocalWork, prepared: "Mapping[str, Kept]") -> "ExampleLosses":
        """Loss of each answer, with the reference point z0 = 0."""
        from fedllm_flwr.tasks.kto.training import answer_losses

        return answer_losses(work, prepared["reference"].tensors["values"])

    def drops_out(self, config: Config) -> bool:
        """Dropout is always off, as in the reference model."""
        return False

    def held_out(
        self,
        config: Config,
        model: "AdaptedModel",
        records: Any,
        encoded: Any,
        tensors: "Mapping[str, Params]",
    ) -> HeldOut:
        """Rewards of held-out answers, and the model's own answers to their prompts."""
        from fedllm_flwr.tasks.kto.held_out import make_judged_set

        return make_judged_set(config, model, records, encoded, tensors.get("reference"))

    def score_client(
        self, config: Config, model: "AdaptedModel", examples: Any, tensors: "Mapping[str, Params]"
    ) -> Scores:
        """The scores of `JudgedSet`, without generated answers."""
        from fedllm_flwr.tasks.kto.held_out import JudgedSet
        from fedllm_flwr.tasks.preferences.answers import Prompts

        data = JudgedSet.of(config, model, examples, tensors.get("reference"), Prompts.none())
        model.load(tensors["params"])
        return data.score(model, config.evaluation.batch_tokens)
