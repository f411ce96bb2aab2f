"""``fedllm server ...``: the commands of a server's operator."""

import argparse

from fedllm_flwr.commands.usage import AddParser


def add_server(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", add: AddParser
) -> None:
    """Add ``fedllm server <step>``; `add` creates a step's parser."""
    text = "operate the server of a federation: init, register, run, unregister, renew"
    server = commands.add_parser("server", help=text, description=text)
    steps = server.add_subparsers(required=True, metavar="step")

    step = add(steps, "init", init, "create certificates, start scripts and a connection")
    step.add_argument("directory", help="new directory")
    step.add_argument(
        "--host",
        action="append",
        required=True,
        help="name or address by which sites reach the server; may be given several times",
    )
    step.add_argument(
        "--port-base",
        type=int,
        default=9091,
        help="first of five ports: app, sites, commands, health of SuperLink and SuperExec; only "
        "that of the sites is public; default 9091",
    )
    step.add_argument(
        "--private-host",
        default="127.0.0.1",
        help="private address for the server's app and commands, from which runs can be started; "
        "default 127.0.0.1",
    )
    text = "no encryption and no authentication"
    step.add_argument("--insecure", action="store_true", help=text)

    step = add(steps, "register", register, "admit a site by its public key")
    step.add_argument("directory", help="directory of server init; the server must be running")
    step.add_argument("key", help="public key of the site: its *.pub")

    step = add(steps, "unregister", unregister, "remove a site by its name")
    step.add_argument("directory", help="directory of server init; the server must be running")
    step.add_argument("name", help="name of the site, from its *.pub")

    step = add(steps, "run", run, "start a run on the sites: server run <dir> [key=value] ...")
    step.add_argument("directory", help="directory of server init; the server must be running")
    step.add_argument("overrides", nargs="*", help="group=choice or section.key=value")
    step.add_argument(
        "--dry-run", action="store_true", help="query the sites and show the plan, without training"
    )

    step = add(steps, "prune", prune, "remove old runs from superlink.db; outputs/ is kept")
    step.add_argument("directory", help="directory of server init")
    step.add_argument("--days", type=int, default=90, help="days since the end; default 90")

    step = add(steps, "renew", renew, "issue a new server certificate by the same authority")
    step.add_argument("directory", help="directory of server init")
    step.add_argument(
        "--host", action="append", default=[], help="an additional name or address of this server"
    )


def init(arguments: argparse.Namespace) -> int:
    """Create a server's directory."""
    from fedllm_flwr.deployment.server_directory import init_server

    given = (arguments.port_base, arguments.insecure, arguments.private_host)
    print("\n".join(init_server(arguments.directory, arguments.host, *given)))
    return 0


def register(arguments: argparse.Namespace) -> int:
    """Admit a site."""
    from fedllm_flwr.deployment.site_keys import register_site

    print("\n".join(register_site(arguments.directory, arguments.key)))
    return 0


def unregister(arguments: argparse.Namespace) -> int:
    """Remove a site."""
    from fedllm_flwr.deployment.site_keys import unregister_site

    print("\n".join(unregister_site(arguments.directory, arguments.name)))
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Submit a run and follow it to its end."""
    from fedllm_flwr.deployment.submission import run_on_server

    return run_on_server(arguments.directory, arguments.overrides, arguments.dry_run)


def prune(arguments: argparse.Namespace) -> int:
    """Remove old runs from the SuperLink's database."""
    from fedllm_flwr.deployment.retention import prune_runs

    print("\n".join(prune_runs(arguments.directory, arguments.days)))
    return 0


def renew(arguments: argparse.Namespace) -> int:
    """Issue a new server certificate."""
    from fedllm_flwr.deployment.certificates import renew_certificate

    print("\n".join(renew_certificate(arguments.directory, arguments.host)))
    return 0
