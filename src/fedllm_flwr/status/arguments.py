"""Arguments of ``fedllm status``."""

import argparse


def add_status(parser: argparse.ArgumentParser) -> None:
    """Add them to the command's parser."""
    parser.add_argument("directory", nargs="?", help="of a run, of server init or of site init")
    parser.add_argument(
        "--health",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="ask a health server of Flower's; may be given several times",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def status_arguments(arguments: argparse.Namespace) -> int:
    """Run the command; its exit status."""
    from fedllm_flwr.status.command import status

    return status(arguments.directory, arguments.health, arguments.json)
