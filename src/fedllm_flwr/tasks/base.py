"""`TrainingTask`: the interface of a training task. Importing it does not import torch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import ColumnsConfig, value_of
from fedllm_flwr.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import TrainerCallback

    from fedllm_flwr.data.client_data import SimulatedData
    from fedllm_flwr.data.kinds import RecordKind
    from fedllm_flwr.data.sources import Records
    from fedllm_flwr.models.adapted_model import AdaptedModel
    from fedllm_flwr.params import Kept, Params
    from fedllm_flwr.training.batches import RoundBatches
    from fedllm_flwr.training.private import ExampleLosses
    from fedllm_flwr.training.trainer import Penalty, Trained

Scores = dict[str, float]


@dataclass(frozen=True)
class Metric:
    """A score on held-out records, and how tables show it.

    Attributes:
        name: key in `Scores` and in ``metrics.jsonl``.
        title, decimals: used in the final table and in comparison tables; title "": not shown.
        card_title, card_decimals: used in the model card.
        round_title, round_width: used in the table of rounds; width 0: not shown.
    """

    name: str
    card_title: str
    card_decimals: int
    title: str = ""
    decimals: int = 2
    round_title: str = ""
    round_width: int = 0


@dataclass(frozen=True)
class Panel:
    """Scores that share an axis in a run's figure; drawn if the first of them is available."""

    title: str
    unit: str
    keys: tuple[str, ...]
    limits: tuple[float, float] | None = None


ANSWERS_PANEL = Panel(
    "Answers on held-out records", "share (0 to 1)", ("accuracy", "macro_f1"), (0, 1)
)


@dataclass(frozen=True)
class Bound:
    """The range of values that a site accepts from a server for one of the task's keys."""

    key: str
    low: float
    high: float


class HeldOut(Protocol):
    """Held-out records, ready to score adapters with."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The main scores, most important first."""

    @property
    def num_prompts(self) -> int:
        """Number of prompts that `side_by_side` answers; 0 if the task generates no answers."""

    def __len__(self) -> int:
        """Number of records."""

    def score(self, model: "AdaptedModel", batch_tokens: int) -> Scores:
        """Scores of the model with its current adapter."""

    def side_by_side(self, model: "AdaptedModel", params: "Params", label: str) -> str:
        """Markdown with the prompts, and the answers of the base model and of `params` to each.

        Args:
            label: name of the adapter `params` in the text.
        """


@dataclass(frozen=True)
class LocalWork:
    """One client's round of local training, without the terms that the algorithm adds.

    Attributes:
        examples: all training examples of the client, as encoded by the task's codec.
        drawn: indices of the round's examples, in drawing order, (steps * examples per step,).
        tensors: groups of tensors that the server sent, by name; ``params`` is the global adapter.
        remembered: the client's memory of the last acknowledged round, by kind.
    """

    config: Config
    model: "AdaptedModel"
    examples: Any
    drawn: "NDArray[np.int64]"
    batches: "RoundBatches"
    learning_rate: float
    seed: int
    tensors: "Mapping[str, Params]" = field(default_factory=dict)
    remembered: "Mapping[str, Kept]" = field(default_factory=dict)


