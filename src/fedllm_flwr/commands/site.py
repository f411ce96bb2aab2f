"""``fedllm site ...``: the commands of a site's operator."""

import argparse

from fedllm_flwr.commands.usage import AddParser


def add_site(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", add: AddParser
) -> None:
    """Add ``fedllm site <step>``; `add` creates a step's parser."""
    text = (
        "operate a site of a federation: init, start, requests, approve, decline, log, ledger, "
        "merge, forget"
    )
    site = commands.add_parser("site", help=text, description=text)
    steps = site.add_subparsers(required=True, metavar="step")

    step = add(steps, "init", init, "check the data; create keys, limits and a start script")
    step.add_argument("directory", help="new directory")
    step.add_argument("--name", required=True, help="this site's name in tables and logs")
    step.add_argument(
        "--data",
        required=True,
        action="append",
        help="file or directory of this site's records; with several data sets, NAME=PATH for each",
    )
    step.add_argument(
        "--preprocessing",
        default="none",
        help="how the data are read: none, hh_rlhf, fingpt, medalpaca, mathinstruct; default none",
    )
    step.add_argument("--threads", type=int, help="CPU threads; default OMP_NUM_THREADS, else all")
    step.add_argument("--lora-rank", type=int, help="maximum rank of an adapter trained here")
    step.add_argument("--gpus", help="GPUs that training may use, as 0 or 0,1; default all")
    step.add_argument("--server", required=True, help="host:port of the server")
    step.add_argument("--ca", help="ca.crt from the server's operator")
    step.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ROLE=COLUMN",
        help="the data's column for a role, as instruction=question",
    )
    step.add_argument("--model-path", help="this site's own copy of the base model")
    step.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a limit of policy.yaml other than its default, as min_records_per_round=20 or "
        "allowed_models=[org/model@<commit>]",
    )
    step.add_argument("--device", default="auto", help="auto, cpu, cuda or mps; default auto")
    step.add_argument(
        "--health-port",
        type=int,
        help="port of the health server, on loopback; default: derived from the name",
    )
    step.add_argument(
        "--approval",
        default="every-run",
        help="runs that need approval: every-run, new-settings or automatic; default every-run",
    )
    text = "no encryption and no authentication"
    step.add_argument("--insecure", action="store_true", help=text)

    step = add(steps, "start", start, "start the SuperNode: site start <dir> [option] ...")
    step.add_argument("directory", help="directory of site init")
    step.add_argument(
        "options", nargs=argparse.REMAINDER, help="further options of flower-supernode"
    )

    step = add(steps, "check", check, "show what will be learned here, with examples")
    step.add_argument("directory", help="directory of site init")
    step.add_argument("--model", help="directory of a model, whose tokenizer is used")
    step.add_argument("--template", default="alpaca", help="alpaca, vicuna or chat")
    step.add_argument("--max-length", type=int, default=512, help="tokens; default 512")
    step.add_argument("--dataset", help="one of several data sets")

    step = add(steps, "requests", requests, "list runs that wait for approval")
    step.add_argument("directory", help="directory of site init")
    step.add_argument("--all", action="store_true", help="include decided requests")
    step.add_argument("--full", action="store_true", help="show all settings of each request")
    step.add_argument("--json", action="store_true", help="print one JSON list")

    for word in ("approve", "decline"):
        step = add(steps, word, decide, f"{word} a run that waits for approval")
        step.add_argument("directory", help="directory of site init")
        step.add_argument("request", help="its id in `fedllm site requests`, or the run's")
        step.set_defaults(approve=word == "approve")

    step = add(steps, "log", log, "read the audit log and check its chain")
    step.add_argument("directory", help="directory of site init")
    step.add_argument("--run", help="only this run; its id, or the first digits")
    step.add_argument("--json", action="store_true", help="print the entries as JSON lines")

    step = add(steps, "ledger", ledger, "the epsilon that runs have spent on the records")
    step.add_argument("directory", help="directory of site init")

    step = add(steps, "merge", merge_own, "merge this site's personal adapter into the model")
    step.add_argument("directory", help="directory of site init")
    step.add_argument("run", help="Flower's id of a run with algorithm=fedsa or ditto")
    step.add_argument("output", help="output directory")

    step = add(steps, "forget", forget, "remove a site's state of runs, and tokenised records")
    step.add_argument("directory", help="directory of site init")
    step.add_argument("run", nargs="?", help="Flower's id of a run, or its folder in state/runs")
    step.add_argument("--all", action="store_true", help="all runs, and tokenised records")


def check(arguments: argparse.Namespace) -> int:
    """Show what will be learned from the site's data."""
    from fedllm_flwr.deployment.site_check import check_site

    lines = check_site(
        arguments.directory,
        arguments.model,
        arguments.template,
        arguments.max_length,
        arguments.dataset,
    )
    print("\n".join(lines))
    return 0


def requests(arguments: argparse.Namespace) -> int:
    """List the runs that wait for approval."""
    from fedllm_flwr.deployment.site_views import requests_lines

    lines = requests_lines(arguments.directory, arguments.all, arguments.full, arguments.json)
    print("\n".join(lines))
    return 0


def decide(arguments: argparse.Namespace) -> int:
    """Approve or decline a run."""
    from fedllm_flwr.deployment.site_views import decide_request

    print("\n".join(decide_request(arguments.directory, arguments.request, arguments.approve)))
    return 0


def log(arguments: argparse.Namespace) -> int:
    """Print the audit log."""
    from fedllm_flwr.deployment.site_views import print_log

    print_log(arguments.directory, arguments.run, arguments.json)
    return 0


def ledger(arguments: argparse.Namespace) -> int:
    """Print the privacy account."""
    from fedllm_flwr.deployment.privacy_account import ledger_lines

    print("\n".join(ledger_lines(arguments.directory)))
    return 0


def start(arguments: argparse.Namespace) -> int:
    """Replace this process by the site's SuperNode."""
    from fedllm_flwr.deployment.starting import start_supernode

    start_supernode(arguments.directory, arguments.options)


def merge_own(arguments: argparse.Namespace) -> int:
    """Merge the site's personal adapter into the base model."""
    from pathlib import Path

    from fedllm_flwr.deployment.personal import personal_adapter
    from fedllm_flwr.runs.kept_adapters import check_output

    output = Path(arguments.output).expanduser()
    check_output(output)
    kept = personal_adapter(arguments.directory, arguments.run)
    from fedllm_flwr.commands.merge import merge

    for line in merge(kept, output):
        print(line, flush=True)
    return 0


def forget(arguments: argparse.Namespace) -> int:
    """Remove the state of runs."""
    from fedllm_flwr.deployment.site_state import forget_runs

    print("\n".join(forget_runs(arguments.directory, arguments.run, arguments.all)))
    return 0


def init(arguments: argparse.Namespace) -> int:
    """Create a site's directory."""
    from fedllm_flwr.deployment.site_directory import SiteOptions, init_site

    options = SiteOptions(
        name=arguments.name,
        data=arguments.data,
        server=arguments.server,
        ca=arguments.ca,
        columns=arguments.column,
        model_path=arguments.model_path,
        device=arguments.device,
        insecure=arguments.insecure,
        health_port=arguments.health_port,
        approval=arguments.approval,
        preprocessing=arguments.preprocessing,
        threads=arguments.threads,
        gpus=arguments.gpus,
        lora_rank=arguments.lora_rank,
        policy=arguments.policy,
    )
    print("\n".join(init_site(arguments.directory, options)))
    return 0
