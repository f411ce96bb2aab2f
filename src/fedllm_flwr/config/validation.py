"""Validates combinations of values, and the files that they name, before anything is loaded."""

import difflib
import itertools
import math
from pathlib import Path

from fedllm_flwr.config.names import did_you_mean, shown, unknown_choice
from fedllm_flwr.config.participation import num_sampled
from fedllm_flwr.config.ranks import divides, parsed
from fedllm_flwr.config.schema import DEFAULT_NUM_CLIENTS, EMBEDDED_DATA, Config, value_of
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.plugins import ALGORITHMS, COMBINERS, TASKS, TRANSFORMS

_ATTACKS_ON_UPDATES = ("sign_flip", "scale", "gaussian", "alie")  # the others change records


def validate(config: Config) -> None:
    """Check combinations of values; reads no files and no model.

    Raises:
        ConfigError: names the key, its value and the remedy.
    """
    _check_training(config)
    check_processes(config)
    _check_clients(config)
    _check_partition(config)
    _check_near_duplicates(config)
    _check_task(config)
    _check_lora(config)
    if config.model.path == "embedded" and config.model.name != "tiny":
        raise ConfigError(
            f"model={shown(config.model.name)} needs model.path=<hub id or directory>."
        )
    _check_device(config)
    _check_comparison(config)
    _check_robust(config)
    _check_privacy(config)
    _check_attack(config)
    _check_secure(config)
    _check_transforms(config)
    _check_downlink(config)


def _check_training(config: Config) -> None:
    training = config.training
    if training.min_learning_rate > training.learning_rate:
        raise ConfigError(
            f"training.min_learning_rate={training.min_learning_rate} is above "
            f"training.learning_rate={training.learning_rate}; lower it."
        )
    if training.max_steps < 1 and training.max_steps != -1:
        raise ConfigError(
            f"training.max_steps must be >= 1, or -1 to train training.num_epochs, "
            f"got {training.max_steps}."
        )
    micro = training.micro_batch_size
    if micro is not None and training.batch_size % micro:
        raise ConfigError(
            f"training.batch_size={training.batch_size} is not a multiple of "
            f"training.micro_batch_size={micro}."
        )
    corrected = config.algorithm.mu > 0 or config.algorithm.name == "scaffold"
    if training.dtype == "float16" and training.max_grad_norm == 0 and corrected:
        raise ConfigError(
            "training.max_grad_norm=0 with training.dtype=float16: clipping is what scales the "
            "gradient back before the correction is added; use a norm > 0, or bfloat16."
        )
    if config.checkpoint.adapters != "none" and config.algorithm.name == "local":
        raise ConfigError(
            f"checkpoint.adapters={config.checkpoint.adapters}: algorithm=local has no adapter for "
            "all; each client's own is kept with the states (checkpoint.keep)."
        )
    patience, evaluation = training.early_stopping, config.evaluation
    if patience is not None and evaluation.central and not evaluation.every:
        raise ConfigError(
            f"training.early_stopping={patience} waits for evaluations, and evaluation.every=0 has "
            "none between start and end; set evaluation.every=1."
        )
    if patience is not None and not evaluation.central and not evaluation.clients:
        raise ConfigError(
            f"training.early_stopping={patience} needs scores: set evaluation.central=true or "
            "evaluation.clients=true."
        )


def check_processes(config: Config) -> None:
    """Reject options that several processes per client do not support; sites choose their number.

    Raises:
        ConfigError: names the key, its value and the remedy.
    """
    federation, training = config.federation, config.training
    asked = f"federation.client_processes={federation.client_processes}"
    text = None
    if federation.client_processes == 1:
        return
    if training.batch_size % federation.client_processes:
        text = (
            f"training.batch_size={training.batch_size} is not a multiple of {asked}, which "
            "divide a batch evenly: set training.batch_size to a multiple"
        )
    elif config.privacy.unit == "record":
        text = f"{asked} with privacy.unit=record: one process draws and clips a client's records"
    elif federation.engine == "ray" and 0 < federation.client_gpus < federation.client_processes:
        text = (
            f"federation.client_gpus={federation.client_gpus:g} with {asked}, each of which needs "
            f"a GPU: set federation.client_gpus={federation.client_processes}"
        )
    if text is not None:
        raise ConfigError(
            f"{text}; set federation.client_processes=1 (at a site: processes in node.toml).",
            "the number of its processes does not suit training.batch_size or privacy.unit",
        )


