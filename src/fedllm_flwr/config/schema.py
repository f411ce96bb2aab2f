"""Typed schema of the configuration: every key with its type, range, default and meaning.

The YAML files under ``conf/`` choose values, this module fixes names and types. Sections are frozen
dataclasses that pydantic checks whenever one is made, `dataclasses.replace` included; nothing
below the configuration needs Hydra or OmegaConf.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, AllowInfNan, BeforeValidator, ConfigDict, Field, Strict
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError, core_schema

from fedllm_flwr.plugins import ALGORITHMS, COMBINERS, PREPROCESSING, TASKS, TEMPLATES, Registry

EMBEDDED_DATA = ("embedded", "embedded_preferences")  # values of data.path that are not files
DEFAULT_NUM_CLIENTS = 10  # if neither federation.num_clients nor a natural partition defines it
KNOWN_KEYS = ConfigDict(extra="forbid")


def _digits(value: Any) -> Any:
    """Convert an integer to text: YAML reads a revision made of digits as a number."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_whole else value


def _fits_64_bits(value: float) -> float:
    if abs(value) >= 2**63:
        raise PydanticCustomError("too_large", "too large")
    return value


def _is_not_blank(value: str) -> str:
    if not value.strip() or "\0" in value or value == "???":
        raise PydanticCustomError("blank", "blank")
    return value


def _names_rounds(value: str) -> str:
    kind, _, number = value.partition(":")
    if value in ("none", "all") or (kind == "every" and number.isdecimal() and int(number) > 0):
        return value
    raise PydanticCustomError("rounds", "choose none, all, or every:N")


Whole = Annotated[int, Strict(), AfterValidator(_fits_64_bits)]
Real = Annotated[float, Strict(), AllowInfNan(False), AfterValidator(_fits_64_bits)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, BeforeValidator(_digits), Strict(), AfterValidator(_is_not_blank)]


class Registered:
    """Marks a text that must be a name in a registry, to which other packages can add."""

    def __init__(self, registry: Registry[Any], *also: str) -> None:
        self._registry = registry
        self._also = also

    @property
    def names(self) -> tuple[str, ...]:
        """The allowed values."""
        return (*self._also, *self._registry.names())

    def _check(self, name: str) -> str:
        if name not in self._also and name not in self._registry:
            raise PydanticCustomError("literal_error", "no such choice")
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Pydantic's schema of the text, followed by the check."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))


