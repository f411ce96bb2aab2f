"""A site's policy: what is read, what is refused, and what the server is told."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from fedllm_flwr.config import Config, changed
from fedllm_flwr.deployment.new_directory import filled
from fedllm_flwr.deployment.policy import Policy, new_policy, read_policy, site_policy
from fedllm_flwr.errors import ConfigError, RefusedError

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        file = tmp_path / "policy.yaml"
        file.write_text(text)
        return file

    return write


def asked(**changes: object) -> Config:
    """A request, its keys with __ for the dot."""
    config = Config()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config = changed(config, **{section: {name: value}})
    return config


COMMIT = "0123456789abcdef" * 2 + "01234567"


def test_every_key_is_read(write: Write) -> None:
    values: dict[str, object] = {
        "allowed_models": (f"org/model@{COMMIT}", "own"),
        "tasks": ("dpo",),
        "optimizers": ("sgd", "adamw"),
        "target_modules": ("q_proj",),
        "max_epochs": 1.5,
        "datasets": ("notes",),
        "max_state_gb": 0.5,
        "state_days": 2.0,
        "privacy": "record",
        "max_epsilon": 8.0,
        "min_noise_multiplier": 1.5,
        "secret_draws": False,
        "only_secure": True,
        "approval": "new-settings",
    }
    others = [field.name for field in fields(Policy) if field.name not in values]
    values |= {name: number for number, name in enumerate(others, start=1)}
    text = "".join(
        f"{name}: {json.dumps(list(value) if isinstance(value, tuple) else value)}\n"
        for name, value in values.items()
    )
    assert read_policy(write(text)) == Policy(**values)  # type: ignore[arg-type]


def test_what_is_left_out_has_the_safe_default(write: Write) -> None:
    for text in ("", "# nothing\n"):
        assert read_policy(write(text)) == Policy()
    assert site_policy({"client-name": "by hand"}) == Policy(approval="automatic")
    assert Policy().allowed_models == ("embedded", "own")
    unbounded = {name for name, value in vars(Policy()).items() if value is None}
    # The data sets of a new site are all meant to be used, and privacy is the operator's choice.
    assert unbounded == {"datasets", "max_epsilon", "min_noise_multiplier"}


def test_null_and_any_set_no_limit(write: Write) -> None:
    no_limits = ("secret_draws", "only_secure", "approval", "privacy")
    names = [field.name for field in fields(Policy) if field.name not in no_limits]
    policy = read_policy(write("".join(f"{name}: null\n" for name in names)))
    assert replace(policy, secret_draws=False, approval="automatic") == Policy.unlimited()
    policy.check(asked(training__max_steps=10**9, lora__r=4096, model__path="x/y"), round=10**6)
    policy.check_records(asked(evaluation__clients=True), 1, 1)
    policy.check_tensors(["base_model.model.lm_head.lora_A.weight"])
    assert read_policy(write("allowed_models: any\ntasks: any\n")).allowed_models is None
    with pytest.raises(ConfigError, match="secret_draws: null must be true or false"):
        read_policy(write("secret_draws: null"))


def test_a_site_may_take_part_in_nothing_but_secure_aggregation() -> None:
    policy = Policy(only_secure=True)
    policy.check(asked(privacy__secure_aggregation=True), round=1)
    with pytest.raises(RefusedError, match=r"privacy.secure_aggregation=false.*only_secure: true"):
        policy.check(Config(), round=1)


def test_policy_of_a_new_site_is_the_default_and_allows_the_defaults_of_a_run(write: Write) -> None:
    policy = read_policy(write(filled("policy.yaml", **new_policy([]))))
    assert policy == Policy()
    policy.check(Config(), round=1)
    policy.check_records(asked(evaluation__clients=True), 64, 32)


def test_operator_sets_limits_of_a_new_site(write: Write) -> None:
    given = ["min_records_per_round=20", "max_epochs = 0.5", f"allowed_models=[a/b@{COMMIT}]"]
    values = new_policy([*given, "max_rounds=null"], tasks=("dpo",))
    policy = read_policy(write(filled("policy.yaml", **values)))

    assert policy == Policy(
        allowed_models=(f"a/b@{COMMIT}",),
        tasks=("dpo",),
        min_records_per_round=20,
        max_epochs=0.5,
        max_rounds=None,
    )
    for wrong, message in (
        ("max_rounds", "--policy max_rounds: write key=value"),
        ("max_round=5", "--policy: unknown key 'max_round'. Did you mean 'max_rounds'?"),
        ("max_rounds=many", "--policy: max_rounds: many must be a whole number above 0"),
        ("allowed_models=[a/b]", "--policy: allowed_models: [a/b] names a/b; give embedded, own"),
    ):
        with pytest.raises(ConfigError) as refusal:
            new_policy([wrong])
        assert str(refusal.value).startswith(message)


# name and value of a limit, a request at the limit, one beyond it, what it says
LIMITS: list[tuple[str, object, dict[str, object], dict[str, object], str]] = [
    ("max_steps", 10, {"training__max_steps": 10}, {"training__max_steps": 11}, "max_steps=11"),
    (
        "max_epochs",
        2,
        {"training__max_steps": -1, "training__num_epochs": 2.0},
        {"training__max_steps": -1, "training__num_epochs": 2.5},
        "num_epochs=2.5",
    ),
    (
        "max_batch_size",
        32,
        {"training__batch_size": 16, "training__gradient_accumulation_steps": 2},
        {"training__batch_size": 16, "training__gradient_accumulation_steps": 3},
        "=48",
    ),
    (
        "max_batch_size",
        32,
        {"training__micro_batch_size": 32},
        {"training__micro_batch_size": 33},
        "micro_batch_size=33",
    ),
    (
        "min_records_per_step",
        8,
        {"training__batch_size": 4, "training__gradient_accumulation_steps": 2},
        {"training__batch_size": 7},
        "gradient_accumulation_steps=7",
    ),
    (
        "min_records_per_round",
        64,
        {"training__batch_size": 16, "training__max_steps": 4},
        {"training__batch_size": 16, "training__max_steps": 3},
        "=48",
    ),
    ("max_rounds", 5, {"federation__num_rounds": 5}, {"federation__num_rounds": 6}, "rounds=6"),
    ("max_length", 64, {"training__max_length": 64}, {"training__max_length": 65}, "length=65"),
    ("min_length", 16, {"training__max_length": 16}, {"training__max_length": 15}, "length=15"),
    ("max_lora_rank", 8, {"lora__r": 8}, {"lora__r": 9}, "lora.r=9"),
    (
        "max_batch_tokens",
        2048,
        {"evaluation__batch_tokens": 2048},
        {"evaluation__batch_tokens": 2**40},
        "evaluation.batch_tokens=1099511627776",
    ),
    (
        "max_rounds_kept",
        9,
        {"checkpoint__every": 3},
        {"checkpoint__every": 4},
        "checkpoint.every x (checkpoint.keep + 1)=12",
    ),
    ("tasks", ("sft",), {"task__name": "sft"}, {"task__name": "dpo"}, "task=dpo"),
    (
        "optimizers",
        ("adamw",),
        {"training__optimizer": "adamw"},
        {"training__optimizer": "sgd"},
        "optimizer=sgd",
    ),
    (
        "target_modules",
        ("q_proj", "v_proj"),
        {"lora__target_modules": ["q_proj"]},
        {"lora__target_modules": ["q_proj", "lm_head"]},
        "lora.target_modules=lm_head",
    ),
    (
        "target_modules",
        ("q_proj",),
        {"lora__target_modules": ["q_proj"]},
        {"lora__target_modules": "auto"},
        "lora.target_modules=auto",
    ),
    (
        "allowed_models",
        (f"a/b@{COMMIT}",),
        {"model__path": "a/b", "model__revision": COMMIT},
        {"model__path": "a/b", "model__revision": "refs/pr/1"},
        "model.path=a/b@refs/pr/1",
    ),
    ("allowed_models", ("embedded",), {}, {"model__path": "c/e"}, "model.path=c/e"),
    ("allowed_models", ("own",), {"own": True, "model__path": "c/e"}, {}, "model.path=embedded"),
]


@pytest.mark.parametrize(("name", "limit", "within", "beyond", "told"), LIMITS)
def test_limit_holds_and_names_key_value_limit_and_who_can_change_it(
    name: str, limit: object, within: dict[str, object], beyond: dict[str, object], told: str
) -> None:
    policy = replace(Policy.unlimited(), **{name: limit})  # type: ignore[arg-type]
    has_own = bool(within.pop("own", False))
    policy.check(asked(**within), round=1, has_own_model=has_own)
    with pytest.raises(RefusedError) as refusal:
        policy.check(asked(**beyond), round=1)

    shown = ", ".join(limit) if isinstance(limit, tuple) else str(limit)
    for part in (told, name, f"({shown})", "this site's policy.yaml"):
        assert part in str(refusal.value)
    assert refusal.value.shareable == str(refusal.value)


def test_model_without_its_commit_is_refused_with_the_commit() -> None:
    policy = Policy(allowed_models=(f"a/b@{COMMIT}",))

    with pytest.raises(RefusedError, match=f"model.revision as in its allowed_models \\({COMMIT}"):
        policy.check(asked(model__path="a/b"), round=1)
    policy.check(asked(model__path="a/b"), round=1, has_own_model=True)  # its own copy of it


@pytest.mark.parametrize(
    ("train", "held_out", "changes", "told"),
    [
        (63, 40, {}, "it holds fewer records than its min_records_per_round (64)"),
        (7, 40, {}, "min_records_per_step (8)"),
        (64, 31, {}, "it holds back fewer records than its min_records_per_score (32)"),
        (
            100,
            40,
            {"training__max_steps": -1, "training__num_epochs": 0.5},
            "training.num_epochs x records=50.0: it is below its min_records_per_round (64)",
        ),
    ],
)
def test_too_few_records_are_refused(
    train: int, held_out: int, changes: dict[str, object], told: str
) -> None:
    with pytest.raises(RefusedError) as refusal:
        Policy().check_records(asked(evaluation__clients=True, **changes), train, held_out)
    assert told in str(refusal.value)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.0.embed.lora_embedding_B",
        "base_model.model.model.norm.weight",
    ],
)
def test_adapters_outside_of_the_blocks_are_refused(name: str) -> None:
    inside = "base_model.model.model.layers.11.self_attn.q_proj.lora_A.weight"
    Policy().check_tensors([inside, inside.replace("lora_A.weight", "lora_magnitude_vector")])
    with pytest.raises(RefusedError, match="outside of the transformer blocks"):
        Policy().check_tensors([inside, name])


def test_operator_may_allow_the_head() -> None:
    policy = Policy(target_modules=("lm_head",))
    policy.check(asked(lora__target_modules=["lm_head"]), round=1)
    policy.check_tensors(["base_model.model.lm_head.lora_A.weight"])


def test_round_counts_whatever_number_of_rounds_a_server_states() -> None:
    policy, config = Policy(max_rounds=5), asked(federation__num_rounds=1)

    policy.check(config, round=5)
    with pytest.raises(ConfigError, match="num_rounds=6"):
        policy.check(config, round=6)


def test_steps_do_not_count_where_epochs_do_and_the_other_way_round() -> None:
    policy = Policy(max_steps=10, max_epochs=1)

    policy.check(asked(training__max_steps=5, training__num_epochs=100.0), round=1)
    policy.check(asked(training__max_steps=-1, training__num_epochs=1.0), round=1)
    with pytest.raises(ConfigError, match="max_epochs"):
        policy.check(asked(training__max_steps=-1, training__num_epochs=1.1), round=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maxsteps: 5", "unknown key 'maxsteps'. Did you mean 'max_steps'?"),
        ("Max_Lora_Rang: 5", "Did you mean 'max_lora_rank'?"),
        ("anything: 5", "unknown key 'anything'. Known: allowed_models, tasks, optimizers"),
        ("max_steps: ten", "max_steps: ten must be a whole number above 0"),
        ("max_steps: 1.5", "max_steps: 1.5 must be a whole number above 0"),
        ("max_rounds: 0", "max_rounds: 0 must be a whole number above 0"),
        ("max_length: true", "max_length: true must be a whole number"),
        ("max_epochs: .nan", "max_epochs: nan must be a number above 0"),
        ("tasks: sft", "tasks: sft must be a list of names"),
        ("tasks: [sft, dppo]", "names dppo; there are sft, dpo"),
        ("allowed_models: []", "allows nothing"),
        ("allowed_models: [org/model]", "names org/model; give embedded, own"),
        ("allowed_models: [org/model@main]", "names org/model@main; give embedded, own"),
        ("optimizers: [adam]", "names adam; there are adamw, sgd"),
        ("allowed_models: org/model", "allowed_models: org/model must be a list of names"),
        ("max_steps: 5\nmax_steps: 500000", "max_steps stands twice"),
        ("- max_steps", "must hold lines of the form"),
        ("max_steps: [", "not valid YAML, line 1"),
        ("max_steps: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_mistake_is_one_line(write: Write, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read_policy(write(text))

    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_policy_that_is_not_there_allows_nothing(tmp_path: Path) -> None:
    """And the server, which is told, learns no path of the site."""
    with pytest.raises(ConfigError, match="No such file") as refusal:
        read_policy(tmp_path / "policy.yaml")
    assert str(tmp_path) not in str(refusal.value)
