"""The base model and its adapter: what is loaded when, kinds of adapters, precision."""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedllm_flwr.client.local_round import train_locally
from fedllm_flwr.config import Config, changed
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.federation.messages import Assignment
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.models.scoring import score_examples
from fedllm_flwr.params import Params

MODELS = Path(__file__).parents[3] / "shared/data/models"
EMBEDDED = Path(__file__).parents[2] / "src/fedllm_flwr/assets/tiny"
MakeConfig = Callable[..., Config]
MakeExamples = Callable[..., Encoded]


def real_model(path: Path) -> Any:
    there = (path / "config.json").is_file()
    return pytest.param(path, marks=pytest.mark.skipif(not there, reason=f"no {path.name} here"))


REAL = [real_model(p) for p in (MODELS / "stories260k", MODELS / "base7m", EMBEDDED)]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the base models that were loaded, in order."""
    loaded: list[str] = []
    original = AutoModelForCausalLM.from_pretrained

    def counted(path: str, **options: Any) -> Any:
        loaded.append(path)
        return original(path, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    return loaded


def same_bits(one: Params, other: Params) -> bool:
    return one.keys() == other.keys() and all(
        one[name].tobytes() == other[name].tobytes() for name in one
    )


def train(config: Config, examples: Encoded, state: Path, rounds: int = 1, **task: Any) -> Any:
    """(loss of the first round, loss of the last, adapter) of a client alone."""
    params, losses = load_model(config).initial, []
    for server_round in range(1, rounds + 1):
        asked = Assignment(server_round, params, 2e-2, config, **task)
        update = train_locally(asked, ClientData("a", examples, examples), state)
        params = {name: params[name] + update.delta[name] for name in params}
        losses.append(update.metrics["loss"])
    return losses[0], losses[-1], params


# What is loaded when


def test_one_base_serves_all_clients_rounds_seeds_and_adapter_shapes(
    loads: list[str],
    make_config: MakeConfig,
    copied: Path,
    random_examples: MakeExamples,
    tmp_path: Path,
) -> None:
    path = {"model": {"path": str(copied)}, "training": {"max_steps": 1, "batch_size": 2}}
    for seed in (0, 1):
        for lora in ({"r": 4}, {"r": 8, "target_modules": "all-linear"}, {"dora": True}):
            config = make_config(seed=seed, lora=lora, **path)
            for name in ("a", "b"):
                data = ClientData(name, random_examples(8), random_examples(1))
                for server_round in (1, 2):
                    task = Assignment(server_round, load_model(config).initial, 1e-2, config)
                    train_locally(task, data, tmp_path)
    assert loads == [str(copied)]


def test_another_base_precision_or_quantization_is_loaded_anew(
    loads: list[str], make_config: MakeConfig, copied: Path, toy_model: Path
) -> None:
    load_model(make_config(model={"path": str(copied)}))
    load_model(make_config(model={"path": str(toy_model)}))
    load_model(make_config(training={"dtype": "bfloat16"}))
    load_model(make_config(model={"attention": "eager"}))
    assert loads == [str(copied), *[str(toy_model)] * 3]


def test_a_replaced_base_is_freed(
    make_config: MakeConfig, copied: Path, random_examples: MakeExamples, tmp_path: Path
) -> None:
    """Also after training, and although the collector passes over what is frozen."""
    config = make_config(training={"max_steps": 1, "batch_size": 2})
    train(config, random_examples(4), tmp_path)
    old = weakref.ref(load_model(config).peft.get_base_model())
    load_model(make_config(model={"path": str(copied)}))
    assert old() is None


OTHERS: list[dict[str, Any]] = [
    {"lora": {"dora": True, "target_modules": "all-linear"}},
    {
        "lora": {"rslora": True, "r": 2},
        "training": {"gradient_checkpointing": True, "max_steps": 2},
    },
    {"seed": 9, "lora": {"target_modules": ["down_proj"]}, "training": {"max_steps": 2}},
]


def test_an_adapter_leaves_nothing_behind_in_the_base(
    loads: list[str],
    make_config: MakeConfig,
    copied: Path,
    toy_model: Path,
    random_examples: MakeExamples,
    tmp_path: Path,
) -> None:
    examples, options = random_examples(20), {"training": {"max_steps": 3}}
    load_model(make_config(model={"path": str(copied)}))
    _, _, fresh = train(make_config(**options), examples, tmp_path)
    for other in OTHERS:
        train(make_config(**other), examples, tmp_path)
    _, _, params = train(make_config(**options), examples, tmp_path)

    assert loads == [str(copied), str(toy_model)]
    assert same_bits(params, fresh)
    assert not load_model(make_config(**options)).peft.get_base_model().is_gradient_checkpointing


@pytest.mark.slow
def test_a_used_process_computes_what_a_fresh_one_does(
    make_config: MakeConfig, toy_model: Path, random_examples: MakeExamples, tmp_path: Path
) -> None:
    examples = random_examples(20)
    script = tmp_path / "fresh.py"
    script.write_text(_FRESH.format(tests=Path(__file__).parents[1], path=str(toy_model)))
    np.savez(tmp_path / "examples.npz", **{k: getattr(examples, k) for k in _ARRAYS})
    done = subprocess.run(
        [sys.executable, script, tmp_path], check=True, timeout=120, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("", "")  # no library noise on a good run
    fresh = load_file(tmp_path / "fresh.safetensors")

    for other in OTHERS:
        train(make_config(**other), examples, tmp_path)
    _, _, params = train(make_config(training={"max_steps": 3}), examples, tmp_path)
    assert same_bits(params, {name: value.numpy() for name, value in fresh.items()})


_ARRAYS = ("tokens", "supervised", "offsets")
_FRESH = """
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fedllm_flwr.environment import prepare_environment