Attention = Literal[
    "auto",
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
WireDtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
EngineName = Literal["ray", "inprocess", "deployment"]
DpoLoss = Literal[
    "sigmoid",
    "ipo",
    "hinge",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
]
OnBadRecord = Literal["error", "skip"]
PartitionName = Literal["iid", "dirichlet", "natural", "pathological", "size"]


DPO_LOSSES: tuple[str, ...] = get_args(DpoLoss)


@dataclass(frozen=True, config=KNOWN_KEYS)
class ModelConfig:
    """The frozen base model."""

    name: Text = Field(default="tiny", description="label of the choice")
    path: Text = Field(
        default="embedded",
        description='hub id, local directory, or "embedded" for the model in the package',
    )
    revision: Text | None = Field(
        default=None, description="commit, branch or tag on the hub; null: the default branch"
    )
    attention: Attention = "auto"
    kernels: Literal["torch", "liger"] = Field(
        default="torch", description="liger: fused norms, rotary positions and MLPs, on CUDA"
    )
    special_tokens_as_text: Flag = Field(
        default=True,
        description="read special tokens in a record (</s>) as text; false: as control tokens",
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021), as PEFT builds them."""

    r: Whole = Field(default=8, gt=0, description="rank of the adapter")
    alpha: Whole = Field(
        default=16, gt=0, description="scale of the adapter: alpha / r, with rslora alpha / sqrt(r)"
    )
    ranks: list[Text] = Field(
        default_factory=list,
        description="ranks of clients, at most r, by name or pattern, as [retail:4,t*:2]; the "
        "first match counts, and alpha is scaled with the rank",
    )
    dropout: Real = Field(default=0.05, ge=0, lt=1, description="probability")
    target_modules: Any = Field(
        default="auto", description='"auto" | "all-linear" | list of module names'
    )
    rslora: Flag = Field(default=False, description="rank-stabilised scale (Kalajdzievski 2023)")
    dora: Flag = Field(default=False, description="weight-decomposed adapters (Liu et al. 2024)")


@dataclass(frozen=True, config=KNOWN_KEYS)
class QuantizationConfig:
    """Quantization of the frozen base model by bitsandbytes."""

    name: Literal["none", "int8", "nf4"] = "none"
    double_quantization: Flag = Field(
        default=True, description="nf4: quantize the quantization constants too"
    )
    compute_dtype: Dtype = "auto"


@dataclass(frozen=True, config=KNOWN_KEYS)
class ColumnsConfig:
    """The source's column for each role; null means that the role is absent."""

    instruction: Text | None = Field(default="instruction", description="the instruction")
    input: Text | None = Field(default="input", description="context of the instruction")
    output: Text | None = Field(default="output", description="the target answer")
    messages: Text | None = Field(default=None, description="chat turns: list of {role, content}")
    prompt: Text | None = Field(default="prompt", description="preference pairs: the prompt")
    chosen: Text | None = Field(default="chosen", description="preference pairs: the better answer")
    rejected: Text | None = Field(
        default="rejected", description="preference pairs: the worse answer"
    )
    answer: Text | None = Field(default="answer", description="judged answers: the answer")
    desirable: Text | None = Field(
        default="label", description="judged answers: true if the answer is desirable, else false"
    )
    label: Text | None = Field(
        default=None, description="class of a record, for partitioning and reports"
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class DataConfig:
    """One data set: its location, how its records are read, and how they become text."""

    name: Text = Field(default="demo", description="label of the choice")
    path: Text | None = Field(default=None, description="local file or directory; wins over hub_id")
    hub_id: Text | None = Field(default=None, description="data set on the hub")
    hub_config: Text | None = Field(
        default=None, description="configuration of the data set on the hub"
    )
    hub_revision: Text | None = Field(default=None, description="commit, branch or tag on the hub")
    split: Text = Field(default="train", description="split to train on")
    preprocessing: Annotated[str, Registered(PREPROCESSING)] = "none"
    columns: ColumnsConfig = Field(
        default_factory=ColumnsConfig, description="the source's column for each role"
    )
    client_column: Text | None = Field(
        default=None, description="column that identifies natural clients"
    )
    labels: list[Text] = Field(
        default_factory=list, description="label set, if answers are classes"
    )
    site_dataset: Text | None = Field(
        default=None, description="deployment: name of the data set that each site trains on"
    )
    template: Annotated[str, Registered(TEMPLATES)] = "alpaca"
    max_samples: Whole | None = Field(
        default=None, gt=0, description="training records used; null: all"
    )
    eval_path: Text | None = Field(
        default=None, description="local file or directory of held-out records"
    )
    eval_split: Text | None = Field(default=None, description="split of held-out records")
    eval_columns: ColumnsConfig | None = Field(
        default=None, description="null: the columns of the training file"
    )
    eval_max_samples: Whole | None = Field(
        default=1000, gt=0, description="held-out records used; null: all"
    )
    validation_fraction: Real = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="fraction of training records held out if there is no evaluation set",
    )
    near_duplicates: Literal["keep", "drop"] = Field(
        default="keep",
        description="simulations: training records that equal a held-out one or contain 80 % of "
        "its 4-grams of words: keep | drop; also those near to data.test_path",
    )
    test_path: Text | None = Field(
        default=None,
        description="JSON lines with the texts of a later test; with near_duplicates=drop no "
        "record near to one is trained or validated on",
    )
    truncation: Literal["right", "left", "drop", "keep"] = Field(
        default="right",
        description="of examples above training.max_length: right: cut the answer's end, drop if "
        "nothing is left of it | left: cut the prompt's start | drop: drop the example | keep: as "
        "right, but as left if nothing would be left of the answer",
    )
    on_bad_record: OnBadRecord = "error"


@dataclass(frozen=True, config=KNOWN_KEYS)
class TaskConfig:
    """Training task: the objective and the kind of records that it learns from."""

    name: Annotated[str, Registered(TASKS)] = "sft"
    options: dict[str, Any] = Field(
        default_factory=dict, description="further settings of a task from an installed package"
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class DpoConfig:
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: Real = Field(
        default=0.1, gt=0, description="strength of the pull towards the reference model"
    )
    loss_type: DpoLoss = Field(
        default="sigmoid", description="sigmoid | ipo | hinge | robust | others of TRL's DPOTrainer"
    )
    label_smoothing: Real = Field(
        default=0.0, ge=0, lt=0.5, description="assumed fraction of swapped pairs"
    )
    sft_weight: Real = Field(
        default=0.0,
        ge=0,
        description="weight of an additional SFT loss on the chosen answers",
    )
    disable_dropout: Flag = Field(
        default=True, description="train without lora.dropout, which the reference does not have"
    )
    reference_adapter: Text | None = Field(
        default=None, description="adapter of the reference model; null: the base model"
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class KtoConfig:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024)."""

    beta: Real = Field(
        default=0.1, gt=0, description="strength of the pull towards the reference model"
    )
    desirable_weight: Real = Field(
        default=1.0, gt=0, description="lambda_D, weight of the loss on desirable answers"
    )
    undesirable_weight: Real = Field(
        default=1.0, gt=0, description="lambda_U, weight of the loss on undesirable answers"
    )
    reference_adapter: Text | None = Field(
        default=None, description="adapter of the reference model; null: the base model"
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class TrainingConfig:
    """Local training of one client in one round."""

    learning_rate: Real = Field(default=2e-4, gt=0, description="learning rate of round 1")
    min_learning_rate: Real = Field(
        default=1e-6, ge=0, description="final value of the cosine schedule over the rounds"
    )
    schedule_rounds: Whole | None = Field(
        default=None,
        gt=0,
        description="rounds that the cosine schedule spans; null: federation.num_rounds",
    )
    early_stopping: Whole | None = Field(
        default=None,
        gt=0,
        description="end the run after so many evaluations without improvement; null: never",
    )
    max_steps: Whole = Field(
        default=10, description="optimizer steps per round; -1: use num_epochs instead"
    )
    num_epochs: Real = Field(
        default=1.0, gt=0, description="passes over a client's data per round, with max_steps=-1"
    )
    batch_size: Whole = Field(
        default=16, gt=0, description="examples per optimizer step, before accumulation"
    )
    gradient_accumulation_steps: Whole = Field(
        default=1, gt=0, description="batches per optimizer step"
    )
    micro_batch_size: Whole | None = Field(
        default=None, gt=0, description="examples per forward pass; null: chosen per device"
    )
    max_length: Whole = Field(default=512, gt=0, description="tokens per example")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: Real = Field(default=0.0, ge=0, description="decoupled, as in AdamW")
    max_grad_norm: Real = Field(default=1.0, ge=0, description="0: no clipping")
    dtype: Dtype = "auto"
    gradient_checkpointing: Flag | None = Field(default=None, description="null: chosen per device")
    packing: Flag | None = Field(
        default=None, description="padding-free batches; null: if the attention supports them"
    )
    device: Device = "auto"


@dataclass(frozen=True, config=KNOWN_KEYS)
class AlgorithmConfig:
    """Aggregation and local correction; the keys in use depend on the algorithm."""

    name: Annotated[str, Registered(ALGORITHMS)] = Field(
        default="fedavg", description="see the group algorithm"
    )
    variant: Literal["paper", "openfedllm"] = "paper"
    weighting: Literal["auto", "examples", "used", "uniform"] = Field(
        default="auto",
        description="weights of the updates: auto: those of the algorithm | examples: data size | "
        "used: examples used in the round | uniform",
    )
    participation: Literal["sampled", "all"] = Field(
        default="sampled",
        description="sampled: federation.sample_* | all: every client in every round",
    )
    mu: Real = Field(default=0.0, ge=0, description="proximal term, with any algorithm")
    eta: Real = Field(default=1.0, gt=0, description="server learning rate")
    beta1: Real = Field(default=0.0, ge=0, lt=1, description="decay of the server's first moment")
    beta2: Real = Field(default=0.0, ge=0, lt=1, description="decay of the server's second moment")
    tau: Real = Field(default=1e-3, gt=0, description="adaptivity of the server optimizer")
    factors: Literal["both", "b", "alternate"] = Field(
        default="both",
        description="LoRA matrices that clients train: both | b: A keeps its initial value | "
        "alternate: B in odd rounds, A in even ones",
    )
    combiner: Annotated[str, Registered(COMBINERS, "auto")] = Field(
        default="auto",
        description="how updates are combined: mean, or a robust combiner; auto: the algorithm's",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="further settings of the algorithm's rule"
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class RobustConfig:
    """Robust combiners, for clients that may be malicious (``algorithm.combiner``)."""

    liars: Real = Field(
        default=0.3,
        ge=0,
        lt=0.5,
        description="trimmed_mean, krum: fraction of a round's clients that may be malicious",
    )
    average: Whole | None = Field(
        default=None,
        gt=0,
        description="krum: number of updates to average; 1: Krum; null: multi-Krum with n - f",
    )
    radius: Real | None = Field(
        default=None,
        gt=0,
        description="norm_bound, centred_clip: L2 norm to clip to; null: the round's median",
    )
    steps: Whole | None = Field(
        default=None,
        gt=0,
        description="iterations per round; null: geometric_median 100, centred_clip 5",
    )
    smoothing: Real = Field(
        default=1e-6, gt=0, description="geometric_median: lower bound of a distance"
    )
    momentum: Real | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="decay of the clients' momentum; null: 0.9 with centred_clip, otherwise 0",
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class AttackConfig:
    """Malicious clients in a simulation, to measure how robust a combiner is."""

    name: Literal["none", "sign_flip", "scale", "gaussian", "alie", "label_flip", "backdoor"] = (
        Field(default="none", description="the attack; see the group attack")
    )
    share: Real = Field(
        default=0.3, gt=0, lt=1, description="fraction of clients that attack, chosen by the seed"
    )
    scale: Real | None = Field(
        default=None,
        gt=0,
        description="factor of the attack; null: sign_flip 4, scale 20, gaussian 20, alie the "
        "paper's z",
    )
    trigger: Text = Field(default="cf mn", description="backdoor: text added before the prompt")
    target: Text | None = Field(
        default=None, description="backdoor: the target answer; null: the first of data.labels"
    )
    poisoned: Real = Field(
        default=0.5, gt=0, le=1, description="backdoor: poisoned fraction of an attacker's records"
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class PartitionConfig:
    """How a simulation partitions one data set into clients."""

    name: PartitionName = "iid"
    column: Text | None = Field(default=None, description="column to partition by")
    alpha: Real = Field(
        default=0.5, gt=0, description="dirichlet concentration; size: exponent of the power law"
    )
    classes_per_client: Whole = Field(
        default=2, gt=0, description="pathological: classes per client"
    )
    min_size: Whole = Field(
        default=1, gt=0, description="dirichlet: minimum number of records per client"
    )
    on_empty: Literal["error", "drop"] = Field(
        default="error",
        description="clients without a usable record within training.max_length: error | drop: "
        "list them and leave them out",
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class FederationConfig:
    """The clients of a run, and the engine that runs them."""

    engine: EngineName = Field(
        default="ray", description="ray | inprocess | deployment: sites with their own data"
    )
    num_clients: Whole | None = Field(
        default=None, gt=0, description="null: the clients of a natural partition, otherwise 10"
    )
    sample_clients: Whole | None = Field(
        default=None, gt=0, description="clients per round; null: sample_fraction of all"
    )
    sample_fraction: Real = Field(
        default=0.4, gt=0, le=1, description="clients per round, as a fraction of all"
    )
    num_rounds: Whole = Field(default=12, gt=0, description="rounds")
    min_clients: Whole | None = Field(
        default=None, gt=0, description="clients that must be connected at the start; null: all"
    )
    min_replies: Whole | None = Field(
        default=None,
        gt=0,
        description="minimum of usable replies per round; null: more than half of those sampled",
    )
    round_timeout_s: Real = Field(
        default=3600.0, gt=0, description="seconds to wait for the replies of a round"
    )
    start_timeout_s: Real = Field(
        default=120.0, gt=0, description="seconds to wait for clients to connect at the start"
    )
    client_cpus: Whole = Field(default=1, gt=0, description="CPU threads per client")
    client_gpus: Real = Field(
        default=0.0, ge=0, description="ray: fraction of a GPU per simulated client"
    )
    client_processes: Whole = Field(
        default=1,
        gt=0,
        description="processes that divide a client's batches, on CUDA each on its own GPU",
    )
    ray_address: Text | None = Field(
        default=None, description="ray: host:port of a running cluster; null: a local one"
    )

    @property
    def threads_per_process(self) -> int:
        """CPU threads of each of a client's processes."""
        return max(1, self.client_cpus // self.client_processes)


@dataclass(frozen=True, config=KNOWN_KEYS)
class CommunicationConfig:
    """Encoding of updates on the wire, and update transforms."""

    dtype: WireDtype = "bfloat16"
    transforms: list[Text] = Field(
        default_factory=list,
        description="int8 | int4 | top_k: compress the clients' updates, with error feedback; or "
        "transforms of installed packages",
    )
    top_k: Real = Field(
        default=0.05, gt=0, le=1, description="top_k: fraction of a tensor's values to send"
    )
    downlink: Literal["whole", "int8", "int4"] = Field(
        default="whole",
        description="whole | int8, int4: clients get quantized changes of what they have received",
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class PrivacyConfig:
    """Differential privacy and secure aggregation; see docs/privacy.md."""

    unit: Literal["none", "client", "record"] = Field(
        default="none",
        description="what is protected: none | client: all records of a client together | record: "
        "each record, by noise at its client",
    )
    clip: Real = Field(
        default=1.0, gt=0, description="L2 bound of a client's contribution, or of a gradient"
    )
    noise_multiplier: Real | None = Field(
        default=None,
        ge=0,
        description="standard deviation of the noise / clip; null: from privacy.target_epsilon",
    )
    target_epsilon: Real | None = Field(
        default=None, gt=0, description="end the run before it would exceed it; null: no limit"
    )
    delta: Real | None = Field(
        default=None, gt=0, lt=1, description="null: 1 / n^1.1 for n clients, or n records"
    )
    sampling: Literal["fixed", "poisson", "visible"] = Field(
        default="poisson",
        description="unit=client: sampling of a round's clients: poisson: secret, independent | "
        "fixed: secret, of fixed size | visible: by the run's seed, without amplification",
    )
    clip_quantile: Real | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="let clip follow this private quantile of the norms; null: constant clip",
    )
    clip_learning_rate: Real = Field(
        default=0.2, gt=0, description="step size of log(clip) with privacy.clip_quantile"
    )
    canaries: Whole = Field(
        default=0,
        ge=0,
        description="simulations of task=sft: number of records with random codes, each inserted "
        "with probability 1/2, from which fedllm audit computes a lower bound of epsilon",
    )
    secure_aggregation: Flag = Field(
        default=False, description="the server learns only the sum of the updates"
    )
    secure_dropouts: Real = Field(
        default=1 / 3,
        ge=0,
        lt=0.5,
        description="secure aggregation: fraction of a round's clients that may drop out",
    )
    secure_range: Real = Field(
        default=4.0,
        gt=0,
        le=2**14,
        description="secure aggregation: largest magnitude of a value; a client with more fails",
    )

    secure_ring: Whole = Field(
        default=32,
        ge=16,
        le=32,
        multiple_of=16,
        description="secure aggregation: bits of a value on the way up, 32 or, with "
        "privacy.unit=client, 16",
    )

    @property
    def at_clients(self) -> bool:
        """Whether clients add the noise, so that the guarantee also holds against the server."""
        return self.unit == "record" or (self.unit == "client" and self.secure_aggregation)


@dataclass(frozen=True, config=KNOWN_KEYS)
class CheckpointConfig:
    """How often the server state is saved, and how many checkpoints are kept."""

    every: Whole = Field(default=1, gt=0, description="rounds between checkpoints")
    keep: Whole = Field(default=2, gt=0, description="number of newest checkpoints to keep")
    adapters: Annotated[Text, AfterValidator(_names_rounds)] = Field(
        default="none",
        description="adapters kept besides those of the newest checkpoints: none, all "
        "rounds' or every:N rounds'",
    )

    def keeps_adapter(self, round: int) -> bool:
        """Whether the adapter of a round is kept."""
        if self.adapters == "none":
            return False
        return self.adapters == "all" or round % int(self.adapters.partition(":")[2]) == 0


@dataclass(frozen=True, config=KNOWN_KEYS)
class EvaluationConfig:
    """Central evaluation on the held-out records, and evaluation on the clients' own."""

    central: Flag = Field(default=True, description="score the global adapter on held-out records")
    every: Whole = Field(
        default=5, ge=0, description="rounds between evaluations; 0: only at the start and the end"
    )
    batch_tokens: Whole = Field(default=2048, gt=0, description="tokens per forward pass")
    clients: Flag = Field(
        default=False, description="also score it on the clients' own held-out records"
    )
    aggregation_error: Flag | None = Field(
        default=None,
        description="measure the distance of the new adapter from the mean of the clients' "
        "products B A; null: if the adapters of a round take at most 1 GB",
    )
    contribution: Literal["none", "leave_one_out", "alone"] = Field(
        default="none",
        description="score each client's contribution by the central held-out loss: leave_one_out: "
        "without its update | alone: with only its update; in evaluated rounds, whose updates are "
        "kept in a temporary file",
    )
    answers: Whole = Field(
        default=8,
        ge=0,
        description="preferences: held-out prompts to answer, for lengths and side by side",
    )
    max_new_tokens: Whole = Field(
        default=64, gt=0, description="preferences: largest number of tokens of such an answer"
    )
    suites: list[Text] = Field(
        default_factory=list, description="benchmark suites to score in the same rounds"
    )
    suite_subset: Whole | None = Field(
        default=50,
        gt=0,
        description="examples per part of a suite's task, drawn at random, the same in every round "
        "and run; null: all",
    )
    data_root: Text | None = Field(
        default=None, description="folder of the suites' local data; null: the hub"
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class TrackingConfig:
    """Figures and experiment trackers, in addition to the files that every run writes."""

    figures: Flag = Field(
        default=True, description="draw curves.png and clients.png at the end of a run"
    )
    report: Flag = Field(default=True, description="write report.html at the end")
    tensorboard: Flag = Field(default=False, description="write TensorBoard files")
    wandb: Flag = Field(default=False, description="log to Weights & Biases")
    mlflow: Flag = Field(default=False, description="log to MLflow")
    trackio: Flag = Field(default=False, description="log to trackio's local store")
    project: Text = Field(default="fedllm-flwr", description="project or experiment of trackers")
    group: Text | None = Field(
        default=None, description="group of runs; null: the directory of the comparison or sweep"
    )
    tags: list[Text] = Field(
        default_factory=list, description="tags besides algorithm, data, model and task"
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class CompareConfig:
    """The runs of ``fedllm compare``; no other command reads these keys."""

    seeds: Whole = Field(
        default=3, gt=0, description="runs per algorithm, with seed, seed + 1, ..."
    )
    jobs: Whole | None = Field(
        default=None,
        gt=0,
        description="runs in parallel; null: CPUs / federation.client_cpus",
    )
    algorithms: list[Annotated[str, Registered(ALGORITHMS)]] = Field(
        default_factory=list,
        description="the algorithms of algorithm=all; []: OpenFedLLM's seven and the baselines",
    )
    settings: Any = Field(
        default=None, description="algorithm -> its values of keys of the section algorithm"
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class Config:
    """The whole configuration of one run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    quantization: QuantizationConfig = Field(default_factory=QuantizationConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    dpo: DpoConfig = Field(default_factory=DpoConfig)
    kto: KtoConfig = Field(default_factory=KtoConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    robust: RobustConfig = Field(default_factory=RobustConfig)
    attack: AttackConfig = Field(default_factory=AttackConfig)
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    federation: FederationConfig = Field(default_factory=FederationConfig)
    communication: CommunicationConfig = Field(default_factory=CommunicationConfig)
    privacy: PrivacyConfig = Field(default_factory=PrivacyConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    compare: CompareConfig = Field(default_factory=CompareConfig)
    init_adapter: Text | None = Field(
        default=None, description="adapter to start from; null: a fresh one"
    )
    seed: Whole = Field(default=0, ge=0, description="seed of every random choice")
    output_dir: Text | None = Field(
        default=None, description="run directory; null: outputs/<time>-<algorithm>-<data>"
    )
    resume: Text | None = Field(default=None, description="directory of a stopped run to resume")


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name)
    return value


def with_value(section: Any, key: str, value: Any) -> Any:
    """A copy of a configuration or section, with the dotted key set to `value`."""
    name, _, rest = key.partition(".")
    if isinstance(section, dict):
        return {**section, name: with_value(section.get(name), rest, value) if rest else value}
    return replace(
        section, **{name: with_value(getattr(section, name), rest, value) if rest else value}
    )


def changed(config: Config, **sections: Mapping[str, Any]) -> Config:
    """A copy of `config` with overrides, as in ``changed(config, lora={"r": 4})``.

    Raises:
        pydantic.ValidationError: a value has the wrong type or is out of range.
    """
    return replace(
        config,
        **{name: replace(getattr(config, name), **values) for name, values in sections.items()},
    )
