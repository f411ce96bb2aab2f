"""The options of ``fedllm evaluate`` for answers and judges. Nothing heavy is imported here."""

import argparse
from typing import Any

from fedllm_flwr.errors import ConfigError


def add_judging(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
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


def judging_extra(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options, as `RunOptions.extra` takes them.

    Raises:
        ConfigError, DataError: an option cannot be read.
    """
    from fedllm_flwr.evaluation.judging.open_ended import JudgeOptions

    return JudgeOptions(
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
    ).as_extra()


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
