"""The command ``fedllm``."""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

from fedllm_flwr import __version__
from fedllm_flwr.benchmark.arguments import add_evaluation
from fedllm_flwr.deployment.commands import add_server, add_site
from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.errors import FedLLMError
from fedllm_flwr.status.arguments import add_status, status_arguments

Command = Callable[[argparse.Namespace], int]

_STARTED = time.monotonic()
_EXIT_FAILED, _EXIT_INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status. A user's mistake costs one line, not a trace."""
    prepare_environment()
    parsed = _parsed(arguments)
    _end_on_sigterm_as_on_ctrl_c()
    try:
        command: Command = parsed.command
        return command(parsed)
    except FedLLMError as error:
        return _fail(str(error))
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted.", _EXIT_INTERRUPTED)


def _end_on_sigterm_as_on_ctrl_c() -> None:
    """Job schedulers and `kill` send it; what is there of a run is to be kept then, too."""
    is_free = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if is_free and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command; its overrides may stand before and after its options."""
    parser = _parser()
    parsed, more = parser.parse_known_args(arguments)
    unknown = [text for text in more if text.startswith("-") or "overrides" not in parsed]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if more:
        parsed.overrides = [*parsed.overrides, *more]
    return parsed


def _fail(message: str, status: int = _EXIT_FAILED) -> int:
    from fedllm_flwr.reporting.console import print_error

    print_error(message)
    return status


def _run(arguments: argparse.Namespace) -> int:
    if arguments.multirun:
        from fedllm_flwr.multirun import multirun

        return multirun(arguments.overrides, arguments.config_dir, arguments.quiet)
    from fedllm_flwr.config.compose import compose
    from fedllm_flwr.reporting.console import Console

    config = compose(arguments.overrides, arguments.config_dir)
    from fedllm_flwr.run import run_simulation

    with Console(quiet=arguments.quiet) as console:
        run_simulation(config, console, _STARTED)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.comparison.command import compare

    return compare(arguments.overrides, arguments.config_dir)


def _config(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.config.compose import compose
    from fedllm_flwr.config.describe import describe, list_choices

    if arguments.list:
        print(list_choices(arguments.config_dir))
    else:
        print(describe(compose(arguments.overrides, arguments.config_dir)), end="")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from fedllm_flwr.doctor import check_lines, exit_status, run_checks, verdict

    checks = []
    for check in run_checks(arguments.quick, Path(arguments.output_dir), arguments.hub):
        checks.append(check)
        for line in check_lines(check):
            print(line, flush=True)
    print(verdict(checks))
    return exit_status(checks)


def _generate(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.generation import answer_side_by_side

    answer_side_by_side(arguments.run, arguments.prompt, arguments.max_new_tokens)
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.generation import merge

    print(merge(arguments.run, arguments.output))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.benchmark.arguments import evaluate_arguments

    return evaluate_arguments(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedllm", description="Federated fine-tuning of large language models with Flower."
    )
    parser.add_argument("--version", action="version", version=f"fedllm-flwr {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    run = _add(commands, "run", _run, "train: fedllm run [group=choice] [section.key=value] ...")
    _add_overrides(run)
    run.add_argument("--multirun", "-m", action="store_true", help="one run per combination: a=1,2")
    run.add_argument("--quiet", "-q", action="store_true", help="print errors only")

    compare = _add(
        commands, "compare", _compare, "run all algorithms: compare [algorithm=a,b] [seeds=3] ..."
    )
    _add_overrides(compare)

    config = _add(commands, "config", _config, "print the resolved configuration")
    _add_overrides(config)
    config.add_argument("--list", action="store_true", help="list groups, choices and keys")

    doctor = _add(commands, "doctor", _doctor, "check this machine, and say what to do")
    doctor.add_argument("--quick", action="store_true", help="do not start Ray")
    doctor.add_argument("--hub", action="store_true", help="try to reach the Hugging Face Hub")
    doctor.add_argument("--output-dir", default="outputs", help="where runs will write")

    _add_prompts(_add(commands, "generate", _generate, "answer a prompt with base and adapter"))
    merge = _add(commands, "merge", _merge, "write the model with the adapter merged into it")
    merge.add_argument("run", help="directory of a run")
    merge.add_argument("output", help="directory to write")
    evaluate = _add(commands, "evaluate", _evaluate, "benchmark suites on base and adapters")
    add_evaluation(evaluate)
    add_status(_add(commands, "status", status_arguments, "how a run, a server or a site stands"))
    add_server(commands, _add)
    add_site(commands, _add)
    return parser


def _add_prompts(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("run", help="directory of a run")
    text = "instructions to answer, each in quotes; an input follows after a space"
    generate.add_argument("prompt", nargs="+", help=text)
    text = "longest answer, in tokens; default 128"
    generate.add_argument("--max-new-tokens", type=int, default=128, help=text)


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    command: Command,
    text: str,
) -> argparse.ArgumentParser:
    added = commands.add_parser(name, help=text, description=text)
    added.set_defaults(command=command)
    return added


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="group=choice or section.key=value")
    parser.add_argument("--config-dir", help="directory with further choices of the groups")


if __name__ == "__main__":
    sys.exit(main())
