"""Programs under bubblewrap: isolated files, processes, users and network, and resource limits.

A program passes if its code and then its tests run to completion without an exception. The tests
are sent to the interpreter only after the program's code has ended.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import psutil

from fedllm_flwr.evaluation.sandbox.interpreter import LONGEST_MESSAGE, READY, TOKEN_BYTES
from fedllm_flwr.evaluation.sandbox.seccomp import call_filter

Status = Literal["passed", "failed", "timeout", "memory", "refused"]
INSTALL = "apt-get install bubblewrap (Debian, Ubuntu), dnf install bubblewrap (Fedora)"

_NO_NAMESPACES = (
    "bubblewrap cannot create a sandbox here: user namespaces must be allowed, in a container by "
    "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined"
)
_INTERPRETER = Path(__file__).with_name("interpreter.py")
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}
_SYSTEM = [
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store"),
    *("/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives"),
]
_DEVICES = ("null", "zero", "full", "random", "urandom")
_NOBODY = 65534
_MOST_FILES = 4096  # in the program's /tmp
_OWN_COUNT = (5, 14)  # first Linux version in which a user namespace counts its own processes
_LOOK_S = 0.1  # interval between memory checks
_LONGEST_FRAME = 8 * LONGEST_MESSAGE + 200  # bytes, if every character is escaped
_KEPT_OUTPUT = 4000  # bytes


@dataclass(frozen=True)
class Limits:
    """Resource limits of one program, including all of its processes."""

    wall_s: float = 60.0
    cpu_s: float = 10.0  # per process, rounded to whole seconds
    memory_bytes: int = 2**30  # address space per process, and resident memory of all processes
    processes: int = 32  # and threads
    file_bytes: int = 2**24  # total size of all files
    open_files: int = 64
    output_bytes: int = 2**20


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Program:
    """Source code and the tests that it must pass."""

    source: str
    tests: str = ""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a program; the message is empty if it passed."""

    status: Status
    message: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


@cache
def why_refused() -> str | None:
    """Why this machine cannot run programs, tested with an empty program; None if it can."""
    if not sys.platform.startswith("linux"):
        return f"sandboxed programs need Linux, this is {sys.platform}"
    if shutil.which("bwrap") is None:
        return f"bubblewrap is not installed: {INSTALL}"
    outcome = _run(Program(""), DEFAULT_LIMITS)
    return None if outcome.passed else outcome.message


