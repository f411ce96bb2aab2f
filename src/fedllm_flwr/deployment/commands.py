"""The commands of operators: ``fedllm server ...`` and ``fedllm site ...``."""

import argparse
from collections.abc import Callable

Add = Callable[..., argparse.ArgumentParser]


def add_server(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", add: Add) -> None:
    """``fedllm server <step>``; `add` makes a parser for one step."""
    text = "the server of a real federation: init, register, run, unregister, renew"
    server = commands.add_parser("server", help=text, description=text)
    steps = server.add_subparsers(required=True, metavar="step")

    _add_server_init(steps, add)
    _add_membership(steps, add)

    run = add(steps, "run", _server_run, "run on the sites: server run <dir> [key=value] ...")
    run.add_argument("directory", help="directory of server init; the server must be running")
    run.add_argument("overrides", nargs="*", help="group=choice or section.key=value")
    run.add_argument(
        "--dry-run", action="store_true", help="ask the sites and show the plan; train nothing"
    )

    prune = add(steps, "prune", _server_prune, "forget old runs in superlink.db; outputs/ stays")
    prune.add_argument("directory", help="directory of server init")
    prune.add_argument("--days", type=int, default=90, help="since a run has ended; default 90")

    renew = add(steps, "renew", _server_renew, "new server certificate of the same authority")
    renew.add_argument("directory", help="directory of server init")
    renew.add_argument(
        "--host", action="append", default=[], help="a further name or address of this server"
    )


def _add_server_init(
    steps: "argparse._SubParsersAction[argparse.ArgumentParser]", add: Add
) -> None:
    init = add(steps, "init", _server_init, "make certificates, start scripts and a connection")
    init.add_argument("directory", help="new directory")
    init.add_argument(
        "--host",
        action="append",
        required=True,
        help="name or address by which the sites reach the server; give it once for each",
    )
    init.add_argument(
        "--port-base",
        type=int,
        default=9091,
        help="first of five ports: app, sites, commands, health of SuperLink and SuperExec; all "
        "but that of the sites are private; default 9091",
    )
    init.add_argument(
        "--private-host",
        default="127.0.0.1",
        help="where the server's own app and commands find it; who reaches it starts runs; "
        "default 127.0.0.1",
    )
    _add_insecure(init)


def _add_membership(steps: "argparse._SubParsersAction[argparse.ArgumentParser]", add: Add) -> None:
    register = add(steps, "register", _server_register, "admit a site by its public key")
    register.add_argument("directory", help="directory of server init; the server must be running")
    register.add_argument("key", help="public key of the site: its *.pub")

    unregister = add(steps, "unregister", _server_unregister, "let a site go, by its name")
    unregister.add_argument("directory", help="directory of server init; the server must run")
    unregister.add_argument("name", help="name of the site, as its *.pub was called")


def add_site(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", add: Add) -> None:
    """``fedllm site <step>``; `add` makes a parser for one step."""
    text = "a site of a real federation: init, start, requests, approve, decline, log, forget"
    site = commands.add_parser("site", help=text, description=text)
    steps = site.add_subparsers(required=True, metavar="step")

    init = add(steps, "init", _site_init, "check the data; make keys, limits and a start script")
    init.add_argument("directory", help="new directory")
    init.add_argument("--name", required=True, help="how tables and logs call this site")
    init.add_argument(
        "--data",
        required=True,
        action="append",
        help="file or directory of this site's records; NAME=PATH for each of several data sets",
    )
    init.add_argument(
        "--preprocessing",
        default="none",
        help="how the data are read: none, hh_rlhf, fingpt, medalpaca, mathinstruct; default none",
    )
    init.add_argument("--threads", type=int, help="CPU threads; default OMP_NUM_THREADS, else all")
    init.add_argument("--gpus", help="GPUs that training may use, as 0 or 0,1; default all")
    init.add_argument("--server", required=True, help="host:port of the server")
    init.add_argument("--ca", help="ca.crt from the server's operator")
    init.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ROLE=COLUMN",
        help="which column of the data plays a role, as instruction=question",
    )
    init.add_argument("--model-path", help="this site's own copy of the base model")
    init.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a limit of policy.yaml in the place of its default, as min_records_per_round=20 or "
        "allowed_models=[org/model@<commit>]",
    )
    init.add_argument("--device", default="auto", help="auto, cpu, cuda or mps; default auto")
    init.add_argument(
        "--health-port",
        type=int,
        help="port of the health server, on loopback; default: one that follows from the name",
    )
    init.add_argument(
        "--approval",
        default="every-run",
        help="which runs wait for you: every-run, new-settings or automatic; default every-run",
    )
    _add_insecure(init)

    start = add(steps, "start", _site_start, "start the SuperNode: site start <dir> [option] ...")
    start.add_argument("directory", help="directory of site init")
    start.add_argument(
        "options", nargs=argparse.REMAINDER, help="further options of flower-supernode"
    )
    _add_decisions(steps, add)