def _check_clients(config: Config) -> None:
    federation = config.federation
    clients = federation.num_clients
    if federation.engine == "deployment" and clients is None:
        raise ConfigError(
            "federation.engine=deployment needs federation.num_clients=<sites to wait for>."
        )
    if clients is None and config.partition.name != "natural":
        clients = DEFAULT_NUM_CLIENTS
    if clients is not None:  # otherwise it depends on a column, which is not yet read
        check_client_counts(config, clients)


def check_client_counts(config: Config, clients: int) -> None:
    """Reject numbers of clients that a federation of `clients` clients cannot reach.

    Raises:
        ConfigError: names the key, its value and the number of clients.
    """
    federation = config.federation
    sampled = federation.sample_clients
    if sampled is not None and sampled > clients:
        raise ConfigError(
            f"federation.sample_clients={sampled} exceeds federation.num_clients={clients}; "
            "sample at most all of them."
        )
    if federation.min_clients is not None and federation.min_clients > clients:
        raise ConfigError(
            f"federation.min_clients={federation.min_clients} exceeds federation.num_clients="
            f"{clients}; lower it."
        )
    per_round = num_sampled(config, clients)
    if federation.min_replies is not None and federation.min_replies > per_round:
        raise ConfigError(
            f"federation.min_replies={federation.min_replies} exceeds the {per_round} clients "
            "sampled per round; lower it or sample more clients."
        )


def _check_partition(config: Config) -> None:
    name, column = config.partition.name, config.partition.column
    if name == "natural" and not column:
        raise ConfigError(
            "partition=natural needs a column: give partition.column=<column>, one client for "
            "each of its values."
        )
    if name in ("dirichlet", "pathological") and not column:
        raise ConfigError(
            f"partition={name} needs a column of classes: give partition.column=<column> (or "
            "data.columns.label)."
        )
    labels = config.data.labels
    if len(set(labels)) < len(labels):
        raise ConfigError(f"data.labels={shown(labels)} names a label twice; list each once.")


def _check_near_duplicates(config: Config) -> None:
    data = config.data
    if data.near_duplicates == "drop" and config.federation.engine == "deployment":
        raise ConfigError(
            "data.near_duplicates=drop is for simulations: the server of a deployment sees no "
            "site's records; drop it."
        )
    if data.test_path is not None and data.near_duplicates == "keep":
        raise ConfigError(
            f"data.test_path={shown(data.test_path)} has no effect with data.near_duplicates=keep; "
            "set data.near_duplicates=drop."
        )


def _check_task(config: Config) -> None:
    """Task-specific checks; two roles must not share a column."""
    task = TASKS.find(config.task.name)()
    for key, columns in (
        ("data.columns", config.data.columns),
        ("data.eval_columns", config.data.eval_columns),
    ):
        roles = () if columns is None else task.distinct_roles(columns)
        for one, other in itertools.combinations(roles, 2):
            name = getattr(columns, one)
            if name is not None and name == getattr(columns, other):
                raise ConfigError(
                    f"{key}.{one}={shown(name)} and {key}.{other}={shown(name)} are the same "
                    "column; give each its own."
                )
    if (reason := task.refusal(config)) is not None:
        raise ConfigError(reason)
    if config.training.packing and not task.can_pack:
        able = [name for name in TASKS.names() if TASKS.find(name).can_pack]
        raise ConfigError(
            f"training.packing=true works with task={' or '.join(able)} only; drop it."
        )


