"""The options of ``fedllm evaluate``, parsed before heavy imports."""

import argparse
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.evaluation.suites.options import CodeOptions, JudgeOptions, RunOptions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser; their names are those of the option classes' fields."""
    add = parser.add_argument_group("models (the base model is always evaluated)").add_argument
    several: dict[str, Any] = {"nargs": "+", "default": [], "metavar": "DIR"}
    add("--run", dest="runs", **several, help="runs; RUN@best, RUN@round=8")
    add("--adapter", dest="adapters", **several, help="PEFT adapters")
    add("--compare", metavar="DIR", help="all runs of a fedllm compare")
    add("--base", metavar="MODEL", help="base model: hub id, directory, or embedded")
    add = parser.add_argument_group("tasks").add_argument
    names: dict[str, Any] = {"type": _names, "action": "extend", "default": []}
    add("--suite", dest="suites", metavar="SUITE", **names, help="suites: finance,medical,...")
    add("--task", dest="tasks", metavar="TASK", **names, help="single tasks, by name")
    add("--limit", type=int, metavar="N", help="first N examples of each part")
    add("--subset", type=int, metavar="N", help="N examples of each part, drawn at random")
    add("--shots", type=int, metavar="N", help="few-shot examples in a prompt")
    add("--data-root", type=_path, metavar="DIR", help="local data files; default: the hub")
    add = parser.add_argument_group("how").add_argument
    add(
        "--prompt",
        default="trained",
        choices=("trained", "raw", "chat"),
        help="training template (default), bare prompts, or the tokenizer's chat template",
    )
    add("--template", help="training template of an adapter without a run: alpaca, vicuna")
    add("--batch-tokens", type=int, help="tokens per forward pass")
    add("--output", metavar="DIR", help="default: outputs/<time>-evaluate")
    add("--cache", metavar="DIR", help="cache of scored examples; default: ~/.cache")
    add("--no-cache", action="store_true", help="score all examples again")
    add = parser.add_argument_group("open-ended answers and their judge").add_argument
    add("--judge-model", metavar="NAME", help="model at OPENAI_BASE_URL (key: OPENAI_API_KEY)")
    add("--judge-concurrency", type=int, metavar="N", help="concurrent requests; default 4")
    add("--judge-timeout", type=float, metavar="S", help="per attempt; default 120 s")
    add("--judge-attempts", type=int, metavar="N", help="per verdict; default 3")
    add("--judge-stream", action="store_true", help="receive replies token by token")
    add(
        "--judge-price",
        type=_price,
        metavar="IN,OUT",
        help="per million prompt and completion tokens",
    )
    add(
        "--reference",
        type=_path,
        metavar="FILE",
        help="baseline answers (instruction, output)",
    )
    add("--writer-url", metavar="URL", help="endpoint that writes answers; default: this process")
    add("--max-new-tokens", type=int, metavar="N", help="per answer; default 1024")
    add("--answer-batch", type=int, metavar="N", help="answers per batch; default 16")
    add = parser.add_argument_group("generated code (suite code)").add_argument
    add(
        "--allow-code-execution",
        action="store_true",
        help="run generated programs in a sandbox",
    )
    add("--samples", type=int, metavar="N", help="answers per problem (default 1)")
    add("--temperature", type=float, metavar="T", help="default: 0, or 0.8 for N > 1")
    parser.add_argument(
        "--list",
        nargs="?",
        const="",
        metavar="SUITE",
        help="list suites and tasks, or the metrics, sources and files of a suite",
    )
    for options in (RunOptions(), JudgeOptions(), CodeOptions()):
        parser.set_defaults(**asdict(options))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _price(text: str) -> tuple[float, float]:
    try:
        prompt, completion = (float(part) for part in text.split(","))
    except ValueError:
        prompt = completion = -1.0
    if min(prompt, completion) < 0:
        raise ConfigError(f"--judge-price {text}: give two prices per million tokens, as 2.5,10.")
    return prompt, completion


def evaluate_arguments(arguments: argparse.Namespace) -> int:
    """Execute the command; return its exit status."""
    if arguments.list is not None:
        from fedllm_flwr.commands.evaluate.listing import list_suite, list_suites

        print(list_suite(arguments.list) if arguments.list else list_suites())
        return 0
    from fedllm_flwr.commands.evaluate.command import EvaluateOptions, evaluate

    judging, code = _filled(JudgeOptions, arguments), _filled(CodeOptions, arguments)
    options = _filled(RunOptions, arguments, judging=judging, code=code)
    evaluate(_filled(EvaluateOptions, arguments, options=options))
    return 0


def _filled(cls: type[Options], arguments: argparse.Namespace, **more: Any) -> Options:
    """A dataclass of options, from the arguments with the names of its fields."""
    names = {field.name for field in fields(cls)} - set(more)
    return cls(**{name: getattr(arguments, name) for name in names}, **more)
