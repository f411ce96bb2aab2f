"""Every mistake in a configuration gets one line with key, value and remedy, and no stack trace."""

from pathlib import Path

import pytest

from fedllm_flwr.config.compose import compose, expand_sweep, from_run_config, load_yaml, to_yaml
from fedllm_flwr.errors import ConfigError

NAMES: list[tuple[list[str], list[str]]] = [
    (["algorthm=scaffold"], ["'algorthm'", "Did you mean 'algorithm'?"]),
    (["quantisation=int8"], ["'quantisation'", "'quantization'"]),
    (["trainin.learning_rate=1"], ["'trainin.learning_rate'", "'training.learning_rate'"]),
    (["training.learning_rat=1"], ["'training.learning_rat'", "'training.learning_rate'"]),
    (["training.BATCH_SIZE=1"], ["'training.BATCH_SIZE'", "'training.batch_size'"]),
    (["training/batch_size=1"], ["'training/batch_size'", "'training.batch_size'"]),
    (["training.lr=1"], ["'training.lr'", "Did you mean 'training.learning_rate'?"]),
    (["rounds=3"], ["'rounds'", "Did you mean 'federation.num_rounds'?"]),
    (["learning_rate=1"], ["'learning_rate'", "'training.learning_rate'"]),
    (["num_rounds=3"], ["'num_rounds'", "'federation.num_rounds'"]),
    (["data.columns.instuction=q"], ["'data.columns.instruction'"]),
    (["seed.x=1"], ["unknown key 'seed.x'", "'seed'"]),
    (["Seed=1"], ["'Seed'", "'seed'"]),
    (["xyzzy=1"], ["unknown key 'xyzzy'", "fedllm config"]),
    (["algorithm=fedpox"], ["algorithm=fedpox", "'fedprox'", "scaffold"]),
    (["model=llama"], ["model=llama", "'llama2_7b'", "Choose from custom, "]),
    (["experiment=openfedlm"], ["experiment=openfedlm", "'openfedllm'"]),
    (["model=../data/demo"], ["model=../data/demo", "Choose from"]),
    (["training="], ["training=", "Choose from default, tiny"]),
    (["training=3"], ["training=3", "Choose from"]),
    (["model=null"], ["model=null", "Choose from"]),
    (["lora=[default]"], ["lora=[default]", "Choose from"]),
    (["model={a: b}"], ["unknown key 'model.a'"]),
    (["dpo=3"], ["dpo=3", "dpo.beta=<value>"]),
    (["data.columns=null"], ["data.columns=null", "data.columns.instruction=<value>"]),
    (["algorithm.name=fedprox"], ["algorithm.name=fedprox", "write algorithm=fedprox"]),
]

GRAMMAR: list[tuple[list[str], list[str]]] = [
    ([""], ["cannot read ''", "key=value"]),
    (["=3"], ["cannot read '=3'", "key=value"]),
    (["training.batch_size"], ["'training.batch_size'", "key=value"]),
    (["a b=3"], ["'a b=3'", "key=value"]),
    (["--seed=3"], ["--seed=3", "without dashes", "seed=3"]),
    (["output_dir='a"], ["output_dir='a", "quotes"]),
    (["data.labels=[a"], ["data.labels=[a", "data.labels=[a,b]"]),
    (["+seed=1"], ["+seed=1", "write seed=<value>"]),
    (["++seed=1"], ["++seed=1", "write seed=<value>"]),
    (["+training.foo=1"], ["unknown key 'training.foo'"]),
    (["~training.dtype"], ["~training.dtype", "training.dtype=<value>"]),
    (["~nope"], ["unknown key 'nope'"]),
    (["model@data=tiny"], ["model@data=tiny", "write model=<choice>"]),
    (["hydra.run.dir=x"], ["hydra.run.dir=x", "drop it", "output_dir=<folder>"]),
    (["hydra/launcher=basic"], ["hydra/launcher=basic", "drop it"]),
    (["algorithm=fedavg,fedprox"], ["algorithm=fedavg,fedprox", "--multirun"]),
    (["output_dir=a,b"], ["output_dir=a,b", "--multirun", "output_dir=\"'...'\""]),
    (["data.labels=a,b"], ["data.labels=a,b", "data.labels=[...]"]),
    (["output_dir=${nope}"], ["output_dir", "'nope' not found"]),
    (["output_dir=${oc.env:FEDLLM_NOT_SET}"], ["output_dir", "FEDLLM_NOT_SET"]),
    (["output_dir=a${b"], ["output_dir", "close it with '}'"]),
    (["seed=1", "seed=2"], ["seed=1", "seed=2", "keep one"]),
    (["quantization=int8", "quantization=nf4"], ["=int8", "=nf4", "keep one"]),
    (["quantization=int8", "quantization.name=nf4"], ["write quantization=nf4"]),
]