def _check_comparison(config: Config) -> None:
    """Check that ``compare.settings`` is a section of keys per known algorithm."""
    settings = config.compare.settings
    if settings is None:
        return
    if not isinstance(settings, dict):
        raise ConfigError(
            f"compare.settings={shown(settings)} must be a section by algorithm: write "
            "'compare.settings={fedprox: {mu: 0.1}}'."
        )
    for name, own in settings.items():
        if name not in ALGORITHMS.names():
            raise ConfigError(unknown_choice("compare.settings", name, ALGORITHMS.names()))
        if not isinstance(own, dict):
            raise ConfigError(
                f"compare.settings.{name}={shown(own)} must be a section of keys: write "
                f"'compare.settings={{{name}: {{eta: 0.1}}}}'."
            )


def _check_robust(config: Config) -> None:
    """Reject a robust combiner if it would not control the whole update."""
    name = config.algorithm.combiner
    if name == "auto" or not COMBINERS.find(name).robust:
        return
    algorithm, federation = config.algorithm.name, config.federation
    if (rule := ALGORITHMS.find(algorithm)).contributes:
        kinds = " and ".join(rule.contributes.values())
        raise ConfigError(
            f"algorithm.combiner={name} does not bound the further sums of algorithm={algorithm} "
            f"({kinds}), which one malicious client could control; use another algorithm, or "
            "algorithm.combiner=mean."
        )
    if not rule.aggregates or algorithm == "centralized":
        raise ConfigError(
            f"algorithm.combiner={name} has nothing to combine with algorithm={algorithm}; drop it."
        )
    clients = federation.num_clients or DEFAULT_NUM_CLIENTS
    count = num_sampled(config, clients)
    attackers = math.floor(round(config.robust.liars * count, 9))
    if name == "krum" and count < 2 * attackers + 3:
        raise ConfigError(
            f"algorithm.combiner=krum needs 2 f + 3 = {2 * attackers + 3} clients in a round with "
            f"f = {attackers} attackers, and a round has {count}; lower "
            f"robust.liars={config.robust.liars:g} or sample more clients."
        )


def _check_privacy(config: Config) -> None:
    """Reject options that are incompatible with the privacy guarantee."""
    privacy = config.privacy
    if privacy.canaries and (config.task.name != "sft" or config.federation.engine == "deployment"):
        raise ConfigError(
            f"privacy.canaries={privacy.canaries} are planted in the records of simulated clients "
            "of task=sft; set privacy.canaries=0."
        )
    if privacy.unit == "none":
        return
    promised = f"privacy.unit={privacy.unit}"
    multiplier, target = privacy.noise_multiplier, privacy.target_epsilon
    if multiplier is None and target is None:
        raise ConfigError(
            f"{promised} needs noise: give privacy.target_epsilon=<epsilon>, or "
            "privacy.noise_multiplier=<deviation of the noise / clip>."
        )
    if multiplier is None and config.federation.engine == "deployment":
        raise ConfigError(
            f"privacy.noise_multiplier=null with {promised} and federation.engine=deployment: "
            "sites decide on the noise before they say how many records they have; give "
            "privacy.noise_multiplier."
        )
    if multiplier == 0 and target is not None:
        raise ConfigError(
            f"privacy.noise_multiplier=0 keeps to no privacy.target_epsilon={target:g}; set "
            "privacy.noise_multiplier=null, which calibrates the noise to it."
        )
    if config.evaluation.clients:
        raise ConfigError(
            f"evaluation.clients=true with {promised}: scores on the clients' own records are no "
            "part of what is accounted for; set evaluation.clients=false."
        )
    check = _check_client_privacy if privacy.unit == "client" else _check_record_privacy
    check(config)