class TrainingTask(ABC):
    """A training task, selected by ``task.name``."""

    name: ClassVar[str]
    command: ClassVar[str]
    """Command that starts a run of the task with its defaults."""
    rows_per_example: ClassVar[int] = 1
    """Token sequences that one example adds to a micro-batch: 2 for a preference pair."""
    has_example_losses: ClassVar[bool] = False
    """Whether `example_losses` is implemented; record-level privacy needs it."""
    can_pack: ClassVar[bool] = False
    """Whether examples may be packed into one sequence, without padding."""
    adapters: ClassVar[Mapping[str, str]] = {}
    """Further adapters that the server sends to clients: group of tensors -> configuration key of
    the adapter's directory on the server. If the key is null, none is sent."""
    remembers: ClassVar[tuple[str, ...]] = ()
    """Groups of `prepare` that a client keeps between rounds; it can recompute each of them."""
    prompts: ClassVar[Mapping[str, str]] = {}
    """Name of an embedded data set -> a suitable prompt for ``fedllm generate``."""
    comparison: ClassVar[str | None] = None
    """Default experiment of ``fedllm compare``, unless the user chooses one, data or a model."""
    metrics: ClassVar[tuple[Metric, ...]]
    """Scores on held-out records, in table order."""
    panels: ClassVar[tuple[Panel, ...]] = (ANSWERS_PANEL,)
    """Panels of a run's figure, in addition to the loss."""
    loss_unit: ClassVar[str] = ""
    can_cut_left: ClassVar[bool] = False
    """Whether data.truncation=left differs from right."""
    fixed_keys: ClassVar[tuple[str, ...]] = ()
    """Keys that cannot change when a run is resumed, because the adapter depends on them."""
    bounds: ClassVar[tuple[Bound, ...]] = ()
    """Ranges that every site enforces, whatever its policy allows for the task."""

    def refusal(self, config: Config) -> str | None:
        """Why the task cannot run with this configuration, checked without any file or model.

        Returns a sentence with the key, its value and a remedy; None if the configuration is valid.
        """
        return None

    def distinct_roles(self, columns: ColumnsConfig) -> tuple[str, ...]:
        """Roles that must not share a column, such as the prompt and the answer."""
        return ()

    def claims(self, columns: ColumnsConfig, error: DataError) -> bool:
        """Whether a source that no task can read was meant for this one, so `error` is shown."""
        return False

    def adapter_paths(self, config: Config) -> dict[str, str]:
        """The configured directories of `adapters`, by group of tensors."""
        found = {group: value_of(config, key) for group, key in self.adapters.items()}
        return {group: path for group, path in found.items() if path is not None}

    @property
    @abstractmethod
    def records(self) -> "RecordKind":
        """The task's columns and records, and their encoding as tokens."""

    def prepare(self, work: LocalWork) -> "Mapping[str, Kept]":
        """Compute groups of tensors that training needs and that the client may keep.

        Called before the global adapter is loaded; may leave any adapter in the model.
        """
        return {}

    @abstractmethod
    def optimise(
        self,
        work: LocalWork,
        prepared: "Mapping[str, Kept]",
        callbacks: "list[TrainerCallback]",
        penalty: "Penalty",
    ) -> "Trained":
        """Train the model's current adapter in place.

        Args:
            prepared: the result of `prepare`.
            penalty: a term of the loss that depends only on the adapter.
        """

    def example_losses(self, work: LocalWork, prepared: "Mapping[str, Kept]") -> "ExampleLosses":
        """Per-example losses, each independent of all other examples.

        A task without them is rejected under ``privacy.unit=record`` before a run starts.
        """
        raise NotImplementedError(f"{type(self).__name__} has no per-example losses")

    def drops_out(self, config: Config) -> bool:
        """Whether training with record-level privacy applies ``lora.dropout``."""
        return True

    def remarks(self, config: Config, data: "SimulatedData") -> list[str]:
        """Remarks for the user about a simulation's data, one per line."""
        return []

    def check_held_out(self, config: Config, records: "Records") -> None:
        """Reject held-out records of which none can be scored with this configuration.

        Raises:
            DataError: names the key, its value and what the records contain.
        """
        return

    @abstractmethod
    def held_out(
        self,
        config: Config,
        model: "AdaptedModel",
        records: Any,
        encoded: Any,
        tensors: "Mapping[str, Params]",
    ) -> HeldOut:
        """The server's held-out records, ready to score adapters with.

        Args:
            records: a data set with the columns of `records`.
            encoded: the same records, encoded by the codec.
            tensors: groups of tensors that clients receive in addition to the global adapter.
        """

    @abstractmethod
    def score_client(
        self, config: Config, model: "AdaptedModel", examples: Any, tensors: "Mapping[str, Params]"
    ) -> Scores:
        """Scores of the adapter ``tensors["params"]`` on a client's own held-out examples."""
