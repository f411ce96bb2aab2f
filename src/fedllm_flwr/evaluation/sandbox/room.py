"""Start of one program: pipes, namespaces where the system allows them, limits, another user."""

import contextlib
import fcntl
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedllm_flwr.evaluation.sandbox import linux, namespaces, processes

_INSIDE = Path(__file__).with_name("inside.py")
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}
_OWN_COUNT = (5, 14)  # since this Linux a user namespace counts its own processes


def start(order: dict[str, Any]) -> tuple[int, int, int, int]:
    """Start the ordered program, with the working directory of this process as its own.

    Returns:
        Descriptors: to write tasks to, to read results, output and the report of the end from.
    """
    tasks, results, output, reports = (os.pipe() for _ in range(4))
    ours = (tasks[1], results[0], output[0], reports[0])
    theirs = (tasks[0], results[1], output[1], reports[1])
    left, mapped = os.pipe(), os.pipe()
    text = _INSIDE.read_text("utf-8")
    order["others"] = _others(order["contained"])
    child = os.fork()
    if child == 0:
        for descriptor in (*ours, left[0], mapped[1], 0):
            os.close(descriptor)
        _or_report(theirs[3], lambda: _enter(order, text, theirs, left[1], mapped[0]))
    for descriptor in (*theirs, left[1], mapped[0]):
        os.close(descriptor)
    if order["contained"] and os.read(left[0], 1):
        os.write(mapped[1], json.dumps(namespaces.map_users(child)).encode())
    os.close(left[0])
    os.close(mapped[1])
    return ours


def _or_report(report: int, do: Callable[[], None]) -> None:
    """Do something in a child process, which ends with it."""
    try:
        do()
    except Exception as error:
        os.write(report, json.dumps({"error": str(error)}).encode() + b"\n")
    finally:
        os._exit(0)


def _enter(
    order: dict[str, Any], text: str, pipes: tuple[int, int, int, int], left: int, mapped: int
) -> None:
    """Go where the program shall run, and be or start the first process there."""
    linux.die_with_parent()
    directory = str(Path.cwd())
    if not order["contained"]:
        user = _another_user(directory)
        _first_process(order, text, pipes, user, directory)
        return
    namespaces.leave()
    os.write(left, b"1")
    answer = os.read(mapped, 100)
    if not answer:
        raise OSError("no user may be mapped into a namespace")
    namespaces.build_room(directory, order["readable"], order["limits"]["file_bytes"])
    first = os.fork()
    if first == 0:
        linux.die_with_parent()
        _or_report(pipes[3], lambda: _first_process(order, text, pipes, json.loads(answer), "/tmp"))
    for descriptor in pipes:
        os.close(descriptor)
    os.waitpid(first, 0)


def _another_user(directory: str) -> int:
    """Root gives the directory to nobody, who shall run the program."""
    if os.getuid() != 0:
        return os.getuid()
    os.chown(directory, namespaces.NOBODY, namespaces.NOBODY)
    return namespaces.NOBODY


def _first_process(
    order: dict[str, Any], text: str, pipes: tuple[int, int, int, int], user: int, directory: str
) -> None:
    """Start the program, wait for its end and report it; in a namespace all others end with us."""
    tasks, results, output, report = pipes
    linux.hide_memory()
    program = os.fork()
    if program == 0:
        _or_report(report, lambda: _become(order, text, (tasks, results, output), user, directory))
    for descriptor in (tasks, results, output):
        os.close(descriptor)
    pid = 0
    while pid != program:
        pid, status, usage = os.wait4(-1, 0)
    told = {"status": status, "cpu_s": usage.ru_utime + usage.ru_stime}
    os.write(report, json.dumps(told).encode() + b"\n")


def _become(
    order: dict[str, Any], text: str, pipes: tuple[int, int, int], user: int, directory: str
) -> None:
    """Turn this process into the program's interpreter."""
    os.setsid()
    os.chdir(directory)
    nothing = os.open(os.devnull, os.O_RDONLY)
    nothing, tasks, results, output = map(_out_of_the_way, (nothing, *pipes))
    for descriptor, target in ((nothing, 0), (output, 1), (output, 2), (tasks, 3), (results, 4)):
        os.dup2(descriptor, target)
    _set_limits(order)
    if user != os.getuid():
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    linux.forgo_privileges()
    linux.forbid_uncounted_memory()
    linux.die_with_parent()
    environment = {**_ENVIRONMENT, "HOME": directory, "TMPDIR": directory}
    arguments = [order["python"], "-I", "-S", "-c", text, *order["packages"]]
    os.execve(order["python"], arguments, environment)


def _out_of_the_way(descriptor: int) -> int:
    """A copy above the numbers that the program's own descriptors get; closed by execve."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)


def _set_limits(order: dict[str, Any]) -> None:
    limits, others = order["limits"], order["others"]
    cpu_s = max(1, round(limits["cpu_s"]))
    wanted = {
        resource.RLIMIT_CPU: (cpu_s, cpu_s + 1),
        resource.RLIMIT_AS: (limits["memory_bytes"],) * 2,
        resource.RLIMIT_FSIZE: (limits["file_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (limits["open_files"],) * 2,
        resource.RLIMIT_NPROC: (limits["processes"] + others,) * 2,
        resource.RLIMIT_CORE: (0, 0),
    }
    for name, pair in wanted.items():
        with contextlib.suppress(ValueError):  # a lower hard limit is in force already
            resource.setrlimit(name, pair)


def _others(contained: bool) -> int:
    """Processes of the same user that the kernel would count among the program's."""
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if contained and release >= _OWN_COUNT:
        return 0
    return processes.tasks_of_user(os.getuid() or namespaces.NOBODY)