def _check_client_privacy(config: Config) -> None:
    """Check the requirements of client-level privacy, which releases a sum of clipped updates."""
    privacy, federation, promised = config.privacy, config.federation, "privacy.unit=client"
    algorithm, rule = config.algorithm, ALGORITHMS.find(config.algorithm.name)
    if not rule.aggregates or algorithm.name == "centralized":
        raise ConfigError(
            f"algorithm={algorithm.name} with {promised}: no client's contribution is hidden among "
            "others'; choose an algorithm that aggregates several, or privacy.unit=record."
        )
    if config.evaluation.contribution != "none":
        raise ConfigError(
            f"evaluation.contribution={config.evaluation.contribution} with {promised}: what one "
            "client's update was worth would be told without noise; set "
            "evaluation.contribution=none."
        )
    if rule.stacks:
        raise ConfigError(
            f"{promised} does not work with algorithm={algorithm.name}, whose server step needs "
            "individual adapters instead of their noisy sum; use algorithm=ffa, or "
            "privacy.unit=record."
        )
    if algorithm.weighting not in ("auto", "uniform"):
        raise ConfigError(
            f"algorithm.weighting={algorithm.weighting} with {promised}: a client with many "
            "examples would exceed the clip's bound; use algorithm.weighting=uniform."
        )
    combiner = rule.combiner if algorithm.combiner == "auto" else algorithm.combiner
    if combiner != "mean":
        raise ConfigError(
            f"algorithm.combiner={combiner} with {promised}: noise is calibrated to a sum of "
            "bounded contributions; use algorithm.combiner=mean."
        )
    if privacy.sampling == "poisson" and federation.min_replies is not None:
        raise ConfigError(
            f"federation.min_replies={federation.min_replies} with privacy.sampling=poisson: the "
            "number of clients of a round varies, down to none; set federation.min_replies=null, "
            "or privacy.sampling=fixed."
        )
    if privacy.clip_quantile is not None and rule.contributes:
        raise ConfigError(
            f"privacy.clip_quantile={privacy.clip_quantile:g} with algorithm={algorithm.name}: "
            "clients would have to know the bound to remember what the server has added up; set "
            "privacy.clip_quantile=null."
        )


def _check_attack(config: Config) -> None:
    attack = config.attack
    if attack.name == "none":
        return
    if config.federation.engine == "deployment":
        raise ConfigError(
            f"attack={attack.name} is for simulations; a real federation has its own attackers."
        )
    if attack.name not in ("label_flip", "backdoor"):
        return
    labels = config.data.labels
    if config.task.name != "sft" or len(labels) < 2:
        raise ConfigError(
            f"attack={attack.name} changes answers that are classes; it needs task=sft and "
            "data.labels=[...] with two or more."
        )
    if attack.target is not None and attack.target not in labels:
        raise ConfigError(
            f"attack.target={shown(attack.target)} is not among data.labels={shown(labels)}."
        )


def _check_transforms(config: Config) -> None:
    """Reject options that are incompatible with compression."""
    names = config.communication.transforms
    for name in names:
        TRANSFORMS.check(name)
    compressing = [name for name in names if name in ("int8", "int4", "top_k")]
    if not compressing:
        return
    chosen = f"communication.transforms={shown(names)}"
    if len(compressing) > 1:
        raise ConfigError(f"{chosen}: an update is compressed once; choose one.")
    if config.privacy.unit == "client":
        raise ConfigError(
            f"{chosen} with privacy.unit=client: what error feedback adds to a later update, the "
            "clip takes away again; set communication.transforms=[]."
        )
    if config.attack.name in _ATTACKS_ON_UPDATES:
        raise ConfigError(
            f"{chosen} with attack={config.attack.name}: simulated attackers change updates that "
            "are not compressed; set communication.transforms=[]."
        )
    if config.lora.ranks or ALGORITHMS.find(config.algorithm.name).any_rank:
        raise ConfigError(
            f"{chosen} needs updates of one shape; with algorithm={config.algorithm.name} and "
            "lora.ranks set communication.transforms=[]."
        )


