"""A site's policy: what is read, what is refused, and what the server is told."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm_flwr.config import Config, changed
from fedllm_flwr.deployment.directory import filled
from fedllm_flwr.deployment.policy import Policy, read_policy
from fedllm_flwr.errors import ConfigError

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


def test_every_key_is_read(write: Write) -> None:
    file = write(
        "allowed_models: [org/model]\ntasks: [dpo]\nmax_steps: 10\nmax_epochs: 1.5\n"
        "max_batch_size: 32\nmax_rounds: 20\nmax_length: 512\nmax_lora_rank: 16\n"
    )
    assert read_policy(file) == Policy(("org/model",), ("dpo",), 10, 1.5, 32, 20, 512, 16)


def test_absent_null_and_any_set_no_limit(write: Write) -> None:
    for text in ("", "# nothing\n", "max_steps: null\nallowed_models: any\ntasks:\n"):
        policy = read_policy(write(text))
        assert policy == Policy()
        policy.check(asked(training__max_steps=10**9, lora__r=4096), round=10**6)


def test_policy_of_a_new_site_allows_the_defaults(write: Write) -> None:
    policy = read_policy(write(filled("policy.yaml", tasks="[sft]", approval="every-run")))
    policy.check(Config(), round=1)

    limits = {name: value for name, value in vars(policy).items() if name != "allowed_models"}
    assert None not in limits.values()


# name of the limit, a policy, a request at the limit, one beyond it, what it says
LIMITS = [
    (
        Policy(max_steps=10),
        {"training__max_steps": 10},
        {"training__max_steps": 11},
        "max_steps=11",
    ),
    (
        Policy(max_epochs=2),
        {"training__max_steps": -1, "training__num_epochs": 2.0},
        {"training__max_steps": -1, "training__num_epochs": 2.5},
        "num_epochs=2.5",
    ),
    (
        Policy(max_batch_size=32),
        {"training__batch_size": 16, "training__gradient_accumulation_steps": 2},
        {"training__batch_size": 16, "training__gradient_accumulation_steps": 3},
        "gradient_accumulation_steps=48",
    ),
    (
        Policy(max_batch_size=32),
        {"training__micro_batch_size": 32},
        {"training__micro_batch_size": 33},
        "micro_batch_size=33",
    ),
    (
        Policy(max_rounds=5),
        {"federation__num_rounds": 5},
        {"federation__num_rounds": 6},
        "rounds=6",
    ),
    (
        Policy(max_length=64),
        {"training__max_length": 64},
        {"training__max_length": 65},
        "length=65",
    ),
    (Policy(max_lora_rank=8), {"lora__r": 8}, {"lora__r": 9}, "lora.r=9"),
    (Policy(tasks=("sft",)), {"task__name": "sft"}, {"task__name": "dpo"}, "task=dpo"),
    (
        Policy(allowed_models=("a/b", "c/d")),
        {"model__path": "c/d"},
        {"model__path": "c/e"},
        "model.path=c/e",
    ),
]


@pytest.mark.parametrize(("policy", "within", "beyond", "told"), LIMITS)
def test_limit_holds_and_names_key_value_limit_and_who_can_change_it(
    policy: Policy, within: dict[str, object], beyond: dict[str, object], told: str
) -> None:
    policy.check(asked(**within), round=1)
    with pytest.raises(ConfigError) as refusal:
        policy.check(asked(**beyond), round=1)

    limits = {name: value for name, value in vars(policy).items() if name != "approval"}
    [(name, limit)] = [(name, value) for name, value in limits.items() if value is not None]
    shown = ", ".join(limit) if isinstance(limit, tuple) else str(limit)
    for part in (told, name, f"({shown})", "this site's policy.yaml"):
        assert part in str(refusal.value)


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
        ("anything: 5", "unknown key 'anything'. Known: allowed_models, tasks"),
        ("max_steps: ten", "max_steps: ten must be a whole number above 0"),
        ("max_steps: 1.5", "max_steps: 1.5 must be a whole number above 0"),
        ("max_rounds: 0", "max_rounds: 0 must be a whole number above 0"),
        ("max_length: true", "max_length: true must be a whole number"),
        ("max_epochs: .nan", "max_epochs: nan must be a number above 0"),
        ("tasks: sft", "tasks: sft must be a list of names"),
        ("tasks: [sft, dppo]", "names no task with dppo; tasks are sft, dpo"),
        ("allowed_models: []", "allows nothing"),
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