TYPES: list[tuple[list[str], list[str]]] = [
    (["training.batch_size=abc"], ["training.batch_size", "whole number", "abc"]),
    (["training.batch_size=1.5"], ["training.batch_size", "whole number", "1.5"]),
    (["training.batch_size=null"], ["training.batch_size=null", "leave it out"]),
    (["training.max_steps=true"], ["training.max_steps", "whole number", "true"]),
    (["lora.r=1e3"], ["lora.r", "whole number", "1000.0"]),
    (["seed=99999999999999999999"], ["seed", "below 2^63", "99999999999999999999"]),
    (["seed=" + "9" * 5000], ["seed", "whole number", "999..."]),
    (["training.learning_rate=fast"], ["training.learning_rate", "number", "fast"]),
    (["training.learning_rate=[1,2]"], ["training.learning_rate", "number", "[1,2]"]),
    (["training.learning_rate=nan"], ["training.learning_rate", "finite", "nan"]),
    (["training.learning_rate=inf"], ["training.learning_rate", "finite", "inf"]),
    (["training.learning_rate=1e30"], ["training.learning_rate", "below 2^63", "1e+30"]),
    (["algorithm.eta=-inf"], ["algorithm.eta", "finite", "-inf"]),
    (["training.packing=yes"], ["training.packing", "true or false", "yes"]),
    (["tracking.wandb=1"], ["tracking.wandb", "true or false", "1"]),
    (["model.path=null"], ["model.path=null"]),
    (["model.path=[a]"], ["model.path", "must be text", "[a]"]),
    (["output_dir="], ["output_dir=", "give a value"]),
    (["data.labels=a"], ["data.labels", "list", "data.labels=[a]"]),
    (["data.labels=[a,null]"], ["data.labels", "must be text", "null"]),
    (["lora.target_modules=q_proj"], ["lora.target_modules=q_proj", "such as [q_proj]"]),
    (["lora.target_modules=all_linear"], ["=all_linear", "'all-linear'"]),
    (["lora.target_modules="], ["lora.target_modules=:", "such as [q_proj,v_proj]"]),
    (["lora.target_modules=[]"], ["lora.target_modules=[]", "[q_proj,v_proj]"]),
    (["lora.target_modules=[1,2]"], ["lora.target_modules=[1,2]", "[q_proj,v_proj]"]),
    (["lora.target_modules=null"], ["lora.target_modules=null", "all-linear"]),
]

