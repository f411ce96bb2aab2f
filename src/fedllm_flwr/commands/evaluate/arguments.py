"""The options of ``fedllm evaluate``. Nothing heavy is imported before they are read."""

import argparse
from pathlib import Path

from fedllm_flwr.errors import ConfigError


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    what = parser.add_argument_group("what is evaluated (the base model always is)")
    what.add_argument(
        "--run", nargs="+", default=[], metavar="DIR", help="runs; RUN@best, RUN@round=8"
    )
    what.add_argument("--adapter", nargs="+", default=[], metavar="DIR", help="adapters of PEFT")
    what.add_argument("--compare", metavar="DIR", help="all runs of a fedllm compare")
    what.add_argument("--base", metavar="MODEL", help="base model: hub id, directory, or embedded")
    on = parser.add_argument_group("on what")
    on.add_argument("--suite", action="append", default=[], help="suites: finance,medical,...")
    on.add_argument("--task", action="append", default=[], help="single tasks, by name")
    on.add_argument("--limit", type=int, metavar="N", help="first N examples of each part")
    on.add_argument("--shots", type=int, metavar="N", help="solved examples in a prompt")
    on.add_argument("--data-root", metavar="DIR", help="local data files; default: the hub")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--prompt",
        default="trained",
        choices=("trained", "raw", "chat"),
        help="in the template of training (default), bare, or by the tokenizer's chat template",
    )
    how.add_argument("--template", help="template of training, where no run says: alpaca, vicuna")
    how.add_argument("--batch-tokens", type=int, default=4096, help="tokens of a forward pass")
    how.add_argument("--output", metavar="DIR", help="default: outputs/<time>-evaluate")
    how.add_argument("--cache", metavar="DIR", help="of scored examples; default: ~/.cache")
    how.add_argument("--no-cache", action="store_true", help="score everything anew")
    _add_judging(parser)
    code = parser.add_argument_group("generated code (suite code)")
    code.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="run generated programs, contained as far as this machine allows",
    )
    code.add_argument("--samples", type=int, metavar="N", help="answers to a problem (default 1)")
    code.add_argument("--temperature", type=float, metavar="T", help="default: 0, or 0.8 for N > 1")
    parser.add_argument(
        "--list",
        nargs="?",
        const="",
        metavar="SUITE",
        help="list suites and tasks, or the metrics, sources and files of a suite",
    )


def _add_judging(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("open-ended answers and their judge")
    add = group.add_argument
    add(
        "--judge-model",
        metavar="NAME",
        help="model at OPENAI_BASE_URL (key: OPENAI_API_KEY)",
    )
    add("--judge-concurrency", type=int, default=4, metavar="N", help="requests at once; default 4")
    add("--judge-timeout", type=float, default=120, metavar="S", help="of a try; default 120 s")
    add("--judge-attempts", type=int, default=3, metavar="N", help="per verdict; default 3")
    add("--judge-stream", action="store_true", help="take replies token by token")
    add("--judge-price", metavar="IN,OUT", help="per million prompt and completion tokens")
    add("--reference", metavar="FILE", help="answers to be better than (instruction, output)")
    add("--writer-url", metavar="URL", help="endpoint that writes answers; default: this process")
    add("--max-new-tokens", type=int, default=1024, metavar="N", help="of an answer; default 1024")
    add("--answer-batch", type=int, default=16, metavar="N", help="answers at once; default 16")


def _price(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        prompt, completion = (float(part) for part in text.split(","))
    except ValueError:
        prompt = completion = -1.0
    if min(prompt, completion) < 0:
        raise ConfigError(f"--judge-price {text}: give two prices per million tokens, as 2.5,10.")
    return prompt, completion


def evaluate_arguments(arguments: argparse.Namespace) -> int:
    """Carry out the command; returns its exit status."""
    if arguments.list is not None:
        from fedllm_flwr.commands.evaluate.listing import list_suite, list_suites

        print(list_suite(arguments.list) if arguments.list else list_suites())
        return 0
    from fedllm_flwr.commands.evaluate.command import EvaluateOptions, evaluate
    from fedllm_flwr.evaluation.judging.open_ended import JudgeOptions
    from fedllm_flwr.evaluation.suites.samples import RunOptions

    judging = JudgeOptions(
        model=arguments.judge_model,
        concurrency=arguments.judge_concurrency,
        timeout_s=arguments.judge_timeout,
        attempts=arguments.judge_attempts,
        stream=arguments.judge_stream,
        price=_price(arguments.judge_price),
        reference=arguments.reference,
        writer_url=arguments.writer_url,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.answer_batch,
    )
    code = {
        "allow": arguments.allow_code_execution,
        "samples": arguments.samples,
        "temperature": arguments.temperature,
    }
    root = arguments.data_root
    options = RunOptions(
        limit=arguments.limit,
        shots=arguments.shots,
        data_root=None if root is None else Path(root).expanduser(),
        batch_tokens=arguments.batch_tokens,
        extra={**judging.as_extra(), "code": code},
    )
    evaluate(
        EvaluateOptions(
            runs=arguments.run,
            adapters=arguments.adapter,
            compare=arguments.compare,
            base=arguments.base,
            suites=_names(arguments.suite),
            tasks=_names(arguments.task),
            prompt=arguments.prompt,
            template=arguments.template,
            output=arguments.output,
            cache=arguments.cache,
            no_cache=arguments.no_cache,
            options=options,
        )
    )
    return 0


def _names(values: list[str]) -> list[str]:
    return [name.strip() for value in values for name in value.split(",") if name.strip()]
