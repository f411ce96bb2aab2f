"""The command ``fedllm``."""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedllm_flwr import __version__
from fedllm_flwr.commands.evaluate.arguments import add_evaluation, evaluate_arguments
from fedllm_flwr.commands.server import add_server
from fedllm_flwr.commands.site import add_site
from fedllm_flwr.commands.usage import CommandParser, refuse_unknown
from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.errors import ConfigError, DataError, FedLLMError, ModelError

Command = Callable[[argparse.Namespace], int]

_STARTED = time.monotonic()

# Non-zero exit statuses. Wrong use: a mistake in the arguments or in a file that they name, found
# before anything has started.
FAILED, WRONG_USE, INTERRUPTED, NO_READER = 1, 2, 130, 141
_WRONG_USE = (ConfigError, DataError, ModelError)
_ADAPTER = "a run, RUN@best, RUN@round=8, RUN@client=NAME, or the directory of an adapter"
_BASE = "base model, if the one recorded with the adapter is not available: hub id or directory"
_TEMPLATE = "prompt template for an adapter outside of a run: alpaca (default), vicuna or chat"
_ONTO = (
    "quantized runs: merge into the base model's original weights (default), or into its "
    "dequantized weights"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status.

    Every error is printed as one line. The traceback of an unexpected error is written to a file
    that the line names.
    """
    prepare_environment()
    typed = list(sys.argv[1:] if arguments is None else arguments)
    handles_sigterm = signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    if not handles_sigterm and threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # like Ctrl-C: the run can be resumed
    try:
        parsed = _parsed(typed)
        status: int = parsed.command(parsed)
        sys.stdout.flush()
        return status
    except _WRONG_USE as error:
        return _fail(str(error), WRONG_USE)
    except FedLLMError as error:
        return _fail(str(error), FAILED)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted.", INTERRUPTED)
    except BrokenPipeError:  # as in `fedllm status | head`; the flush at exit needs a reader
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        return NO_READER
    except Exception as error:
        from fedllm_flwr.runs.crash_log import explain_crash

        return _fail(explain_crash(error, typed), FAILED)


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; overrides may come before and after options."""
    parsed, more = _parser().parse_known_args(arguments)
    unknown = [text for text in more if text.startswith("-") or "overrides" not in parsed]
    if unknown:
        refuse_unknown(arguments, unknown, parsed.parser, "overrides" in parsed)
    if more:
        parsed.overrides = [*parsed.overrides, *more]
    return parsed


def _fail(message: str, status: int) -> int:
    from fedllm_flwr.reporting.console import print_error

    print_error(message)
    return status


def _run(arguments: argparse.Namespace) -> int:
    if arguments.multirun:
        from fedllm_flwr.commands.sweep import multirun

        if arguments.jobs < 1:
            raise ConfigError(f"--jobs must be > 0, got {arguments.jobs}.")
        options = (arguments.config_dir, arguments.quiet, arguments.jobs)
        return multirun(arguments.overrides, *options)
    from fedllm_flwr.config.compose import compose
    from fedllm_flwr.reporting.console import Console

    config = compose(arguments.overrides, arguments.config_dir)
    from fedllm_flwr.server.run import run_simulation

    with Console(quiet=arguments.quiet) as console:
        run_simulation(config, console, _STARTED)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.commands.compare.command import compare

    overrides = list(arguments.overrides)
    if arguments.personal:
        if "evaluation.clients=false" in overrides:
            raise ConfigError("--personal needs evaluation.clients=true; drop one of both.")
        overrides.append("evaluation.clients=true")
    _, failed = compare(overrides, arguments.config_dir)
    return FAILED if failed else 0


def _tune(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.commands.tune import Search, tune

    search = Search(arguments.trials, *arguments.range)
    return tune(arguments.overrides, arguments.config_dir, search)


def _reproduce(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.commands.reproduce.command import reproduce_arguments

    return reproduce_arguments(arguments)


def _config(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.config.compose import compose
    from fedllm_flwr.config.describe import describe, list_choices

    if arguments.list:
        print(list_choices(arguments.config_dir, arguments.overrides))
    else:
        print(describe(compose(arguments.overrides, arguments.config_dir)), end="")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from fedllm_flwr.commands.doctor import check_lines, exit_status, run_checks, verdict

    checks = []
    for check in run_checks(arguments.quick, Path(arguments.output_dir), arguments.hub):
        checks.append(check)
        for line in check_lines(check):
            print(line, flush=True)
    print(verdict(checks))
    return exit_status(checks)


def _generate(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.runs.kept_adapters import find_adapter

    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be > 0, got {arguments.max_new_tokens}.")
    kept = find_adapter(arguments.run, arguments.base, arguments.template)
    if kept.unfinished:
        print(kept.unfinished)
    from fedllm_flwr.commands.generate import answer_side_by_side

    answer_side_by_side(kept, arguments.prompt, arguments.max_new_tokens)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.commands.export import check_export, export, upload
    from fedllm_flwr.runs.kept_adapters import find_adapter

    check_export(arguments.to, arguments.output, arguments.converter)
    kept = find_adapter(arguments.run, arguments.base)
    if kept.unfinished:
        print(kept.unfinished)
    if arguments.to == "hub":
        public, dry_run = arguments.public, arguments.dry_run
        onto = arguments.onto
        lines = upload(kept, arguments.output, arguments.merged, onto, public, dry_run)
    else:
        convert = (arguments.converter, arguments.outtype)
        lines = export(kept, arguments.to, arguments.output, arguments.onto, *convert)
    for line in lines:
        print(line, flush=True)
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from fedllm_flwr.runs.kept_adapters import find_adapter

    if arguments.records < 1:
        raise ConfigError(f"--records must be > 0, got {arguments.records}.")
    kept = find_adapter(arguments.run)
    from fedllm_flwr.commands.audit import audit

    run = kept.run or Path(arguments.run).expanduser()
    for line in audit(kept, run, arguments.records):
        print(line, flush=True)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.commands.status.command import status

    return status(arguments.directory, arguments.health, arguments.json, arguments.watch)


def _report(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.commands.report import report

    return report(arguments.directories, arguments.output)


def _watch(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.commands.watch.command import watch

    return watch(arguments.directory, arguments.port)


def _metrics(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from fedllm_flwr.commands.status.exporter import serve_metrics

    serve_metrics(Path(arguments.directory), arguments.port)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = CommandParser(
        prog="fedllm", description="Federated fine-tuning of large language models with Flower."
    )
    parser.add_argument("--version", action="version", version=f"fedllm-flwr {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    run = _add(commands, "run", _run, "train: fedllm run [group=choice] [section.key=value] ...")
    _add_overrides(run)
    run.add_argument("--multirun", "-m", action="store_true", help="one run per combination: a=1,2")
    text = "with --multirun: number of runs in parallel, one process each; default 1"
    run.add_argument("--jobs", "-j", type=int, default=1, metavar="N", help=text)
    run.add_argument("--quiet", "-q", action="store_true", help="print errors only")

    compare = _add(
        commands, "compare", _compare, "run all algorithms: compare [algorithm=a,b] [seeds=3] ..."
    )
    _add_overrides(compare)
    compare.add_argument(
        "--personal",
        action="store_true",
        help="let clients score the global adapter, and personal ones, on their own records",
    )

    text = "search each algorithm's learning rate: tune [algorithm=a,b] [section.key=value] ..."
    tuned = _add(commands, "tune", _tune, text)
    _add_overrides(tuned)
    text = "learning rates to try per algorithm; default 8"
    tuned.add_argument("--trials", type=int, default=8, metavar="N", help=text)
    text = "range of the search; default 0.0001 0.02"
    tuned.add_argument(
        "--range", type=float, nargs=2, default=(1e-4, 2e-2), metavar="RATE", help=text
    )

    text = "a published experiment: search, seeds, test, tables: reproduce finance [key=value] ..."
    again = _add(commands, "reproduce", _reproduce, text)
    text = "finance, medical, general, code or dpo; see docs/experiments.md"
    again.add_argument("experiment", nargs="?", help=text)
    _add_overrides(again)
    text = "print every run and its steps, and run nothing"
    again.add_argument("--plan", action="store_true", help=text)
    text = "write the tables and figures of a results.json anew, and run nothing"
    again.add_argument("--table", type=_path, metavar="FILE", help=text)
    again.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="of each method; default 5"
    )
    text = "settings of each method, tried on the first seed; default 5"
    again.add_argument("--trials", type=int, default=5, metavar="N", help=text)
    text = "methods or groups of them (main, sgd, family); default main,sgd"
    again.add_argument(
        "--methods", type=_names, default=["main", "sgd"], metavar="NAMES", help=text
    )
    text = "tasks of the test; default: the experiment's"
    again.add_argument("--task", dest="tasks", type=_names, default=[], metavar="TASKS", help=text)
    text = "test on N examples of each part, drawn at random; default: all"
    again.add_argument("--subset", type=int, metavar="N", help=text)
    text = "local files of the test; default: the hub"
    again.add_argument("--data-root", type=_path, metavar="DIR", help=text)
    text = "of code: run generated programs, contained as far as this machine allows"
    again.add_argument("--allow-code-execution", action="store_true", help=text)
    again.add_argument("--jobs", "-j", type=int, default=1, metavar="N", help="runs side by side")

    config = _add(commands, "config", _config, "print the resolved configuration")
    _add_overrides(config)
    config.add_argument(
        "--list",
        action="store_true",
        help="list groups, choices and keys; with words, those that contain one of them",
    )

    doctor = _add(commands, "doctor", _doctor, "check this machine and suggest remedies")
    doctor.add_argument("--quick", action="store_true", help="do not start Ray")
    doctor.add_argument("--hub", action="store_true", help="try to reach the Hugging Face Hub")
    doctor.add_argument("--output-dir", default="outputs", help="where runs will be written")

    generate = _add(commands, "generate", _generate, "answer prompts with base model and adapter")
    generate.add_argument("run", help=_ADAPTER)
    text = "instructions to answer, each in quotes; append an input after a space"
    generate.add_argument("prompt", nargs="+", help=text)
    text = "maximum tokens per answer; default 128"
    generate.add_argument("--max-new-tokens", type=int, default=128, help=text)
    generate.add_argument("--base", metavar="MODEL", help=_BASE)
    generate.add_argument("--template", choices=("alpaca", "vicuna", "chat"), help=_TEMPLATE)

    text = "export an adapter to PEFT, a merged model, GGUF, or the Hugging Face Hub"
    exported = _add(commands, "export", _export, text)
    exported.add_argument("run", help=_ADAPTER)
    exported.add_argument("output", help="output directory; with --to hub: OWNER/NAME")
    exported.add_argument("--to", choices=("peft", "merged", "gguf", "hub"), required=True)
    exported.add_argument("--onto", choices=("full", "quantized"), default="full", help=_ONTO)
    exported.add_argument("--base", metavar="MODEL", help=_BASE)
    text = "gguf: llama.cpp's convert_hf_to_gguf.py; default: in $LLAMA_CPP or on the PATH"
    exported.add_argument("--converter", metavar="FILE", help=text)
    text = "gguf: type of the weights, such as f16 or q8_0; default: auto"
    exported.add_argument("--outtype", default="auto", metavar="TYPE", help=text)
    exported.add_argument("--merged", action="store_true", help="hub: upload the merged model")
    text = "hub: create a public repository; default: a private one"
    exported.add_argument("--public", action="store_true", help=text)
    text = "hub: show what would be uploaded, without uploading"
    exported.add_argument("--dry-run", action="store_true", help=text)

    merge = _add(commands, "merge", _export, "the same as export --to merged")
    merge.add_argument("run", help=_ADAPTER)
    merge.add_argument("output", help="output directory")
    merge.add_argument("--onto", choices=("full", "quantized"), default="full", help=_ONTO)
    merge.add_argument("--base", metavar="MODEL", help=_BASE)
    merge.set_defaults(to="merged", converter=None, outtype="auto")

    text = "what a run reveals about its records: membership, canaries, gradients"
    audited = _add(commands, "audit", _audit, text)
    audited.add_argument("run", help="directory of a simulated run of task=sft")
    text = "number of members and of non-members to score; default 2000"
    audited.add_argument("--records", type=int, default=2000, help=text)

    text = "run benchmark suites on base model and adapters"
    add_evaluation(_add(commands, "evaluate", evaluate_arguments, text))

    status = _add(commands, "status", _status, "state of a run, a server or a site")
    text = "directory of a run, a comparison, a sweep, server init or site init"
    status.add_argument("directory", nargs="?", help=text)
    text = "ask one of Flower's health servers; may be given several times"
    status.add_argument("--health", action="append", default=[], metavar="HOST:PORT", help=text)
    text = "refresh every SECONDS (default 5) until the run has ended"
    status.add_argument("--watch", nargs="?", type=float, const=5.0, metavar="SECONDS", help=text)
    status.add_argument("--json", action="store_true", help="print one JSON object")

    text = "report of a run, a comparison or an evaluation as one HTML file"
    page = _add(commands, "report", _report, text)
    page.add_argument("directories", nargs="+", metavar="DIRECTORY", help="its directory")
    page.add_argument("--output", metavar="FILE", help="default: report.html in the directory")

    text = "live report of a run in a browser, on loopback"
    live = _add(commands, "watch", _watch, text)
    live.add_argument("directory", help="directory of a run, a comparison, or server init")
    live.add_argument("--port", type=int, default=0, help="on 127.0.0.1; default: a free one")

    text = "metrics of a server or a site for Prometheus, on loopback"
    metrics = _add(commands, "metrics", _metrics, text)
    metrics.add_argument("directory", help="directory of server init or site init")
    metrics.add_argument("--port", type=int, default=9464, help="on 127.0.0.1; default 9464")

    add_server(commands, _add)
    add_site(commands, _add)
    return parser


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    command: Command,
    text: str,
) -> argparse.ArgumentParser:
    added = commands.add_parser(name, help=text, description=text)
    added.set_defaults(command=command, parser=added)
    return added


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="group=choice or section.key=value")
    parser.add_argument("--config-dir", help="directory with further choices of the groups")


if __name__ == "__main__":
    sys.exit(main())