VALUES: list[tuple[list[str], list[str]]] = [
    (["seed=-1"], ["seed must be >= 0", "-1"]),
    (["training.learning_rate=0"], ["training.learning_rate must be > 0", "0.0"]),
    (["training.learning_rate=-1"], ["training.learning_rate must be > 0", "-1.0"]),
    (["training.min_learning_rate=1"], ["min_learning_rate=1.0", "learning_rate=0.005", "lower"]),
    (
        ["algorithm=fedprox", "training.dtype=float16", "training.max_grad_norm=0"],
        ["training.max_grad_norm=0", "training.dtype=float16", "use a norm > 0"],
    ),
    (["training.max_steps=0"], ["training.max_steps", ">= 1", "-1", "got 0"]),
    (["training.dtype=float64"], ["training.dtype=float64", "'float16'", "bfloat16"]),
    (["training.dtype=float23"], ["training.dtype=float23", "Did you mean 'float32'?"]),
    (['training.dtype="a\nb"'], ["training.dtype=a\\nb"]),
    (["training.micro_batch_size=5"], ["batch_size=16", "micro_batch_size=5", "multiple"]),
    (["federation.client_processes=0"], ["federation.client_processes must be > 0, got 0"]),
    (
        ["federation.client_processes=3", "training.batch_size=16"],
        ["batch_size=16", "client_processes=3", "multiple; set federation.client_processes=1"],
    ),
    (
        ["federation.client_processes=32", "training.batch_size=16"],
        [
            "batch_size=16",
            "client_processes=32",
            "to a multiple; set federation.client_processes=1",
        ],
    ),
    (
        [
            "federation.client_processes=2",
            "privacy.unit=record",
            "privacy.noise_multiplier=1",
        ],
        ["client_processes=2 with privacy.unit=record", "set federation.client_processes=1"],
    ),
    (
        ["federation.client_processes=2", "federation.client_gpus=0.5"],
        ["client_gpus=0.5", "client_processes=2", "set federation.client_gpus=2"],
    ),
    (["communication.dtype=int8"], ["communication.dtype=int8", "bfloat16"]),
    (["communication.transforms=[int8,top_k]"], ["compressed once", "choose one"]),
    (["communication=int8", "algorithm=flora"], ["[int8]", "algorithm=flora", "one shape"]),
    (["communication=int4", "attack=alie"], ["[int4]", "attack=alie"]),
    (["communication.downlink=top_k"], ["communication.downlink=top_k", "int4"]),
    (
        ["communication.downlink=int8", "algorithm=fedex"],
        ["communication.downlink=int8", "algorithm=fedex", "downlink=whole"],
    ),
    (
        ["communication.downlink=int8", "algorithm=fed_sb"],
        ["communication.downlink=int8", "algorithm=fed_sb", "downlink=whole"],
    ),
    (
        ["communication.downlink=int4", "algorithm=hetlora"],
        ["communication.downlink=int4", "same for all clients", "algorithm=hetlora"],
    ),
    (
        ["communication.downlink=int4", "algorithm=flexlora", "lora.ranks=[*1:4]"],
        ["communication.downlink=int4", "lora.ranks", "downlink=whole"],
    ),
    (
        ["communication.downlink=int4", "privacy.secure_aggregation=true"],
        ["communication.downlink=int4", "secure_aggregation", "downlink=whole"],
    ),
    (
        ["communication=top_k", "communication.top_k=0"],
        ["communication.top_k must be in (0, 1]", "0.0"],
    ),
    (
        ["communication=top_k", "privacy.unit=client", "privacy.noise_multiplier=1"],
        ["[top_k]", "privacy.unit=client", "error feedback"],
    ),
    (["data.preprocessing=alpacca"], ["data.preprocessing=alpacca", "'alpaca'"]),
    (["data.max_samples=0"], ["data.max_samples must be > 0", "0"]),
    (["data.labels=[a,a]"], ["data.labels=[a,a]", "once"]),
    (["lora.dropout=1"], ["lora.dropout", "[0, 1)", "1.0"]),
    (["algorithm.mu=-0.1"], ["algorithm.mu must be >= 0", "-0.1"]),
    (["algorithm.beta1=1"], ["algorithm.beta1", "[0, 1)"]),
    (["dpo.label_smoothing=0.5"], ["dpo.label_smoothing", "[0, 0.5)"]),
    (["federation.engine=rays"], ["federation.engine=rays", "'ray'", "inprocess"]),
    (["federation.sample_fraction=1.5"], ["federation.sample_fraction", "(0, 1]"]),
    (
        ["federation.num_clients=3", "federation.sample_clients=4"],
        ["sample_clients=4", "num_clients=3", "sample at most all"],
    ),
    (["partition=iid", "federation.sample_clients=11"], ["sample_clients=11", "num_clients=10"]),
    (["partition=iid", "federation.min_replies=5"], ["min_replies=5", "4 clients", "lower it"]),
    (["federation.num_clients=4", "federation.min_clients=5"], ["min_clients=5", "num_clients=4"]),
    (["data=fingpt", "partition=natural"], ["partition=natural", "partition.column=<column>"]),
    (["data=alpaca", "partition=dirichlet"], ["partition=dirichlet", "data.columns.label"]),
    (["data=jsonl"], ["data=jsonl", "data.path=<file or directory>"]),
    (["data=jsonl", "data.path=no/such.csv"], ["data.path=no/such.csv", "no such file"]),
    (["model=custom"], ["model=custom", "model.path=<hub id or directory>"]),
    (["model=custom", "model.path=./no-model"], ["model.path=./no-model", "no such"]),
    (["init_adapter=no-run"], ["init_adapter=no-run", "adapter_config.json", "adapter/"]),
    (["resume=no-run"], ["resume=no-run", "no such"]),
    (["config=no-run"], ["config=no-run", "no such file", "config.yaml"]),
    (["quantization=int8", "training.device=mps"], ["quantization=int8", "device=mps", "=none"]),
    (
        ["model.attention=flash_attention_2", "training.device=cpu"],
        ["flash_attention_2", "training.device=cpu", "sdpa"],
    ),
]


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    NAMES + GRAMMAR + TYPES + VALUES,
    ids=lambda value: " ".join(value)[:60] or "empty",
)
def test_mistake_gets_one_line(overrides: list[str], fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)

    message = str(caught.value)
    assert message.isprintable()  # one line
    assert len(message) < 400
    for fragment in fragments:
        assert fragment in message
    for jargon in ("DictConfig", "Config (", "omegaconf", "Hydra.", "full_key", "object_type"):
        assert jargon not in message


