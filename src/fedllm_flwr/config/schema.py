"""Typed schema of the configuration: every key, its type and its default.

The YAML files under ``conf/`` choose values, this module fixes names and types. Sections are
plain dataclasses, so that code below the configuration needs neither Hydra nor OmegaConf.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """The frozen base model."""

    name: str = "tiny"
    path: str = "embedded"  # hub id, local directory, or "embedded" for the model in the package
    revision: str | None = None
    attention: str = "auto"  # auto | eager | sdpa | flash_attention_2


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021), as PEFT builds them."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: Any = "auto"  # "auto" | "all-linear" | list of module names
    rslora: bool = False
    dora: bool = False


@dataclass
class QuantizationConfig:
    """Quantization of the frozen base model by bitsandbytes."""

    name: str = "none"  # none | int8 | nf4
    double_quantization: bool = True
    compute_dtype: str = "auto"  # auto | float32 | bfloat16 | float16


@dataclass
class ColumnsConfig:
    """Which column of the source plays which role; null means the role is absent."""

    instruction: str | None = "instruction"
    input: str | None = "input"
    output: str | None = "output"
    messages: str | None = None  # chat turns: list of {role, content}
    prompt: str | None = "prompt"
    chosen: str | None = "chosen"
    rejected: str | None = "rejected"
    label: str | None = None  # class of a record, for partitioning and reports


@dataclass
class DataConfig:
    """One data set: where it lies, how its records are read and how they become text."""

    name: str = "demo"
    path: str | None = None  # local file or directory; wins over hub_id
    hub_id: str | None = None
    hub_config: str | None = None
    hub_revision: str | None = None
    split: str = "train"
    preprocessing: str = "none"  # see fedllm_flwr.data.sources.PREPROCESSING
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    client_column: str | None = None  # natural client attribute of the set
    labels: list[str] = field(default_factory=list)  # label set, when answers are classes
    template: str = "alpaca"  # alpaca | vicuna | chat
    max_samples: int | None = None
    eval_path: str | None = None
    eval_split: str | None = None
    eval_columns: ColumnsConfig | None = None  # null: the columns of the training file
    eval_max_samples: int | None = 1000
    validation_fraction: float = 0.05  # held out of the training records when no eval set is given
    truncation: str = "right"  # right: cut the answer's end | left: cut the prompt's start | drop
    on_bad_record: str = "error"  # error | skip


@dataclass
class TaskConfig:
    """What is trained: sft (instruction tuning) or dpo (preference alignment)."""

    name: str = "sft"


@dataclass
class DpoConfig:
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    reference_adapter: str | None = None


@dataclass
class TrainingConfig:
    """Local training of one client in one round."""

    learning_rate: float = 2e-4
    min_learning_rate: float = 1e-6
    max_steps: int = 10  # optimizer steps per round; -1: count num_epochs instead
    num_epochs: float = 1.0
    batch_size: int = 16  # examples per optimizer step, before accumulation
    gradient_accumulation_steps: int = 1
    micro_batch_size: int | None = None  # examples per forward pass; null: chosen per device
    max_length: int = 512  # tokens
    optimizer: str = "adamw"  # adamw | sgd
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    gradient_checkpointing: bool | None = None  # null: chosen per device
    packing: bool | None = None  # padding-free forward; null: where the attention supports it
    device: str = "auto"  # auto | cpu | cuda | mps


@dataclass
class AlgorithmConfig:
    """Aggregation and local correction; which keys matter depends on the algorithm."""

    name: str = "fedavg"
    variant: str = "paper"  # paper | openfedllm
    weighting: str = "auto"  # auto | examples | uniform
    mu: float = 0.0  # proximal term, any algorithm
    eta: float = 1.0  # server learning rate
    beta1: float = 0.0
    beta2: float = 0.0
    tau: float = 1e-3


@dataclass
class PartitionConfig:
    """How one data set becomes clients in simulation."""

    name: str = "iid"  # iid | dirichlet | natural | pathological | size
    column: str | None = None
    alpha: float = 0.5  # dirichlet concentration; size: exponent of the power law
    classes_per_client: int = 2
    min_size: int = 1


@dataclass
class FederationConfig:
    """Who takes part, and on which engine."""

    engine: str = "ray"  # ray | inprocess
    num_clients: int | None = None  # null: what a natural partition yields, 10 otherwise
    sample_clients: int | None = None  # clients per round; null: sample_fraction of them
    sample_fraction: float = 0.4
    num_rounds: int = 12
    min_replies: int = 1
    round_timeout_s: float = 3600.0
    start_timeout_s: float = 120.0  # how long to wait for the clients to be there
    client_cpus: int = 1  # CPU threads of one client
    client_gpus: float = 0.0
    ray_address: str | None = None


@dataclass
class CommunicationConfig:
    """What travels."""

    dtype: str = "bfloat16"  # float32 | bfloat16 | float16


@dataclass
class CheckpointConfig:
    """When the server state is saved, and how many states are kept."""

    every: int = 1
    keep: int = 2


@dataclass
class EvaluationConfig:
    """Central evaluation on the held-out records, and evaluation on the clients' own."""

    central: bool = True
    every: int = 5  # rounds; 0: only at the start and at the end
    batch_tokens: int = 8192  # tokens per forward pass
    clients: bool = False
    suites: list[str] = field(default_factory=list)


@dataclass
class TrackingConfig:
    """Experiment trackers besides the files that every run writes."""

    tensorboard: bool = False
    wandb: bool = False
    mlflow: bool = False
    project: str = "fedllm-flwr"


@dataclass
class Config:
    """The whole configuration of one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    communication: CommunicationConfig = field(default_factory=CommunicationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    init_adapter: str | None = None
    seed: int = 0
    output_dir: str | None = None
    resume: str | None = None
