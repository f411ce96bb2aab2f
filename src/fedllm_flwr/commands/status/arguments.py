"""Arguments of ``fedllm status``."""

import argparse


def add_status(parser: argparse.ArgumentParser) -> None:
    """Add them to the command's parser."""
    text = "of a run, a comparison, a sweep, of server init or of site init"
    parser.add_argument("directory", nargs="?", help=text)
    parser.add_argument(
        "--health",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="ask a health server of Flower's; may be given several times",
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=5.0,
        metavar="SECONDS",
        help="look again every SECONDS (default 5) until what runs has ended",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def status_arguments(arguments: argparse.Namespace) -> int:
    """Run the command; its exit status."""
    from fedllm_flwr.commands.status.command import status

    return status(arguments.directory, arguments.health, arguments.json, arguments.watch)


def add_metrics(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fedllm metrics``."""
    parser.add_argument("directory", help="of server init or of site init")
    parser.add_argument("--port", type=int, default=9464, help="on 127.0.0.1; default 9464")


def metrics_arguments(arguments: argparse.Namespace) -> int:
    """Serve metrics until interrupted; its exit status."""
    from pathlib import Path

    from fedllm_flwr.commands.status.exporter import serve_metrics

    serve_metrics(Path(arguments.directory), arguments.port)
    return 0