def test_mistyped_path_suggests_the_name_beside_it(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").touch()

    with pytest.raises(ConfigError, match=r"data\.path=.*notes\.json: no such.*'notes\.jsonl'"):
        compose(["data=jsonl", f"data.path={tmp_path / 'notes.json'}"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training: [1\n", "not valid YAML"),
        ("training: 3\n", "training=3 must be a section"),
        ("- a\n- b\n", "holds no configuration"),
        ("", "holds no configuration"),
        ("3\n", "no configuration|not valid YAML"),
        ("seed: 1\nseed: 2\n", "duplicate key seed, line 2"),
        ("training: {lr: 1}\n", "unknown key 'training.lr'"),
        ("1: 2\n", "unknown key '1'"),
        ("seed: abc\n", "seed must be a whole number, got abc"),
        ("data:\n  path: ???\n", "data.path is required here"),
        ("\x00\n", "not valid YAML"),
    ],
)
def test_broken_saved_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)

    with pytest.raises(ConfigError, match=f"config=.*{expected}") as caught:
        compose([f"config={file}", "training.max_steps=3"])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("override", ["algorithm=fedprox", "experiment=null", "seed=${x}"])
def test_saved_configuration_takes_plain_values_only(tmp_path: Path, override: str) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(compose()))

    with pytest.raises(ConfigError, match="a saved configuration takes"):
        load_yaml(tmp_path, [override])


@pytest.mark.parametrize(
    ("run_config", "expected"),
    [
        ({"overrides": "output_dir='a b"}, "a quote is not closed"),
        ({"overrides": "training.lr=1"}, "unknown key 'training.lr'"),
        ({"overrides": 3}, "must be text"),
        ({"seed": 3}, r"--run-config 'overrides=\"seed=3\"'"),
        ({"overrides": "", "config": "no-run"}, "config=no-run: no such file"),
    ],
)
def test_run_config_mistakes(run_config: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        from_run_config(run_config)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=interval(1,2)", "names no values"),
        ("algorithm=glob(x*)", "names no values"),
        ("sed=1,2", "unknown key 'sed'"),
    ],
)
def test_sweep_mistakes(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        expand_sweep([override])


YAML_MISTAKES = [
    ("data/mine.yaml", "name: [", ["data=mine"], "not valid YAML"),
    ("data/mine.yaml", "hub_idd: x", ["data=mine"], "unknown key 'data.hub_idd'.*'data.hub_id'"),
    ("lora/mine.yaml", "r: many", ["lora=mine"], "lora.r must be a whole number, got many"),
    (
        "experiment/mine.yaml",
        "# @package _global_\ndefaults:\n  - override /algorithm: fedpox\n",
        ["experiment=mine"],
        "algorithm=fedpox.*'fedprox'",
    ),
    (
        "experiment/mine.yaml",
        "# @package _global_\ndefaults:\n  - override /algorithmus: fedprox\n",
        ["experiment=mine"],
        "unknown key 'algorithmus'.*'algorithm'",
    ),
    ("data/demo.yaml", "name: demo", [], "data/demo.yaml has the name of a choice.*rename it"),
    ("readme/mine.yaml", "name: demo", [], "holds no group"),
]


@pytest.mark.parametrize(("path", "text", "overrides", "expected"), YAML_MISTAKES)
def test_mistakes_in_own_groups(
    tmp_path: Path, path: str, text: str, overrides: list[str], expected: str
) -> None:
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_text(text)

    with pytest.raises(ConfigError, match=expected) as caught:
        compose(overrides, config_dir=str(tmp_path))
    assert str(caught.value).isprintable()


def test_missing_config_dir_is_named() -> None:
    with pytest.raises(ConfigError, match="--config-dir no-dir: no such directory"):
        compose([], config_dir="no-dir")
