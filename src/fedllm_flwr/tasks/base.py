"""What every training task declares and does. Importing this does not import torch."""

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
        name: in the scores, and in ``metrics.jsonl``.
        title, decimals: in the closing table and in those of comparisons; title "": not shown.
        card_title, card_decimals: in the model card.
        round_title, round_width: in the table of rounds; width 0: not shown.
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
    """Scores that share an axis in a run's figure; drawn where the first of them is known."""

    title: str
    unit: str
    keys: tuple[str, ...]
    limits: tuple[float, float] | None = None


ANSWERS_PANEL = Panel(
    "Answers on held-out records", "share (0 to 1)", ("accuracy", "macro_f1"), (0, 1)
)


@dataclass(frozen=True)
class Bound:
    """Values of a key of the task that a site accepts from a server."""

    key: str
    low: float
    high: float


class HeldOut(Protocol):
    """Held-out records, ready to score adapters with."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The scores to look at first."""

    @property
    def num_prompts(self) -> int:
        """Prompts that `side_by_side` answers; 0 where the task compares no answers."""

    def __len__(self) -> int:
        """Number of records."""

    def score(self, model: "AdaptedModel", batch_tokens: int) -> Scores:
        """Scores of the model as it is."""

    def side_by_side(self, model: "AdaptedModel", params: "Params", label: str) -> str:
        """Markdown with the prompts and their answers: the base model's and those of `params`.

        Args:
            label: what the adapter `params` is called there.
        """


@dataclass(frozen=True)
class LocalWork:
    """One client's round of local training, but for what the algorithm adds to it.

    Attributes:
        examples: all that the client trains on, as the task's codec makes them.
        drawn: indices of the round's examples, in drawing order, (steps * examples per step,).
        tensors: groups of tensors that the server sent, by name; ``params`` is the global adapter.
        remembered: what the client kept of the last acknowledged round, by kind.
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
    """A value of ``task.name``: everything in which one task differs from another."""

    name: ClassVar[str]
    command: ClassVar[str]
    """Starts a run of the task with its defaults."""
    rows_per_example: ClassVar[int] = 1
    """Rows of tokens that one example adds to a micro-batch."""
    has_example_losses: ClassVar[bool] = False
    """Whether `example_losses` is there, which training that is private per record needs."""
    can_pack: ClassVar[bool] = False
    """Whether examples may go through the model end to end, without padding."""
    adapters: ClassVar[Mapping[str, str]] = {}
    """Group of tensors that clients get beside the global adapter -> the key that names the
    adapter's directory on the server; null there means that none is sent."""
    remembers: ClassVar[tuple[str, ...]] = ()
    """Groups of `prepare` that a client keeps from round to round; it can do without any."""
    prompts: ClassVar[Mapping[str, str]] = {}
    """Name of an embedded data set -> a prompt for ``fedllm generate`` that suits it."""
    comparison: ClassVar[str | None] = None
    """Experiment of ``fedllm compare`` where the user chooses no other, no data and no model."""
    metrics: ClassVar[tuple[Metric, ...]]
    """Scores on held-out records, in the order of tables."""
    panels: ClassVar[tuple[Panel, ...]] = (ANSWERS_PANEL,)
    """Of the figure of a run, beside the loss."""
    loss_unit: ClassVar[str] = ""
    can_cut_left: ClassVar[bool] = False
    """Whether data.truncation=left differs from right."""
    fixed_keys: ClassVar[tuple[str, ...]] = ()
    """Keys that a run cannot go on with another value of, because the adapter depends on them."""
    bounds: ClassVar[tuple[Bound, ...]] = ()
    """What a site accepts, whatever its policy says of the task."""

    def refusal(self, config: Config) -> str | None:
        """Why values do not go together, where no file and no model is needed to see it.

        A sentence with the key, its value and what to use instead; None: they do.
        """
        return None

    def distinct_roles(self, columns: ColumnsConfig) -> tuple[str, ...]:
        """Roles of `columns` that must not share a column: what is asked and what is learnt."""
        return ()

    def claims(self, columns: ColumnsConfig, error: DataError) -> bool:
        """Whether a source that no task can use was meant for this one, whose `error` helps."""
        return False

    def adapter_paths(self, config: Config) -> dict[str, str]:
        """The directories that `adapters` names in a configuration, by group of tensors."""
        found = {group: value_of(config, key) for group, key in self.adapters.items()}
        return {group: path for group, path in found.items() if path is not None}

    @property
    @abstractmethod
    def records(self) -> "RecordKind":
        """Columns, records, and how they become tokens."""

    def prepare(self, work: LocalWork) -> "Mapping[str, Kept]":
        """Groups of tensors that training needs, and what the client keeps of them.

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
        """Train the adapter that is in the model, in place.

        Args:
            prepared: what `prepare` has returned.
            penalty: a term of the loss that depends on the adapter alone.
        """

    def example_losses(self, work: LocalWork, prepared: "Mapping[str, Kept]") -> "ExampleLosses":
        """Loss of each example by itself, which no other example has a part in.

        A task without it is refused under ``privacy.unit=record`` before a run starts.
        """
        raise NotImplementedError(f"{type(self).__name__} has no losses of single examples")

    def drops_out(self, config: Config) -> bool:
        """Whether training that is private per record takes ``lora.dropout``."""
        return True

    def remarks(self, config: Config, data: "SimulatedData") -> list[str]:
        """What the user should know of a simulation's data, in lines."""
        return []

    def check_held_out(self, config: Config, records: "Records") -> None:
        """Refuse held-out records, at least one, of which none can be scored as asked.

        Raises:
            DataError: names the key, its value and what the records hold.
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
            encoded: the same records as the codec makes them.
            tensors: as clients get them beside the global adapter.
        """

    @abstractmethod
    def score_client(
        self, config: Config, model: "AdaptedModel", examples: Any, tensors: "Mapping[str, Params]"
    ) -> Scores:
        """Scores of the adapter ``tensors["params"]`` on a client's own held-out examples."""