def _check_downlink(config: Config) -> None:
    """Reject options under which clients do not start from the same tensors of constant shape."""
    if (chosen := config.communication.downlink) == "whole":
        return
    rule, remedy = ALGORITHMS.find(config.algorithm.name), "set communication.downlink=whole."
    if config.privacy.secure_aggregation:
        raise ConfigError(
            f"communication.downlink={chosen} with privacy.secure_aggregation=true: a client that "
            f"has lost what the changes start from is asked twice, but masks are for one answer; "
            f"{remedy}"
        )
    if config.lora.ranks or rule.any_rank:
        raise ConfigError(
            f"communication.downlink={chosen} needs an adapter that is the same for all clients; "
            f"with algorithm={config.algorithm.name} and lora.ranks {remedy}"
        )
    if rule.freezes or rule.has_cores:
        raise ConfigError(
            f"communication.downlink={chosen} with algorithm={config.algorithm.name}: its frozen "
            f"factors must arrive exactly; {remedy}"
        )


def _check_record_privacy(config: Config) -> None:
    """Check the requirements of record-level privacy, which clips per-record gradients."""
    privacy, promised = config.privacy, "privacy.unit=record"
    if privacy.clip_quantile is not None:
        raise ConfigError(
            f"privacy.clip_quantile={privacy.clip_quantile:g} with {promised}: gradients are "
            "clipped to privacy.clip; set privacy.clip_quantile=null."
        )
    if config.lora.dora:
        raise ConfigError(
            f"lora.dora=true with {promised}: its magnitudes have no gradient for each record; set "
            "lora.dora=false."
        )
    if config.training.dtype == "float16":
        raise ConfigError(
            f"training.dtype=float16 with {promised}: records' gradients would overflow; use "
            "bfloat16 or float32."
        )
    if config.training.packing:
        raise ConfigError(
            f"training.packing=true with {promised}: packed records cannot be separated; set "
            "training.packing=null."
        )
    if not TASKS.find(config.task.name).has_example_losses:
        raise ConfigError(
            f"task={config.task.name} with {promised}: it has no per-example loss; use "
            "another task, or privacy.unit=client."
        )


def _check_secure(config: Config) -> None:
    """Reject options that need individual updates, which secure aggregation hides."""
    privacy = config.privacy
    if privacy.secure_ring == 16 and not (
        privacy.secure_aggregation and privacy.unit == "client" and privacy.noise_multiplier != 0
    ):
        raise ConfigError(
            "privacy.secure_ring=16 rounds so coarsely that only noise hides it; set "
            "privacy.secure_aggregation=true, privacy.unit=client and a noise multiplier above 0, "
            "or privacy.secure_ring=32."
        )
    if not privacy.secure_aggregation:
        return
    secure, algorithm = "privacy.secure_aggregation=true", config.algorithm
    rule = ALGORITHMS.find(algorithm.name)
    if not rule.aggregates or algorithm.name == "centralized":
        raise ConfigError(f"{secure} has nothing to add up with algorithm={algorithm.name}.")
    combiner = rule.combiner if algorithm.combiner == "auto" else algorithm.combiner
    if combiner != "mean":
        raise ConfigError(
            f"algorithm.combiner={combiner} looks at single updates, which {secure} hides; use "
            "algorithm.combiner=mean, or one of the two."
        )
    if config.communication.transforms:
        raise ConfigError(
            f"communication.transforms={shown(config.communication.transforms)} with {secure}: "
            "masked sums are of fixed-point numbers as they are; set communication.transforms=[]."
        )
    if rule.stacks or rule.any_rank:
        raise ConfigError(
            f"algorithm={algorithm.name} needs the clients' adapters one by one, which {secure} "
            "hides; use an algorithm that takes their mean."
        )
    if config.evaluation.contribution != "none":
        raise ConfigError(
            f"evaluation.contribution={config.evaluation.contribution} needs single updates, which "
            f"{secure} hides; set evaluation.contribution=none."
        )
    if config.evaluation.aggregation_error:
        raise ConfigError(
            f"evaluation.aggregation_error=true needs single updates, which {secure} hides; set "
            "evaluation.aggregation_error=null."
        )
    if privacy.unit == "client" and privacy.sampling != "visible":
        raise ConfigError(
            f"privacy.sampling={privacy.sampling} with privacy.unit=client and {secure}: the "
            "guarantee holds against the server, which knows the clients of a round; set "
            "privacy.sampling=visible, which counts on no secret draw."
        )
    if privacy.unit == "client" and privacy.clip_quantile is not None:
        raise ConfigError(
            f"privacy.clip_quantile={privacy.clip_quantile:g} with {secure}: nobody sees the norms "
            "of the updates; set privacy.clip_quantile=null."
        )
    if config.attack.name in _ATTACKS_ON_UPDATES:
        raise ConfigError(
            f"attack={config.attack.name} changes single updates, which {secure} hides; use "
            "attack=label_flip or backdoor."
        )
    clients = config.federation.num_clients or DEFAULT_NUM_CLIENTS
    if num_sampled(config, clients) < 2:
        raise ConfigError(
            f"{secure} needs two clients a round at least, and a round has one, whose sum would be "
            "its update; sample more clients."
        )


