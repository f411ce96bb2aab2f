"""Typed schema of the configuration: every key, its type and its default.

The YAML files under ``conf/`` choose values, this module fixes names and types. Sections are
plain dataclasses, so that code below the configuration needs neither Hydra nor OmegaConf.
"""

from dataclasses import dataclass, field
from typing import Any

EMBEDDED_DATA = ("embedded", "embedded_preferences")  # values of data.path that are no files
DEFAULT_NUM_CLIENTS = 10  # where neither federation.num_clients nor a natural partition says


@dataclass
class ModelConfig:
    """The frozen base model."""

    name: str = "tiny"  # label of the choice
    path: str = "embedded"  # hub id, local directory, or "embedded" for the model in the package
    revision: str | None = None  # commit, branch or tag on the hub; null: the default branch
    attention: str = "auto"  # auto | eager | sdpa | flash_attention_2


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021), as PEFT builds them."""

    r: int = 8  # rank of the adapter
    alpha: int = 16  # scale of the adapter: alpha / r, with rslora alpha / sqrt(r)
    dropout: float = 0.05  # probability
    target_modules: Any = "auto"  # "auto" | "all-linear" | list of module names
    rslora: bool = False  # rank-stabilised scale (Kalajdzievski 2023)
    dora: bool = False  # weight-decomposed adapters (Liu et al. 2024)


@dataclass
class QuantizationConfig:
    """Quantization of the frozen base model by bitsandbytes."""

    name: str = "none"  # none | int8 | nf4
    double_quantization: bool = True  # nf4: quantize the quantization constants too
    compute_dtype: str = "auto"  # auto | float32 | bfloat16 | float16


@dataclass
class ColumnsConfig:
    """Which column of the source plays which role; null means the role is absent."""

    instruction: str | None = "instruction"  # what is asked
    input: str | None = "input"  # context of the instruction
    output: str | None = "output"  # the answer to learn
    messages: str | None = None  # chat turns: list of {role, content}
    prompt: str | None = "prompt"  # preference pairs: what is asked
    chosen: str | None = "chosen"  # preference pairs: the better answer
    rejected: str | None = "rejected"  # preference pairs: the worse answer
    label: str | None = None  # class of a record, for partitioning and reports


@dataclass
class DataConfig:
    """One data set: where it lies, how its records are read and how they become text."""

    name: str = "demo"  # label of the choice
    path: str | None = None  # local file or directory; wins over hub_id
    hub_id: str | None = None  # data set on the hub
    hub_config: str | None = None  # configuration of the data set on the hub
    hub_revision: str | None = None  # commit, branch or tag on the hub
    split: str = "train"  # split to train on
    preprocessing: str = "none"  # none | alpaca | fingpt | medalpaca | mathinstruct | hh_rlhf
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)  # which column plays which role
    client_column: str | None = None  # natural client attribute of the set
    labels: list[str] = field(default_factory=list)  # label set, when answers are classes
    template: str = "alpaca"  # alpaca | vicuna | chat
    max_samples: int | None = None  # training records used; null: all
    eval_path: str | None = None  # local file or directory of held-out records
    eval_split: str | None = None  # split of held-out records
    eval_columns: ColumnsConfig | None = None  # null: the columns of the training file
    eval_max_samples: int | None = 1000  # held-out records used; null: all
    validation_fraction: float = 0.05  # held out of the training records when no eval set is given
    truncation: str = "right"  # right: cut the answer's end | left: cut the prompt's start | drop
    on_bad_record: str = "error"  # error | skip


@dataclass
class TaskConfig:
    """What is trained: sft (instruction tuning) or dpo (preference alignment)."""

    name: str = "sft"  # sft | dpo


@dataclass
class DpoConfig:
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: float = 0.1  # strength of the pull towards the reference model
    loss_type: str = "sigmoid"  # sigmoid | ipo | hinge | robust | others of TRL's DPOTrainer
    label_smoothing: float = 0.0  # assumed share of swapped pairs
    sft_weight: float = 0.0  # weight of the SFT loss on the chosen answers, added to the other
    disable_dropout: bool = True  # train without lora.dropout, as the reference is without it
    reference_adapter: str | None = None  # adapter of the reference model; null: the base model


@dataclass
class TrainingConfig:
    """Local training of one client in one round."""

    learning_rate: float = 2e-4  # of round 1
    min_learning_rate: float = 1e-6  # end of the cosine over the rounds
    max_steps: int = 10  # optimizer steps per round; -1: count num_epochs instead
    num_epochs: float = 1.0  # passes over a client's data per round, with max_steps=-1
    batch_size: int = 16  # examples per optimizer step, before accumulation
    gradient_accumulation_steps: int = 1  # batches per optimizer step
    micro_batch_size: int | None = None  # examples per forward pass; null: chosen per device
    max_length: int = 512  # tokens
    optimizer: str = "adamw"  # adamw | sgd
    weight_decay: float = 0.0  # decoupled, as in AdamW
    max_grad_norm: float = 1.0  # 0: no clipping
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    gradient_checkpointing: bool | None = None  # null: chosen per device
    packing: bool | None = None  # padding-free forward; null: where the attention supports it
    device: str = "auto"  # auto | cpu | cuda | mps


@dataclass
class AlgorithmConfig:
    """Aggregation and local correction; which keys matter depends on the algorithm."""

    name: str = "fedavg"  # see the group algorithm
    variant: str = "paper"  # paper | openfedllm
    weighting: str = "auto"  # auto | examples: data size | used: examples of the round | uniform
    participation: str = "sampled"  # sampled: federation.sample_* | all: every client every round
    mu: float = 0.0  # proximal term, any algorithm
    eta: float = 1.0  # server learning rate
    beta1: float = 0.0  # decay of the server's first moment
    beta2: float = 0.0  # decay of the server's second moment
    tau: float = 1e-3  # adaptivity of the server optimizer


@dataclass
class PartitionConfig:
    """How one data set becomes clients in simulation."""

    name: str = "iid"  # iid | dirichlet | natural | pathological | size
    column: str | None = None  # column whose values decide
    alpha: float = 0.5  # dirichlet concentration; size: exponent of the power law
    classes_per_client: int = 2  # pathological
    min_size: int = 1  # dirichlet: records that every client gets at least


@dataclass
class FederationConfig:
    """Who takes part, and on which engine."""

    engine: str = "ray"  # ray | inprocess | deployment: sites with data of their own
    num_clients: int | None = None  # null: what a natural partition yields, 10 otherwise
    sample_clients: int | None = None  # clients per round; null: sample_fraction of them
    sample_fraction: float = 0.4  # clients per round, as a share of all
    num_rounds: int = 12  # rounds
    min_clients: int | None = None  # clients that must be there at the start; null: all of them
    min_replies: int = 1  # usable replies that a round needs
    round_timeout_s: float = 3600.0  # seconds until a round closes with the replies that came
    start_timeout_s: float = 120.0  # how long to wait for the clients to be there
    client_cpus: int = 1  # CPU threads of one client
    client_gpus: float = 0.0  # ray: share of a GPU that one simulated client takes
    ray_address: str | None = None  # ray: host:port of a running cluster; null: a local one


@dataclass
class CommunicationConfig:
    """What travels."""

    dtype: str = "bfloat16"  # float32 | bfloat16 | float16


@dataclass
class CheckpointConfig:
    """When the server state is saved, and how many states are kept."""

    every: int = 1  # rounds
    keep: int = 2  # newest states kept


@dataclass
class EvaluationConfig:
    """Central evaluation on the held-out records, and evaluation on the clients' own."""

    central: bool = True  # score the global adapter on held-out records
    every: int = 5  # rounds; 0: only at the start and at the end
    batch_tokens: int = 2048  # tokens per forward pass
    clients: bool = False  # ask the clients to score it on their own records
    answers: int = 8  # dpo: held-out prompts answered, for their length and side by side
    max_new_tokens: int = 64  # dpo: tokens of such an answer at most
    suites: list[str] = field(default_factory=list)  # benchmark suites scored at the same times
    suite_limit: int | None = 50  # examples of each part of a suite's task; null: all
    data_root: str | None = None  # folder of the suites' local data; null: the hub


@dataclass
class TrackingConfig:
    """Figures, and experiment trackers besides the files that every run writes."""

    figures: bool = True  # draw curves.png and clients.png at the end of a run
    tensorboard: bool = False  # write TensorBoard files
    wandb: bool = False  # log to Weights & Biases
    mlflow: bool = False  # log to MLflow
    project: str = "fedllm-flwr"  # project or experiment name there


@dataclass
class CompareConfig:
    """What ``fedllm compare`` runs; no other command looks at it."""

    seeds: int = 3  # runs of each algorithm, with seed, seed + 1, ...
    jobs: int | None = None  # runs side by side; null: as many as CPUs / federation.client_cpus
    settings: Any = None  # algorithm -> its own keys of the section algorithm


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
    compare: CompareConfig = field(default_factory=CompareConfig)
    init_adapter: str | None = None  # adapter to start from; null: a fresh one
    seed: int = 0  # every random choice derives from it
    output_dir: str | None = None  # where the run writes; null: outputs/<time>-<algorithm>-<data>
    resume: str | None = None  # directory of a stopped run to go on with
