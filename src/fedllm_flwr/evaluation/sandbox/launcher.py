"""The caller's end of one watcher, and the words that both ends use."""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["passed", "failed", "timeout", "memory", "refused"]
Kind = Literal["namespaces", "limits"]

_ROOT = str(Path(__file__).parents[3])
_WATCHER = "fedllm_flwr.evaluation.sandbox.watcher"
_CODE = f"import sys; sys.path.append({_ROOT!r}); from {_WATCHER} import main; main()"
_GRACE_S = 20.0  # for start and end of a program, on a busy machine


@dataclass(frozen=True)
class Limits:
    """What one program may use, with all processes that it starts."""

    wall_s: float = 60.0
    cpu_s: float = 10.0  # each process; in whole seconds
    memory_bytes: int = 2**30  # address space of each process, resident memory of all
    processes: int = 32  # and threads
    file_bytes: int = 2**24  # each file; in namespaces all files together
    open_files: int = 64
    output_bytes: int = 2**20


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Program:
    """Source code, and the tests that it has to pass."""

    source: str
    tests: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a program ended; the message is empty for one that passed."""

    status: Status
    message: str
    containment: str

    @property
    def passed(self) -> bool:
        return self.status == "passed"


class Watcher:
    """A process that runs one program after the other."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The watcher's process, once it has started and until it is closed."""
        return self._process.pid if self._process else None

    def run(self, program: Program, limits: Limits, kind: Kind) -> Outcome:
        """Run a program in an empty directory; returns when nothing of it is left."""
        with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder:
            process = self.send(program, limits, kind, folder)
            said = self._read_line(process, limits.wall_s + _GRACE_S)
        if said.endswith(b"\n"):
            verdict = json.loads(said)
            return Outcome(verdict["status"], verdict["message"], kind)
        return Outcome("failed", f"ended the process that watches it{self._last_words()}", kind)

    def send(
        self, program: Program, limits: Limits, kind: Kind, folder: str
    ) -> "subprocess.Popen[bytes]":
        """Order a program to be run in a directory, and return the watcher."""
        process = self._process or self._start()
        order = json.dumps({**_order(program, limits, kind), "directory": folder}).encode()
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(len(order).to_bytes(8, "big") + order)
            process.stdin.flush()
        return process

    def close(self) -> None:
        """End the watcher, and with it whatever it runs."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> "subprocess.Popen[bytes]":
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        return self._process

    @staticmethod
    def _read_line(process: "subprocess.Popen[bytes]", limit_s: float) -> bytes:
        """One line, or less if the process ends or the time does."""
        assert process.stdout
        data, ends = b"", time.monotonic() + limit_s
        while not data.endswith(b"\n"):
            left_s = max(0.0, ends - time.monotonic())
            if not select.select([process.stdout], [], [], left_s)[0]:
                break
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                break
            data += part
        return data

    def _last_words(self) -> str:
        """End a watcher that failed; the next program gets a new one."""
        assert self._process
        self._process.kill()
        lines = self._process.communicate()[1].decode("utf-8", "replace").strip().splitlines()
        self._process = None
        return f" ({lines[-1]})" if lines else ""


def _order(program: Program, limits: Limits, kind: Kind) -> dict[str, Any]:
    """All that the watcher has to know, as JSON can hold it."""
    python = getattr(sys, "_base_executable", sys.executable)
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    readable = [python, sys.base_prefix, sys.base_exec_prefix, *packages]
    return {
        "program": program.source,
        "tests": program.tests,
        "limits": asdict(limits),
        "contained": kind == "namespaces",
        "python": python,
        "packages": packages,
        "readable": sorted({form for path in readable for form in (path, os.path.realpath(path))}),
    }