def _check_lora(config: Config) -> None:
    _check_ranks(config)
    targets = config.lora.target_modules
    if isinstance(targets, list) and targets and all(isinstance(t, str) and t for t in targets):
        return
    if targets in ("auto", "all-linear"):
        return
    name = shown(targets)
    close = difflib.get_close_matches(name, ("auto", "all-linear"), n=1)
    hint = f"did you mean {close[0]!r}? Give" if close else "give"
    is_name = isinstance(targets, str) and targets.strip() and not close
    example = f"[{name}]" if is_name else "[q_proj,v_proj]"
    raise ConfigError(
        f"lora.target_modules={name}: {hint} auto, all-linear or a list of module names such as "
        f"{example}."
    )


def _check_ranks(config: Config) -> None:
    """Check different ranks, and options that algorithms on the product B A do not support."""
    lora, algorithm = config.lora, config.algorithm
    for entry in lora.ranks:
        rank = parsed(entry)[1]
        if rank > lora.r:
            raise ConfigError(
                f"lora.ranks: {shown(entry)} is above lora.r={lora.r}, the rank of the global "
                f"adapter; set lora.r={rank}."
            )
        if not divides(lora, rank):
            raise ConfigError(
                f"lora.ranks: {shown(entry)} with lora.r={lora.r} and lora.alpha="
                f"{lora.alpha}: alpha of the client, {lora.alpha * rank / lora.r:g}, is no whole "
                f"number; set lora.alpha={2 * lora.r}."
            )
    special = lora.ranks or lora.dora or lora.rslora or algorithm.combiner != "auto"
    if not special:  # the algorithm has no special requirements
        return
    kind = ALGORITHMS.find(algorithm.name)
    if lora.ranks and not kind.any_rank:
        able = [name for name in ALGORITHMS.builtin if ALGORITHMS.find(name).any_rank]
        raise ConfigError(
            f"lora.ranks does not work with algorithm={algorithm.name}, which needs equal ranks; "
            f"use algorithm={' or '.join(able)}."
        )
    is_matrix = kind.stacks or "both" not in kind.takes_factors or algorithm.factors != "both"
    is_matrix = is_matrix or kind.has_cores
    chosen = f"algorithm={algorithm.name}"
    if algorithm.factors != "both" and len(kind.takes_factors) > 1:
        chosen = f"algorithm.factors={algorithm.factors}"
    if lora.dora and is_matrix:
        raise ConfigError(
            f"lora.dora=true does not work with {chosen}, which is about B A, and DoRA rescales "
            "that; use lora.dora=false."
        )
    if lora.rslora and (kind.freezes or kind.any_rank):
        raise ConfigError(
            f"lora.rslora=true does not work with algorithm={algorithm.name}: its scale depends on "
            "the rank of each adapter; use lora.rslora=false and another lora.alpha."
        )
    if kind.stacks and algorithm.combiner != "auto":
        raise ConfigError(
            f"algorithm.combiner={algorithm.combiner} does not work with "
            f"algorithm={algorithm.name}, which combines the clients' adapters itself; drop it."
        )


