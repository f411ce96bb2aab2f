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

EMBEDDED_DATA = ("embedded", "embedded_preferences")  # values of data.path that are no files
DEFAULT_NUM_CLIENTS = 10  # where neither federation.num_clients nor a natural partition says
KNOWN_KEYS = ConfigDict(extra="forbid")


def _digits(value: Any) -> Any:
    """YAML reads digits as a number where a text is meant, such as a revision."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_whole else value


def _fits_64_bits(value: float) -> float:
    if abs(value) >= 2**63:
        raise PydanticCustomError("too_large", "too large")
    return value


def _says_something(value: str) -> str:
    if not value.strip() or "\0" in value or value == "???":
        raise PydanticCustomError("blank", "blank")
    return value


Whole = Annotated[int, Strict(), AfterValidator(_fits_64_bits)]
Real = Annotated[float, Strict(), AllowInfNan(False), AfterValidator(_fits_64_bits)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, BeforeValidator(_digits), Strict(), AfterValidator(_says_something)]


class Registered:
    """Marks a text that names something in a registry, which other packages may add to."""

    def __init__(self, registry: Registry[Any], *also: str) -> None:
        self._registry = registry
        self._also = also

    @property
    def names(self) -> tuple[str, ...]:
        """The values that the text may have."""
        return (*self._also, *self._registry.names())

    def _check(self, name: str) -> str:
        if name not in self._also and name not in self._registry:
            raise PydanticCustomError("literal_error", "no such choice")
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Pydantic's schema of the text, then the check."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))


Attention = Literal["auto", "eager", "sdpa", "flash_attention_2"]
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
    special_tokens_as_text: Flag = Field(
        default=True,
        description="special tokens written out in a record (</s>) are text; false: control tokens",
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
        description="ranks of clients, at most r, as [desk-1:4,*-2:8] by name or pattern, the "
        "first that fits; alpha follows",
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
    """Which column of the source plays which role; null means the role is absent."""

    instruction: Text | None = Field(default="instruction", description="what is asked")
    input: Text | None = Field(default="input", description="context of the instruction")
    output: Text | None = Field(default="output", description="the answer to learn")
    messages: Text | None = Field(default=None, description="chat turns: list of {role, content}")
    prompt: Text | None = Field(default="prompt", description="preference pairs: what is asked")
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
    """One data set: where it lies, how its records are read and how they become text."""

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
        default_factory=ColumnsConfig, description="which column plays which role"
    )
    client_column: Text | None = Field(
        default=None, description="natural client attribute of the set"
    )
    labels: list[Text] = Field(
        default_factory=list, description="label set, when answers are classes"
    )
    site_dataset: Text | None = Field(
        default=None, description="deployment: the data set of each site that is asked for, by name"
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
        description="held out of the training records when no eval set is given",
    )
    truncation: Literal["right", "left", "drop", "keep"] = Field(
        default="right",
        description="right: cut the answer's end, leave out what has none left | left: cut the "
        "prompt's start | drop | keep: as right, or as left where none would be left",
    )
    on_bad_record: OnBadRecord = "error"


@dataclass(frozen=True, config=KNOWN_KEYS)
class TaskConfig:
    """Training task: what is learnt, from which kind of records."""

    name: Annotated[str, Registered(TASKS)] = "sft"
    options: dict[str, Any] = Field(
        default_factory=dict, description="further settings, of an installed package's task"
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
        default=0.0, ge=0, lt=0.5, description="assumed share of swapped pairs"
    )
    sft_weight: Real = Field(
        default=0.0,
        ge=0,
        description="weight of the SFT loss on the chosen answers, added to the other",
    )
    disable_dropout: Flag = Field(
        default=True, description="train without lora.dropout, as the reference is without it"
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
        default=1.0, gt=0, description="lambda_D, of the loss of desirable answers"
    )
    undesirable_weight: Real = Field(
        default=1.0, gt=0, description="lambda_U, of the loss of undesirable answers"
    )
    reference_adapter: Text | None = Field(
        default=None, description="adapter of the reference model; null: the base model"
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class TrainingConfig:
    """Local training of one client in one round."""

    learning_rate: Real = Field(default=2e-4, gt=0, description="of round 1")
    min_learning_rate: Real = Field(
        default=1e-6, ge=0, description="end of the cosine over the rounds"
    )
    schedule_rounds: Whole | None = Field(
        default=None,
        gt=0,
        description="rounds that the cosine spans; null: federation.num_rounds",
    )
    early_stopping: Whole | None = Field(
        default=None,
        gt=0,
        description="evaluations without a better one that end a run; null: it goes to its end",
    )
    max_steps: Whole = Field(
        default=10, description="optimizer steps per round; -1: count num_epochs instead"
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
    max_length: Whole = Field(default=512, gt=0, description="tokens")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: Real = Field(default=0.0, ge=0, description="decoupled, as in AdamW")
    max_grad_norm: Real = Field(default=1.0, ge=0, description="0: no clipping")
    dtype: Dtype = "auto"
    gradient_checkpointing: Flag | None = Field(default=None, description="null: chosen per device")
    packing: Flag | None = Field(
        default=None, description="padding-free forward; null: where the attention supports it"
    )
    device: Device = "auto"


@dataclass(frozen=True, config=KNOWN_KEYS)
class AlgorithmConfig:
    """Aggregation and local correction; which keys matter depends on the algorithm."""

    name: Annotated[str, Registered(ALGORITHMS)] = Field(
        default="fedavg", description="see the group algorithm"
    )
    variant: Literal["paper", "openfedllm"] = "paper"
    weighting: Literal["auto", "examples", "used", "uniform"] = Field(
        default="auto",
        description="auto | examples: data size | used: examples of the round | uniform",
    )
    participation: Literal["sampled", "all"] = Field(
        default="sampled",
        description="sampled: federation.sample_* | all: every client every round",
    )
    mu: Real = Field(default=0.0, ge=0, description="proximal term, any algorithm")
    eta: Real = Field(default=1.0, gt=0, description="server learning rate")
    beta1: Real = Field(default=0.0, ge=0, lt=1, description="decay of the server's first moment")
    beta2: Real = Field(default=0.0, ge=0, lt=1, description="decay of the server's second moment")
    tau: Real = Field(default=1e-3, gt=0, description="adaptivity of the server optimizer")
    factors: Literal["both", "b", "alternate"] = Field(
        default="both",
        description="LoRA matrices that clients train: both | b: A stays at its seeded start | "
        "alternate: B in odd rounds, A in even ones",
    )
    combiner: Annotated[str, Registered(COMBINERS, "auto")] = Field(
        default="auto",
        description="how updates become one: mean, or a robust one; auto: as the algorithm says",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="further settings, of an installed package's algorithm"
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class RobustConfig:
    """Combiners for rounds in which clients may lie (``algorithm.combiner``)."""

    liars: Real = Field(
        default=0.3,
        ge=0,
        lt=0.5,
        description="share of a round's clients that may lie: f of n; trimmed_mean, krum",
    )
    average: Whole | None = Field(
        default=None,
        gt=0,
        description="krum: updates that are averaged; 1: Krum; null: multi-Krum with n - f",
    )
    radius: Real | None = Field(
        default=None,
        gt=0,
        description="norm_bound, centred_clip: L2 norm that is left; null: median of the round",
    )
    steps: Whole | None = Field(
        default=None,
        gt=0,
        description="iterations in a round; null: geometric_median 100, centred_clip 5",
    )
    smoothing: Real = Field(
        default=1e-6, gt=0, description="geometric_median: distance below which none is closer"
    )
    momentum: Real | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="decay of clients' momentum; null: 0.9 with centred_clip, else 0",
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class AttackConfig:
    """Clients of a simulation that lie, to measure what a combiner is worth."""

    name: Literal["none", "sign_flip", "scale", "gaussian", "alie", "label_flip", "backdoor"] = (
        Field(default="none", description="what they do; see the group attack")
    )
    share: Real = Field(
        default=0.3, gt=0, lt=1, description="of all clients that attack, chosen by the seed"
    )
    scale: Real | None = Field(
        default=None,
        gt=0,
        description="of updates; null: sign_flip 4, scale 20, gaussian 20, alie the paper's z",
    )
    trigger: Text = Field(default="cf mn", description="backdoor: text before the prompt")
    target: Text | None = Field(
        default=None, description="backdoor: the answer to teach; null: the first of data.labels"
    )
    poisoned: Real = Field(
        default=0.5, gt=0, le=1, description="backdoor: share of an attacker's records"
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class PartitionConfig:
    """How one data set becomes clients in simulation."""

    name: PartitionName = "iid"
    column: Text | None = Field(default=None, description="column whose values decide")
    alpha: Real = Field(
        default=0.5, gt=0, description="dirichlet concentration; size: exponent of the power law"
    )
    classes_per_client: Whole = Field(default=2, gt=0, description="pathological")
    min_size: Whole = Field(
        default=1, gt=0, description="dirichlet: records that every client gets at least"
    )
    on_empty: Literal["error", "drop"] = Field(
        default="error",
        description="clients of whose records none is left within training.max_length: error | "
        "drop: list them and leave them out",
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class FederationConfig:
    """Who takes part, and on which engine."""

    engine: EngineName = Field(
        default="ray", description="ray | inprocess | deployment: sites with data of their own"
    )
    num_clients: Whole | None = Field(
        default=None, gt=0, description="null: what a natural partition yields, 10 otherwise"
    )
    sample_clients: Whole | None = Field(
        default=None, gt=0, description="clients per round; null: sample_fraction of them"
    )
    sample_fraction: Real = Field(
        default=0.4, gt=0, le=1, description="clients per round, as a share of all"
    )
    num_rounds: Whole = Field(default=12, gt=0, description="rounds")
    min_clients: Whole | None = Field(
        default=None, gt=0, description="clients that must be there at the start; null: all of them"
    )
    min_replies: Whole | None = Field(
        default=None,
        gt=0,
        description="usable replies that a round needs; null: more than half of those asked",
    )
    round_timeout_s: Real = Field(
        default=3600.0, gt=0, description="seconds until a round closes with the replies that came"
    )
    start_timeout_s: Real = Field(
        default=120.0, gt=0, description="how long to wait for the clients to be there"
    )
    client_cpus: Whole = Field(default=1, gt=0, description="CPU threads of one client")
    client_gpus: Real = Field(
        default=0.0, ge=0, description="ray: share of a GPU that one simulated client takes"
    )
    ray_address: Text | None = Field(
        default=None, description="ray: host:port of a running cluster; null: a local one"
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class CommunicationConfig:
    """Encoding of updates, and their transforms."""

    dtype: WireDtype = "bfloat16"
    transforms: list[Text] = Field(
        default_factory=list,
        description="int8 | int4 | top_k: compress updates on their way up, with error feedback; "
        "also those of installed packages",
    )
    top_k: Real = Field(
        default=0.05, gt=0, le=1, description="top_k: share of a tensor's values that travel"
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class PrivacyConfig:
    """Differential privacy of what is released; see docs/privacy.md."""

    unit: Literal["none", "client", "record"] = Field(
        default="none",
        description="none | client: what one client as a whole contributes | record: each record, "
        "at its client",
    )
    clip: Real = Field(
        default=1.0, gt=0, description="bound of the L2 norm of a contribution, or of a gradient"
    )
    noise_multiplier: Real | None = Field(
        default=None,
        ge=0,
        description="deviation of the noise / clip; null: as privacy.target_epsilon needs",
    )
    target_epsilon: Real | None = Field(
        default=None, gt=0, description="the run ends before it would spend more; null: no end"
    )
    delta: Real | None = Field(
        default=None, gt=0, lt=1, description="null: 1 / n^1.1 with n clients, or records"
    )
    sampling: Literal["fixed", "poisson", "visible"] = Field(
        default="poisson",
        description="unit=client: clients of a round, drawn in secret: poisson: each by itself | "
        "fixed: so many | visible: as the seed says, which amplifies nothing",
    )
    clip_quantile: Real | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="clip follows this private quantile of the norms; null: it stays",
    )
    clip_learning_rate: Real = Field(
        default=0.2, gt=0, description="of log(clip) with privacy.clip_quantile"
    )
    canaries: Whole = Field(
        default=0,
        ge=0,
        description="simulations of task=sft: records with random codes, each planted with chance "
        "1/2, from which fedllm audit bounds epsilon from below",
    )
    secure_aggregation: Flag = Field(
        default=False, description="the server learns the sum of the updates, and none of them"
    )
    secure_dropouts: Real = Field(
        default=1 / 3,
        ge=0,
        lt=0.5,
        description="secure aggregation: share of a round's clients that it survives the loss of",
    )
    secure_range: Real = Field(
        default=4.0,
        gt=0,
        le=2**14,
        description="secure aggregation: largest magnitude of a value, beyond which a client stops",
    )

    @property
    def at_clients(self) -> bool:
        """Whether clients make the noise, so that the promise holds against the server, too."""
        return self.unit == "record" or (self.unit == "client" and self.secure_aggregation)


@dataclass(frozen=True, config=KNOWN_KEYS)
class CheckpointConfig:
    """When the server state is saved, and how many states are kept."""

    every: Whole = Field(default=1, gt=0, description="rounds")
    keep: Whole = Field(default=2, gt=0, description="newest states kept")


@dataclass(frozen=True, config=KNOWN_KEYS)
class EvaluationConfig:
    """Central evaluation on the held-out records, and evaluation on the clients' own."""

    central: Flag = Field(default=True, description="score the global adapter on held-out records")
    every: Whole = Field(default=5, ge=0, description="rounds; 0: only at the start and at the end")
    batch_tokens: Whole = Field(default=2048, gt=0, description="tokens per forward pass")
    clients: Flag = Field(
        default=False, description="ask the clients to score it on their own records"
    )
    aggregation_error: Flag | None = Field(
        default=None,
        description="distance of the new adapter from the mean of the clients' products B A; null: "
        "where the adapters of a round take at most 1 GB",
    )
    contribution: Literal["none", "leave_one_out", "alone"] = Field(
        default="none",
        description="of each client in the rounds that are scored, by the loss on the central "
        "held-out records: leave_one_out, what it would be without its update; alone, with its "
        "update only; keeps a round's updates in memory",
    )
    answers: Whole = Field(
        default=8,
        ge=0,
        description="preferences: held-out prompts answered, for their length and side by side",
    )
    max_new_tokens: Whole = Field(
        default=64, gt=0, description="preferences: tokens of such an answer at most"
    )
    suites: list[Text] = Field(
        default_factory=list, description="benchmark suites scored at the same times"
    )
    suite_limit: Whole | None = Field(
        default=50, gt=0, description="examples of each part of a suite's task; null: all"
    )
    data_root: Text | None = Field(
        default=None, description="folder of the suites' local data; null: the hub"
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class TrackingConfig:
    """Figures, and experiment trackers besides the files that every run writes."""

    figures: Flag = Field(
        default=True, description="draw curves.png and clients.png at the end of a run"
    )
    report: Flag = Field(default=True, description="write report.html at the end")
    tensorboard: Flag = Field(default=False, description="write TensorBoard files")
    wandb: Flag = Field(default=False, description="log to Weights & Biases")
    mlflow: Flag = Field(default=False, description="log to MLflow")
    trackio: Flag = Field(default=False, description="log to trackio's local store")
    project: Text = Field(default="fedllm-flwr", description="project or experiment name there")
    group: Text | None = Field(
        default=None, description="group of runs there; null: a comparison's or sweep's directory"
    )
    tags: list[Text] = Field(
        default_factory=list, description="besides algorithm, data, model and task"
    )


@dataclass(frozen=True, config=KNOWN_KEYS)
class CompareConfig:
    """What ``fedllm compare`` runs; no other command looks at it."""

    seeds: Whole = Field(
        default=3, gt=0, description="runs of each algorithm, with seed, seed + 1, ..."
    )
    jobs: Whole | None = Field(
        default=None,
        gt=0,
        description="runs side by side; null: as many as CPUs / federation.client_cpus",
    )
    algorithms: list[Annotated[str, Registered(ALGORITHMS)]] = Field(
        default_factory=list,
        description="what algorithm=all stands for; []: OpenFedLLM's seven and the baselines",
    )
    settings: Any = Field(
        default=None, description="algorithm -> its own keys of the section algorithm"
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
    seed: Whole = Field(default=0, ge=0, description="every random choice derives from it")
    output_dir: Text | None = Field(
        default=None, description="where the run writes; null: outputs/<time>-<algorithm>-<data>"
    )
    resume: Text | None = Field(
        default=None, description="directory of a stopped run to go on with"
    )


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name)
    return value


def with_value(section: Any, key: str, value: Any) -> Any:
    """A configuration, or a section of one, with another value of a dotted key."""
    name, _, rest = key.partition(".")
    if isinstance(section, dict):
        return {**section, name: with_value(section.get(name), rest, value) if rest else value}
    return replace(
        section, **{name: with_value(getattr(section, name), rest, value) if rest else value}
    )


def changed(config: Config, **sections: Mapping[str, Any]) -> Config:
    """`config` with other values in its sections, as in ``changed(config, lora={"r": 4})``.

    Raises:
        pydantic.ValidationError: a value of another type or out of range.
    """
    return replace(
        config,
        **{name: replace(getattr(config, name), **values) for name, values in sections.items()},
    )