def _add_decisions(steps: "argparse._SubParsersAction[argparse.ArgumentParser]", add: Add) -> None:
    check = add(steps, "check", _site_check, "what will be learned here, with examples")
    check.add_argument("directory", help="directory of site init")
    check.add_argument("--model", help="directory of a model, whose tokenizer counts and renders")
    check.add_argument("--template", default="alpaca", help="alpaca, vicuna or chat")
    check.add_argument("--max-length", type=int, default=512, help="tokens; default 512")
    check.add_argument("--dataset", help="one of several data sets")

    requests = add(steps, "requests", _site_requests, "runs that wait for this site's approval")
    requests.add_argument("directory", help="directory of site init")
    requests.add_argument("--all", action="store_true", help="those that are decided, too")
    requests.add_argument("--full", action="store_true", help="every setting of each")
    requests.add_argument("--json", action="store_true", help="print one JSON list")

    for word in ("approve", "decline"):
        decision = add(steps, word, _site_decide, f"{word} a run that waits")
        decision.add_argument("directory", help="directory of site init")
        decision.add_argument("request", help="its id in `fedllm site requests`, or the run's")
        decision.set_defaults(approve=word == "approve")

    log = add(steps, "log", _site_log, "read the audit log and check its chain")
    log.add_argument("directory", help="directory of site init")
    log.add_argument("--run", help="this run alone; its id, or the first digits")
    log.add_argument("--json", action="store_true", help="print the entries as JSON lines")

    forget = add(steps, "forget", _site_forget, "remove what a site keeps of its runs and records")
    forget.add_argument("directory", help="directory of site init")
    forget.add_argument("run", nargs="?", help="Flower's id of a run, or its folder in state/runs")
    forget.add_argument("--all", action="store_true", help="of every run, and tokenised records")


def _add_insecure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--insecure", action="store_true", help="no encryption and no authentication"
    )


def _server_init(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.deployment.server import init_server

    lines = init_server(
        arguments.directory,
        arguments.host,
        arguments.port_base,
        arguments.insecure,
        arguments.private_host,
    )
    print("\n".join(lines))
    return 0


def _server_register(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.deployment.site_keys import register_site

    print("\n".join(register_site(arguments.directory, arguments.key)))
    return 0


def _server_run(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.deployment.submission import run_on_server

    return run_on_server(arguments.directory, arguments.overrides, arguments.dry_run)


def _server_unregister(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.deployment.site_keys import unregister_site

    print("\n".join(unregister_site(arguments.directory, arguments.name)))
    return 0


def _server_prune(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.deployment.retention import prune_runs

    print("\n".join(prune_runs(arguments.directory, arguments.days)))
    return 0


def _server_renew(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.deployment.certificates import renew_certificate

    print("\n".join(renew_certificate(arguments.directory, arguments.host)))
    return 0


def _site_check(arguments: argparse.Namespace) -> int:
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


def _site_requests(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.deployment.site_views import requests_lines

    lines = requests_lines(arguments.directory, arguments.all, arguments.full, arguments.json)
    print("\n".join(lines))
    return 0


def _site_decide(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.deployment.site_views import decide

    print("\n".join(decide(arguments.directory, arguments.request, arguments.approve)))
    return 0


def _site_log(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.deployment.site_views import print_log

    print_log(arguments.directory, arguments.run, arguments.json)
    return 0


def _site_start(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.deployment.starting import start_supernode

    start_supernode(arguments.directory, arguments.options)


def _site_forget(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.deployment.state import forget

    print("\n".join(forget(arguments.directory, arguments.run, arguments.all)))
    return 0


def _site_init(arguments: argparse.Namespace) -> int:
    from fedllm_flwr.deployment.site import SiteOptions, init_site

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
        policy=arguments.policy,
    )
    print("\n".join(init_site(arguments.directory, options)))
    return 0