def _check_device(config: Config) -> None:
    training, quantization = config.training, config.quantization.name
    if quantization != "none" and training.device == "mps":
        raise ConfigError(
            f"quantization={quantization} does not run on training.device=mps; use "
            "quantization=none or another device."
        )
    if quantization == "int8" and config.lora.dora:
        raise ConfigError(
            "quantization=int8 does not train with lora.dora=true: bitsandbytes hands its scales "
            "out once, and DoRA needs them twice; use quantization=nf4, or lora.dora=false."
        )
    attention = config.model.attention
    if not attention.startswith("flash_attention"):
        return
    for key, value, remedy in (
        ("training.device", training.device, "cuda"),
        ("training.dtype", training.dtype, "bfloat16"),
    ):
        if value in ("cpu", "mps", "float32"):
            raise ConfigError(
                f"model.attention={attention} does not run with {key}={value}; use "
                f"{key}={remedy} or model.attention=sdpa."
            )


def adapter_keys() -> list[str]:
    """Keys that name an adapter's directory on the server: init_adapter, and those of tasks."""
    tasks = [TASKS.find(name) for name in TASKS.names()]
    return ["init_adapter", *(key for task in tasks for key in task.adapters.values())]


def validate_paths(config: Config) -> None:
    """Check the files that the configuration names on this machine.

    Raises:
        ConfigError: names the key and the path that is missing.
    """
    sites_own = config.federation.engine == "deployment"  # each site has its own data.path
    if not config.data.path and not config.data.hub_id and not sites_own:
        raise ConfigError(f"data={shown(config.data.name)} needs data.path=<file or directory>.")
    files = {"data.eval_path": config.data.eval_path, "data.test_path": config.data.test_path}
    files |= {} if sites_own else {"data.path": config.data.path}
    for key, path in files.items():
        if path and path not in EMBEDDED_DATA:
            _check_exists(key, path)
    data = config.data
    own_files = not sites_own and data.path and data.eval_path
    if own_files and not {data.path, data.eval_path} & set(EMBEDDED_DATA):
        train, held_out = Path(str(data.path)).expanduser(), Path(str(data.eval_path)).expanduser()
        if train.samefile(held_out) and data.eval_split in (None, data.split):
            raise ConfigError(
                f"data.eval_path={shown(data.eval_path)} is data.path: the scores would be of "
                "records that were learnt; give other records, or drop data.eval_path, and "
                f"data.validation_fraction={data.validation_fraction:g} of them is held out."
            )
    if config.model.path.startswith(("/", "./", "../", "~")):
        _check_exists("model.path", config.model.path)
    if config.evaluation.data_root and config.evaluation.suites:
        _check_exists("evaluation.data_root", config.evaluation.data_root)
    if config.resume:
        _check_exists("resume", config.resume)
    for key in adapter_keys():
        adapter = value_of(config, key)
        if adapter and not (Path(adapter).expanduser() / "adapter_config.json").is_file():
            raise ConfigError(
                f"{key}={shown(adapter)}: no adapter_config.json there; give the adapter/ "
                "directory of a run."
            )


def _check_exists(key: str, path: str) -> None:
    """Reject a missing path; suggest the closest existing name."""
    file = Path(path).expanduser()
    try:
        if file.exists():
            return
        beside = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
    except OSError as error:
        raise ConfigError(f"{key}={shown(path)}: {error.strerror}; give another path.") from error
    hint = did_you_mean(file.name, beside, cutoff=0.6) or " Give one that is there."
    raise ConfigError(f"{key}={shown(path)}: no such file or directory.{hint}")
