"""Direct preference optimisation (Rafailov et al. 2023) on pairs of a better and a worse answer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import ColumnsConfig
from fedllm_flwr.errors import DataError
from fedllm_flwr.tasks.base import (
    ANSWERS_PANEL,
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

    from fedllm_flwr.data.kinds import RecordKind
    from fedllm_flwr.models.adapted_model import AdaptedModel
    from fedllm_flwr.params import Kept, Params
    from fedllm_flwr.training.private import ExampleLosses
    from fedllm_flwr.training.trainer import Penalty, Trained


class Dpo(TrainingTask):
    """Preference alignment against a reference model that is fixed for the whole run."""

    name = "dpo"
    has_example_losses = True
    command = "fedllm run task=dpo"
    rows_per_example = 2
    comparison = "compare_demo_dpo"
    metrics = (
        LOSS,
        ACCURACY,
        MARGIN,
        Metric("chosen_log_prob", "chosen log p", 1),
        Metric("rejected_log_prob", "rejected log p", 1),
        ANSWER_TOKENS,
    )
    panels = (
        ANSWERS_PANEL,
        Panel(
            "Rewards of held-out answers", "nats", ("margin", "chosen_reward", "rejected_reward")
        ),
    )
    fixed_keys = ("evaluation.batch_tokens",)  # the reference's values depend on it
    remembers = ("reference",)
    adapters: ClassVar[Mapping[str, str]] = {"reference": "dpo.reference_adapter"}
    prompts: ClassVar[Mapping[str, str]] = {"demo_preferences": "When can I expect the refund?"}

    def refusal(self, config: Config) -> str | None:
        """Options that the selected loss does not support."""
        if config.privacy.unit == "record" and config.dpo.loss_type in ("aot", "aot_unpaired"):
            return (
                f"dpo.loss_type={config.dpo.loss_type} with privacy.unit=record: it sorts the "
                "pairs of a batch, so that a pair's loss depends on others; use sigmoid."
            )
        dpo, smoothed = config.dpo, ("robust", "exo_pair", "aot", "aot_unpaired")
        if dpo.label_smoothing and dpo.loss_type not in smoothed:
            return (
                f"dpo.label_smoothing={dpo.label_smoothing} has no effect on dpo.loss_type="
                f"{dpo.loss_type}; use one of {', '.join(smoothed)}, or drop it."
            )
        if dpo.loss_type == "exo_pair" and not dpo.label_smoothing:
            return (
                "dpo.loss_type=exo_pair needs dpo.label_smoothing > 0 (its paper recommends 0.001)."
            )
        return None

    def distinct_roles(self, columns: ColumnsConfig) -> tuple[str, ...]:
        """The chosen and the rejected answer."""
        return ("chosen", "rejected")

    def claims(self, columns: ColumnsConfig, error: DataError) -> bool:
        """Whether columns of pairs are configured, or `error` recommends reading transcripts."""
        named = {columns.chosen, columns.rejected} - {ColumnsConfig.chosen, ColumnsConfig.rejected}
        return bool(named) or "hh_rlhf" in str(error)

    @property
    def records(self) -> "RecordKind":
        """Pairs of a chosen and a rejected answer to a shared context."""
        from fedllm_flwr.tasks.dpo.pairs import PREFERENCES

        return PREFERENCES

    def prepare(self, work: LocalWork) -> "Mapping[str, Kept]":
        """Compute the reference model's log-probabilities of the drawn pairs' answers."""
        from fedllm_flwr.tasks.preferences.reference import ReferenceCache

        cache = ReferenceCache(
            work.config.evaluation.batch_tokens, work.remembered.get("reference")
        )
        reference = work.tensors.get("reference")
        return {"reference": cache.of(work.model, reference, work.examples, work.drawn)}

    def optimise(
        self,
        work: LocalWork,
        prepared: "Mapping[str, Kept]",
        callbacks: "list[TrainerCallback]",
        penalty: "Penalty",
    ) -> "Trained":
        """Minimise the mean ``dpo.loss_type`` loss of the pairs."""
        from fedllm_flwr.tasks.dpo.training import train_dpo

        return train_dpo(
            work.model,
            work.examples,
            prepared["reference"].tensors["values"],
            work.batches,
            work.config.dpo,
            work.config.training,
            work.learning_rate,
            work.seed,
            callbacks,
            penalty,
        )

    def example_losses(self, work: LocalWork, prepared: "Mapping[str, Kept]") -> "ExampleLosses":
        """The ``dpo.loss_type`` loss of each pair."""
        from fedllm_flwr.tasks.dpo.training import pair_losses

        return pair_losses(work, prepared["reference"].tensors["values"])

    def drops_out(self, config: Config) -> bool:
        """Whether dropout is on: not with ``dpo.disable_dropout``."""
        return not config.dpo.disable_dropout

    def held_out(
        self,
        config: Config,
        model: "AdaptedModel",
        records: Any,
        encoded: Any,
        tensors: "Mapping[str, Params]",
    ) -> HeldOut:
        """Rewards of held-out pairs, and the model's own answers to their prompts."""
        from fedllm_flwr.tasks.dpo.held_out import make_preference_set

        return make_preference_set(config, model, records, encoded, tensors.get("reference"))

    def score_client(
        self, config: Config, model: "AdaptedModel", examples: Any, tensors: "Mapping[str, Params]"
    ) -> Scores:
        """The scores of `preference_scores`."""
        from fedllm_flwr.tasks.dpo.held_out import score_pairs

        return score_pairs(config, model, examples, tensors["params"], tensors.get("reference"))