def run_program(source: str, tests: str = "", limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Run one program and its tests; return when all of its processes have ended."""
    return run_programs([Program(source, tests)], limits, jobs=1)[0]


def run_programs(
    programs: Sequence[Program], limits: Limits = DEFAULT_LIMITS, jobs: int | None = None
) -> list[Outcome]:
    """Run programs, `jobs` at a time (default: number of cores); outcomes are in input order."""
    if reason := why_refused():
        return [Outcome("refused", reason) for _ in programs]
    jobs = max(1, min(jobs or os.cpu_count() or 1, len(programs)))
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda program: _run(program, limits), programs))


def _run(program: Program, limits: Limits) -> Outcome:
    """Run a program in its own sandbox to its end, leaving no process behind."""
    try:
        with _started(limits) as watch:
            return watch.until_the_end(program)
    except OSError as error:
        return Outcome("refused", str(error))


@contextlib.contextmanager
def _started(limits: Limits) -> Iterator["_Watch"]:
    """Start the interpreter in its sandbox; all its processes are killed when the context exits."""
    rules = call_filter()
    tasks, results, output, filter_, about = (os.pipe() for _ in range(5))
    os.write(filter_[1], rules)
    os.close(filter_[1])
    ours = [tasks[1], results[0], output[0], about[0]]
    theirs = [tasks[0], results[1], output[1], filter_[0], about[1]]
    process: subprocess.Popen[bytes] | None = None
    try:
        # If root is mapped to another id outside, this is an ordinary user in a user namespace.
        own, outside, _ = Path("/proc/self/uid_map").read_text("utf-8").split()[:3]
        users = _users() if os.getuid() == 0 and own == outside else None
        theirs += [] if users is None else [users]
        sandbox = _sandbox_command(users, limits.file_bytes, info=about[1], rules=filter_[0])
        order = {
            "user": None if users is None else _NOBODY,
            "tasks": tasks[0],
            "results": results[1],
            "limits": _resources(limits),
            "packages": _packages(),
        }
        code = [_python(), "-I", "-S", "-c", _INTERPRETER.read_text("utf-8"), json.dumps(order)]
        process = subprocess.Popen(
            [*sandbox, "--", *code],
            stdin=subprocess.DEVNULL,
            stdout=output[1],
            stderr=output[1],
            pass_fds=theirs,
            env=_ENVIRONMENT,
        )
        for descriptor in theirs:
            os.close(descriptor)
        theirs = []
        yield _Watch(process, limits, tasks[1], results[0], output[0])
    finally:
        if process is not None:
            process.kill()
            process.wait()
            _wait_for_sandbox(os.read(about[0], 4096))
        for descriptor in (*ours, *theirs):
            os.close(descriptor)


def _users() -> int:
    """Descriptor of a user namespace with the users root and nobody; only root can create it.

    Programs run as nobody, because the limit on processes does not apply to root in any namespace.
    Python's files are then read by nobody, through the sandbox's own mounts, whatever the
    permissions of their parent folders outside.
    """
    command = ["unshare", "--user", "sh", "-c", "echo; read _"]  # exists until its stdin is closed
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        if not holder.stdout.readline():
            raise OSError(_NO_NAMESPACES)
        place = Path("/proc", str(holder.pid))
        try:
            for kind in ("uid_map", "gid_map"):
                (place / kind).write_text(f"0 0 1\n{_NOBODY} {_NOBODY} 1\n")
        except OSError as error:
            raise OSError(f"{_NO_NAMESPACES} ({error.strerror})") from error
        return os.open(place / "ns/user", os.O_RDONLY)


def _sandbox_command(users: int | None, tmp_bytes: int, info: int, rules: int) -> list[str]:
    """bubblewrap's command line: a read-only system and a /tmp in memory.

    Args:
        users: descriptor of the user namespace to enter; None: create one.
    """
    command = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--die-with-parent", "--new-session"]
    if users is None:
        command += ["--unshare-user", "--uid", f"{_NOBODY}"]
        command += ["--gid", f"{_NOBODY}"]
    else:
        command += ["--userns", f"{users}", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    command += ["--perms", "1777", "--size", f"{tmp_bytes}", "--tmpfs", "/tmp", "--chdir", "/tmp"]
    for path in _SYSTEM:
        command += ["--ro-bind-try", path, path]
    for path in _readable():
        for parent in reversed(Path(path).parents[:-1]):
            command += ["--perms", "0755", "--dir", f"{parent}"]
        command += ["--ro-bind", path, path]
    command += ["--perms", "0755", "--dir", "/dev"]
    for name in _DEVICES:
        command += ["--dev-bind-try", f"/dev/{name}", f"/dev/{name}"]
    command += ["--symlink", "/tmp", "/dev/shm", "--remount-ro", "/"]
    return [*command, "--info-fd", f"{info}", "--seccomp", f"{rules}"]


def _python() -> str:
    return str(getattr(sys, "_base_executable", sys.executable))


def _packages() -> list[str]:
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


@cache
def _readable() -> list[str]:
    """Folders of Python and its packages outside of the system's; none is inside another."""
    needed = [_python(), sys.base_prefix, sys.base_exec_prefix, *_packages()]
    chosen: list[str] = []
    for path in sorted({*needed, *map(os.path.realpath, needed)}):
        if not any(path == other or path.startswith(f"{other}/") for other in (*_SYSTEM, *chosen)):
            chosen.append(path)
    return chosen


def _resources(limits: Limits) -> dict[str, tuple[int, int]]:
    """Limits per process, by their names in the module ``resource``."""
    cpu_s = max(1, round(limits.cpu_s))
    processes = limits.processes
    if tuple(int(part) for part in os.uname().release.split(".")[:2]) < _OWN_COUNT:
        user = os.getuid() or _NOBODY  # the kernel also counts this user's other processes
        for process in psutil.process_iter(["uids", "num_threads"]):
            if process.info["uids"] and process.info["uids"].real == user:
                processes += process.info["num_threads"] or 0
    return {
        "RLIMIT_CPU": (cpu_s, cpu_s + 1),
        "RLIMIT_AS": (limits.memory_bytes,) * 2,
        "RLIMIT_FSIZE": (limits.file_bytes,) * 2,
        "RLIMIT_NOFILE": (limits.open_files,) * 2,
        "RLIMIT_NPROC": (processes,) * 2,
        "RLIMIT_CORE": (0, 0),
    }


def _wait_for_sandbox(told: bytes) -> None:
    """Wait for the sandbox's first process; when it ends, the kernel has killed all others."""
    with contextlib.suppress(ValueError, KeyError, OSError):
        first = os.pidfd_open(json.loads(told)["child-pid"])
        try:
            select.select([first], [], [], None)
        finally:
            os.close(first)


class _EndError(Exception):
    """The program has ended, or must be stopped."""

    def __init__(self, status: Status, message: str = "") -> None:
        super().__init__(message)
        self.outcome = Outcome(status, message)


@dataclass
class _Watch:
    """The pipes of one program and what it has written to them so far."""

    process: "subprocess.Popen[bytes]"
    limits: Limits
    tasks: int
    results: int
    output: int
    tokens: list[bytes] = field(default_factory=lambda: [os.urandom(TOKEN_BYTES) for _ in range(2)])
    unsent: bytes = b""
    frames: bytes = b""
    accepted: int = -1  # tokens returned so far; -1: not ready yet
    printed: bytes = b""
    printed_bytes: int = 0
    cpu_s: float = 0.0  # of the busiest process, at the last check

    def until_the_end(self, program: Program) -> Outcome:
        """Serve the pipes until the program has ended or must be stopped."""
        os.set_blocking(self.tasks, False)
        texts = [program.source, program.tests]
        ends = time.monotonic() + self.limits.wall_s
        looked = time.monotonic()
        ended = os.pidfd_open(self.process.pid)
        try:
            while True:
                self._serve(texts, ended, min(_LOOK_S, max(0.0, ends - time.monotonic())))
                now = time.monotonic()
                if now >= ends:
                    raise _EndError("timeout", f"still running after {self.limits.wall_s:g} s")
                if now - looked >= _LOOK_S:
                    looked = now
                    self._look()
        except _EndError as end:
            return end.outcome
        finally:
            os.close(ended)

    def _serve(self, texts: list[str], ended: int, wait_s: float) -> None:
        readable = [fd for fd in (self.results, self.output, ended) if fd >= 0]
        writable = [self.tasks] if self.unsent else []
        ready, free, _ = select.select(readable, writable, [], wait_s)
        if free:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                self.unsent = self.unsent[os.write(self.tasks, self.unsent) :]
        if self.output in ready:
            text = os.read(self.output, 65536)
            if not text:
                self.output = -1
            self.printed = (self.printed + text)[-_KEPT_OUTPUT:]
            self.printed_bytes += len(text)
            if self.printed_bytes > self.limits.output_bytes:
                raise _EndError("failed", f"printed more than {self.limits.output_bytes} bytes")
        if self.results in ready:
            self._take_frames(texts)
        elif ended in ready and self.output not in ready:  # all frames have been read
            raise self._end_by_itself()

    def _take_frames(self, texts: list[str]) -> None:
        data = os.read(self.results, 65536)
        if not data:
            self.results = -1
        self.frames += data
        while len(self.frames) >= 8:
            size = int.from_bytes(self.frames[:8], "big")
            if size > _LONGEST_FRAME:
                raise _EndError("failed", "wrote to the channel of its tests")
            if len(self.frames) < 8 + size:
                return
            content, self.frames = self.frames[8 : 8 + size], self.frames[8 + size :]
            self._take(content, texts)

    def _take(self, content: bytes, texts: list[str]) -> None:
        if content == (self.tokens[self.accepted] if self.accepted >= 0 else READY):
            self.accepted += 1
            if self.accepted == 2:
                raise _EndError("passed")
            sent = self.tokens[self.accepted]
            sent += texts[self.accepted].encode("utf-8", "surrogatepass")
            self.unsent += len(sent).to_bytes(8, "big") + sent
            return
        try:
            told = json.loads(content)
            status, message = told["status"], str(told["message"])
        except (ValueError, TypeError, KeyError):
            status, message = "failed", "wrote to the channel of its tests"
        raise _EndError("memory" if status == "memory" else "failed", message)

    def _end_by_itself(self) -> _EndError:
        """Outcome of a program that ended without reporting one."""
        lines = self.printed.decode("utf-8", "replace").strip().splitlines()
        said = lines[-1][:LONGEST_MESSAGE] if lines else ""
        code = self.process.wait()
        if self.accepted < 0:
            return _EndError("refused", f"{_NO_NAMESPACES} ({said or f'it exited with {code}'})")
        killed = code - 128 if code > 128 else 0  # bubblewrap's exit status for a signal
        if killed == signal.SIGXCPU or (killed and self.cpu_s >= self.limits.cpu_s):
            return _EndError("timeout", f"took more than {self.limits.cpu_s:g} s of processor time")
        how = f"was ended by {signal.Signals(killed).name}" if killed else f"exited with {code}"
        return _EndError("failed", f"{how} before its tests had ended{': ' if said else ''}{said}")

    def _look(self) -> None:
        """Enforce the limits on the total memory of all processes and on the number of files."""
        resident, files = 0, 0
        try:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error), process.oneshot():
                    resident += process.memory_info().rss
                    times = process.cpu_times()
                    self.cpu_s = max(self.cpu_s, times.user + times.system)
                    with contextlib.suppress(OSError):
                        held = os.statvfs(f"/proc/{process.pid}/root/tmp")
                        files = held.f_files - held.f_ffree
        except psutil.NoSuchProcess:
            return
        if resident > self.limits.memory_bytes:
            limit = self.limits.memory_bytes
            raise _EndError("memory", f"its processes together used more than {limit} bytes")
        if self.accepted >= 0 and files > _MOST_FILES:
            raise _EndError("failed", f"created more than {_MOST_FILES} files")