prepare_environment()
sys.path.insert(0, "{tests}")
from toys import as_encoded
from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.schema import ModelConfig
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.federation.messages import Assignment
from fedllm_flwr.client.local_round import train_locally
from fedllm_flwr.models.adapted_model import load_model

folder = Path(sys.argv[1])
arrays = np.load(folder / "examples.npz")
examples = as_encoded(arrays["tokens"], arrays["supervised"], np.diff(arrays["offsets"]))
config = Config(model=ModelConfig(name="toy", path="{path}"))
config = changed(config, training={{"max_length": 64, "max_steps": 3}})
initial = load_model(config).initial
asked, data = Assignment(1, initial, 2e-2, config), ClientData("a", examples, examples)
update = train_locally(asked, data, folder)
save_file({{n: initial[n] + update.delta[n] for n in initial}}, folder / "fresh.safetensors")
"""


# Kinds of adapters


def test_the_fresh_adapter_depends_on_the_seed_alone_and_changes_nothing(
    make_config: MakeConfig,
) -> None:
    torch.manual_seed(123)
    first = load_model(make_config(seed=1)).initial
    load_model(make_config(seed=2))
    torch.manual_seed(321)
    again = load_model(make_config(seed=1))
    assert same_bits(first, again.initial)

    ids = torch.arange(20)[None]
    with torch.no_grad():
        adapted = again.peft.eval()(input_ids=ids).logits
        with again.peft.disable_adapter():
            assert torch.equal(again.peft(input_ids=ids).logits, adapted)


@pytest.mark.parametrize(
    "lora",
    [{}, {"target_modules": "all-linear"}, {"dora": True}, {"rslora": True, "r": 4}],
    ids=["auto", "all-linear", "dora", "rslora"],
)
def test_parameters_have_one_name_whether_read_loaded_or_trained(
    lora: dict[str, Any], make_config: MakeConfig
) -> None:
    model = load_model(make_config(lora=lora))
    rng = np.random.default_rng(0)
    drawn = {n: rng.normal(size=v.shape).astype(np.float32) for n, v in model.initial.items()}
    model.load(drawn)

    assert same_bits(model.params(), drawn)
    trainable = {name: p.detach().numpy() for name, p in model.trainable().items()}
    assert same_bits(dict(sorted(trainable.items())), dict(sorted(drawn.items())))
    assert model.params().keys() == get_peft_model_state_dict(model.peft).keys()


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("auto", {"q_proj", "v_proj"}),
        (["k_proj", "down_proj"], {"k_proj", "down_proj"}),
        (["layers.1.self_attn.q_proj"], {"q_proj"}),
        (
            "all-linear",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
    ],
)
def test_target_modules(targets: Any, expected: set[str], make_config: MakeConfig) -> None:
    names = load_model(make_config(lora={"target_modules": targets})).initial
    assert {name.split(".")[-3] for name in names} == expected


def test_rslora_scales_by_the_square_root_of_the_rank(make_config: MakeConfig) -> None:
    for rslora, scale in ((False, 16 / 4), (True, 16 / 2)):
        model = load_model(make_config(lora={"r": 4, "alpha": 16, "rslora": rslora}))
        layer = model.peft.get_base_model().model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == scale


def test_params_are_a_copy(make_config: MakeConfig) -> None:
    model = load_model(make_config())
    taken = model.params()
    next(iter(model.trainable().values())).data.add_(1.0)
    assert same_bits(taken, model.initial)
    model.load(model.initial)


# Precision and memory


@pytest.mark.parametrize(
    "sections",
    [
        {"quantization": {"name": "nf4"}},
        {"quantization": {"name": "int8"}},
        {"training": {"dtype": "bfloat16"}},
        pytest.param({"training": {"dtype": "float16"}}, marks=pytest.mark.slow),
        {"model": {"attention": "eager"}},
        {"training": {"gradient_checkpointing": True}},
        pytest.param({"lora": {"dora": True}}, marks=pytest.mark.slow),
        pytest.param(
            {"training": {"dtype": "bfloat16"}, "quantization": {"name": "nf4"}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["nf4", "int8", "bfloat16", "float16", "eager", "checkpointing", "dora", "nf4-bfloat16"],
)
def test_training_learns(
    sections: dict[str, Any],
    make_config: MakeConfig,
    random_examples: MakeExamples,
    tmp_path: Path,
) -> None:
    """Eight examples are learnt by heart, after an evaluation by the same model; SCAFFOLD's
    bookkeeping goes along."""
    training = {"max_steps": 8, "batch_size": 8} | sections.get("training", {})
    lora = {"r": 16, "target_modules": "all-linear", "dropout": 0.0} | sections.get("lora", {})
    config = make_config(**sections | {"training": training, "lora": lora})
    examples, model = random_examples(8), load_model(config)
    before = score_examples(model, examples, 2048)

    control = {name: np.zeros_like(value) for name, value in model.initial.items()}
    scaffold = changed(config, algorithm={"name": "scaffold"})
    first, last, params = train(scaffold, examples, tmp_path, rounds=2, sent={"control": control})
    model.load(params)
    after = score_examples(model, examples, 2048)
    assert last < first
    assert after.loss < 0.8 * before.loss
    assert all(p.dtype == torch.float32 for p in model.trainable().values())


def test_quantized_weights_are_held_in_few_bits(make_config: MakeConfig) -> None:
    plain = load_model(make_config())
    layers = {}
    for name in ("nf4", "int8"):
        model = load_model(make_config(quantization={"name": name}))
        layers[name] = model.peft.get_base_model().model.layers[0].mlp.down_proj.weight
        assert model.quantized
        assert model.num_base_parameters == plain.num_base_parameters
    assert layers["nf4"].numel() == 32 * 64 // 2
    assert layers["int8"].dtype == torch.int8


def test_evaluation_leaves_quantized_weights_as_they_are(
    make_config: MakeConfig, random_examples: MakeExamples, tmp_path: Path
) -> None:
    config = make_config(quantization={"name": "nf4"}, training={"max_steps": 2, "batch_size": 4})
    examples = random_examples(10)
    _, _, before = train(config, examples, tmp_path)
    score_examples(load_model(config), examples, 512)
    _, _, after = train(config, examples, tmp_path)
    assert same_bits(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("path", REAL)
def test_real_models_learn(path: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    from fedllm_flwr.data.encode import encode

    config = make_config(
        model={"path": str(path)}, training={"max_steps": 4, "batch_size": 4, "max_length": 128}
    )
    turns = [
        [{"role": "user", "content": f"Item {i}"}, {"role": "assistant", "content": "It is fine."}]
        for i in range(16)
    ]
    examples = encode(turns, load_model(config).tokenizer, "vicuna", 128)
    first, last, _ = train(config, examples, tmp_path, rounds=3)
    assert last < 0.8 * first


def test_a_tokenizer_without_pad_token_pads_with_eos(
    copied: Path, make_config: MakeConfig, random_examples: MakeExamples, tmp_path: Path
) -> None:
    examples = random_examples(20)
    _, _, with_pad = train(make_config(), examples, tmp_path)
    file = copied / "tokenizer_config.json"
    values = json.loads(file.read_text())
    del values["pad_token"]
    file.write_text(json.dumps(values))
    config = make_config(model={"path": str(copied)})
    _, _, without = train(config, examples, tmp_path)

    assert load_model(config).tokenizer.pad_token is None
    assert same_bits(with_pad, without)
