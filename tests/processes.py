"""The command ``fedllm`` as a process of its own, and what is left of it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
MARK = "FEDLLM_TEST_MARK"  # every process that a command starts carries it in its environment


def environment(cwd: Path, **more: str) -> dict[str, str]:
    """Of a command: one thread, offline, caches below `cwd`, and a mark to find its children by."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "FEDLLM_CACHE": str(cwd / "cache"),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        MARK: str(cwd),
        **more,
    }


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row; test runs side by side look at different ones."""
    for base in range(20_000 + os.getpid() % 1_000 * 30, 60_000, 7):
        with ExitStack() as stack:
            try:
                for port in range(base, base + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return base
    raise AssertionError(f"no {count} free ports in a row")


@contextmanager
def started(command: Sequence[str], cwd: Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, as a shell starts it; ended if it still runs."""
    process = subprocess.Popen(
        [str(BIN / command[0]), *command[1:]],
        cwd=cwd,
        env=environment(cwd, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        owned: list[subprocess.Popen[str] | psutil.Process] = [process, *relatives(cwd)]
        for left in owned:
            if isinstance(left, psutil.Process) or left.poll() is None:
                with suppress(psutil.NoSuchProcess):
                    left.kill()
        process.communicate()


def relatives(cwd: Path) -> list[psutil.Process]:
    """Living processes that a command of `cwd` has started, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            marked = process.environ().get(MARK) == str(cwd)
            if marked and process.pid != os.getpid() and process.status() != "zombie":
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def nothing_left(cwd: Path, within_s: float = 15.0) -> list[str]:
    """Command lines of what is still there after a while; [] as soon as all has ended."""
    wait_for(lambda: not relatives(cwd), within_s)
    return [command_line(process)[:200] or "ended by now" for process in relatives(cwd)]


def command_line(process: psutil.Process) -> str:
    """Of a process, "" for one that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie, too
        return ""


def named(processes: Iterable[psutil.Process], name: str) -> list[psutil.Process]:
    """Those of them that live and have the name."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.name() == name:
                found.append(process)
    return found


def wait_for(condition: Callable[[], bool], within_s: float) -> bool:
    """Whether a condition became true in time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def interrupt_group(process: subprocess.Popen[str]) -> None:
    """Ctrl-C as a terminal sends it: to the whole foreground process group."""
    os.killpg(process.pid, signal.SIGINT)


def interrupt_process(process: subprocess.Popen[str]) -> None:
    """SIGINT to the command alone, as a supervisor sends it."""
    process.send_signal(signal.SIGINT)


def terminate_process(process: subprocess.Popen[str]) -> None:
    """SIGTERM to the command alone, as `kill` and job schedulers send it."""
    process.send_signal(signal.SIGTERM)
