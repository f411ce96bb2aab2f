"""``fedllm doctor``: what works here, what does not, and what to do about it."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fedllm_flwr.commands.checks import Check
from fedllm_flwr.commands.checks.compute import check_devices, check_packages, check_quantization
from fedllm_flwr.commands.checks.system import (
    check_assets,
    check_commands,
    check_disk,
    check_hub,
    check_local_superlink,
    check_loopback,
    check_ray,
    check_sandbox,
)
from fedllm_flwr.reporting.text import one_line

NAME_WIDTH = 9  # the longest name of a check


def run_checks(
    quick: bool = False, output_dir: Path = Path("outputs"), hub: bool = False
) -> Iterator[Check]:
    """Run every check, one after the other, so that each can be shown as it ends.

    Args:
        quick: leave out Ray, which takes seconds to start.
        output_dir: where runs are written.
        hub: also try to reach the Hugging Face hub.
    """
    groups: list[Callable[[], Sequence[Check]]] = [
        check_packages,
        check_devices,
        check_quantization,
        check_commands,
        check_loopback,
        check_local_superlink,
        lambda: check_disk(output_dir),
        check_assets,
        check_sandbox,
    ]
    if not quick:
        groups.append(check_ray)
    if hub:
        groups.append(check_hub)
    for group in groups:
        yield from group()


def check_lines(check: Check, width: int = NAME_WIDTH) -> list[str]:
    """One finding: a line, and its remedy on a second one."""
    lines = [f"  {check.status:<4}  {check.name:<{width}}  {one_line(check.detail)}"]
    if check.remedy:
        lines.append(f"{' ' * (width + 10)}{one_line(check.remedy)}")
    return lines


def verdict(checks: Sequence[Check]) -> str:
    """One sentence on all findings."""
    failed = [check.name for check in checks if check.status == "fail"]
    warned = [check.name for check in checks if check.status == "warn"]
    if failed:
        return f"Not ready: {', '.join(failed)} failed."
    return f"Ready, with warnings: {', '.join(warned)}." if warned else "Ready."


def exit_status(checks: Sequence[Check]) -> int:
    """1 when something failed; warnings do not count."""
    return int(any(check.status == "fail" for check in checks))
