"""Plain data to a `Config`: what a server's message, or any JSON, may hold."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import compose
from fedllm_flwr.config.describe import Key, describe, keys, list_choices
from fedllm_flwr.config.names import group_choices
from fedllm_flwr.config.parsing import from_dict
from fedllm_flwr.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs"


def test_json_of_a_configuration_gives_it_back() -> None:
    config = compose(["lora.target_modules=[q_proj]", "data.eval_columns.output=a"])

    assert from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_missing_keys_take_their_defaults() -> None:
    assert from_dict({}) == Config()
    assert from_dict({"training": {"max_steps": 3}}).training.max_length == 512


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"training": {"new_option": 1}}, "unknown key 'training.new_option'"),
        ({"secrecy": {}}, "unknown key 'secrecy'"),
        ({"training": None}, "training=null must have a value"),
        ({"training": [1]}, r"training=\[1\] must be a section"),
        ({"data": {"columns": "x"}}, "data.columns=x must be a section"),
        ({"seed": "1"}, "seed must be a whole number"),
        ({"seed": 1.0}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"seed": 2**63}, "seed must be below"),
        ({"training": {"learning_rate": float("nan")}}, "must be a finite number"),
        ({"training": {"learning_rate": 10**400}}, r"must be below 2\^63"),
        ({"training": {"learning_rate": "1e-3"}}, "must be a number"),
        ({"evaluation": {"clients": 0}}, "true or false"),
        ({"model": {"path": ["a"]}}, "model.path must be text"),
        ({"model": {"path": "a\0b"}}, "model.path="),
        ({"model": {"path": "???"}}, "model.path is required"),
        ({"data": {"labels": "abc"}}, "data.labels must be a list"),
        ({"data": {"labels": [{}]}}, "data.labels must be text"),
        ({"lora": {"target_modules": {"a": 1}}}, "lora.target_modules"),
        ({"lora": {"target_modules": [[1]]}}, "lora.target_modules"),
        ({"algorithm": {"name": "fedpox"}}, "algorithm.name=fedpox"),
        ([], "must be a section"),
        (None, "must be a section"),
        ("x", "must be a section"),
    ],
)
def test_hostile_data_is_refused_in_one_line(values: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        from_dict(values)
    assert str(caught.value).isprintable()


def test_references_in_a_message_stay_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLLM_SECRET", "of the site")

    config = from_dict({"data": {"hub_id": "${oc.env:FEDLLM_SECRET}"}})
    with pytest.raises(ConfigError) as caught:
        from_dict({"data": {"template": "${oc.env:FEDLLM_SECRET}"}})

    assert config.data.hub_id == "${oc.env:FEDLLM_SECRET}"
    assert "of the site" not in str(caught.value)


def test_description_is_the_resolved_yaml() -> None:
    text = describe(compose(["seed=3"]))

    assert "\nseed: 3\n" in text
    assert "column: desk" in text
    assert "${" not in text


def test_list_names_every_choice_and_every_key_with_type_default_and_meaning() -> None:
    text = list_choices()

    for group, some in group_choices().items():
        assert any(line.split()[:1] == [group] for line in text.splitlines())
        assert all(choice in text for choice in some)
    for line in (
        "training.learning_rate: float = 0.0002",
        "model.revision: str | None = null",
        "data.labels: list[str] = []",
        "seed: int = 0",
        "0: no clipping",
    ):
        assert line in text
    assert [key.name for key in keys() if not key.help] == []
    assert len(keys()) == len(set(keys()))


def leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    nested = [
        leaves(value, f"{prefix}{name}.") if value and isinstance(value, dict) else [prefix + name]
        for name, value in values.items()
    ]
    return [name for some in nested for name in some]


def test_keys_are_those_of_the_schema() -> None:
    assert [key.name for key in keys()] == leaves(asdict(Config()))


def row(key: Key) -> str:
    """A key's line of the table in docs/configuration.md."""
    hint, meaning = (text.replace("|", "\\|") for text in (key.type, key.help))
    return f"| `{key.name}` | `{hint}` | `{key.default}` | {meaning} |"


def test_every_key_is_documented_as_the_schema_has_it() -> None:
    documented = (DOCS / "configuration.md").read_text("utf-8")

    missing = [line for key in keys() if (line := row(key)) not in documented]
    assert missing == []
