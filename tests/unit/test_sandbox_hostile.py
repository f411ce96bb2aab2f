"""Programs that try to harm, to escape or to cheat; each really runs."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from fedllm_flwr.evaluation.sandbox.bubblewrap import Limits, run_program, why_refused

pytestmark = pytest.mark.skipif(why_refused() is not None, reason=str(why_refused()))

LIMITS = Limits(wall_s=20, cpu_s=1, memory_bytes=300 * 2**20)
SHORT = replace(LIMITS, wall_s=0.7)


@dataclass(frozen=True)
class Case:
    """A program, the outcome it must have, and part of the message."""

    source: str
    status: str
    message: str = ""
    tests: str = "assert True"
    limits: Limits = LIMITS


# What limits hold back.
LIMITED = {
    "endless loop": Case("while True: pass", "timeout", "processor time"),
    "endless loop that ignores signals": Case(
        "import signal\nfor s in (1, 2, 15, 24): signal.signal(s, signal.SIG_IGN)\n"
        "while True: pass",
        "timeout",
    ),
    "sleep that catches everything": Case(
        "import time\nwhile True:\n  try: time.sleep(99)\n  except BaseException: pass",
        "timeout",
        "0.7 s",
        limits=SHORT,
    ),
    "fork bomb": Case("import os\nwhile True: os.fork()", "failed", "BlockingIOError"),
    "fork bomb that goes on": Case(
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", "timeout", limits=SHORT
    ),
    "thread bomb": Case(
        "import threading, time\n"
        "while True: threading.Thread(target=time.sleep, args=(9,)).start()",
        "failed",
        "can't start new thread",
    ),
    "memory at once": Case("x = bytearray(2**40)", "memory", "MemoryError"),
    "memory bit by bit": Case("x = []\nwhile True: x.append(bytearray(2**20))", "memory"),
    "memory by many": Case(
        "import os, time\nfor _ in range(3): os.fork()\nx = b'1' * 2**27\ntime.sleep(60)",
        "memory",
        "its processes together",
    ),
    "shared memory": Case(
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "libc.shmat.restype = ctypes.c_void_p\n"
        "for _ in range(16):\n"
        "  segment = libc.shmget(0, 2**26, 0o1600)\n"
        "  if segment < 0: raise OSError(os.strerror(ctypes.get_errno()))\n"
        "  place = libc.shmat(segment, None, 0)\n"
        "  ctypes.memset(place, 1, 2**26); libc.shmdt(ctypes.c_void_p(place))\n"
        "  libc.shmctl(segment, 0, None)",
        "failed",
        "Operation not permitted",
    ),
    "message queues": Case(
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.msgget(0, 0o1600) < 0: raise OSError(os.strerror(ctypes.get_errno()))",
        "failed",
        "Operation not permitted",
    ),
    "files in memory": Case(
        "import os\nfor _ in range(40):\n  d = os.memfd_create('x')\n"
        "  for _ in range(15): os.write(d, bytes(2**20))",
        "failed",
        "Operation not permitted",
    ),
    "calls by another ABI": Case(
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.syscall(0x40000000 + 29, 0, 4096, 0o1600) < 0:\n"
        "  raise OSError(os.strerror(ctypes.get_errno()))",
        "failed",
        "Operation not permitted" if os.uname().machine == "x86_64" else "",
    ),
    "output flood": Case("while True: print('x' * 10000)", "failed", "printed more than"),
    "output flood of children": Case(
        "import os\nfor _ in range(3): os.fork()\nwhile True: os.write(2, b'x' * 10000)",
        "failed",
        "printed more than",
    ),
    "big file": Case(
        "f = open('big', 'wb')\nwhile True: f.write(b'x' * 2**20)", "failed", "OSError"
    ),
    "many open files": Case("f = [open('/dev/null') for _ in range(1000)]", "failed", "Too many"),
    "deep recursion": Case(
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return sorted([1, 2], key=f)\nf(1)",
        "failed",
        "SIGSEGV",
    ),
    "sleeping child": Case("import os, time\nif not os.fork(): time.sleep(99)", "passed"),
    "daemon": Case(
        "import os, time\nif not os.fork():\n  os.setsid()\n  if not os.fork(): time.sleep(99)\n"
        "  os._exit(0)",
        "passed",
    ),
    "leaves before its tests": Case("import os; os._exit(0)", "failed", "exited with 0 before"),
    "leaves within its tests": Case(
        "import os\ndef f(): os._exit(0)", "failed", "exited with 0 before", tests="f()"
    ),
    "leaves by sys.exit": Case("import sys; sys.exit(0)", "failed", "SystemExit"),
    "leaves in an exit handler": Case(
        "import atexit, os\natexit.register(os._exit, 0)",
        "failed",
        "AssertionError",
        "assert False",
    ),
    "replaces what runs the tests": Case(
        "import builtins, json, os, sys\nnothing = lambda *a, **k: None\n"
        "builtins.exec = builtins.compile = json.dumps = os.read = nothing\n"
        "sys.excepthook = nothing",
        "failed",
        "AssertionError",
        "assert 1 + 1 == 3",
    ),
    "claims to have passed": Case(
        "import os\nfor d in range(3, 64):\n"
        "  try: os.write(d, b'\\0' * 7 + b' ' + b'passed'.ljust(32))\n  except OSError: pass\n"
        "os._exit(0)",
        "failed",
        "wrote to the channel",
    ),
    "waits for its tests": Case(
        "import os\nwhile os.read(3, 1): pass", "timeout", "0.7 s", limits=SHORT
    ),
    "looks for the answers": Case(
        "import gc, os, sys\nseen = [sys.argv, dict(os.environ), os.listdir('.')]\n"
        "frame = sys._getframe()\n"
        "while frame: seen.append((frame.f_locals, frame.f_globals)); frame = frame.f_back\n"
        "assert '-'.join(['forty', 'two']) not in repr((seen, gc.get_objects()))",
        "passed",
        tests="answer = 'forty-two'",
    ),
    "message without end": Case("raise ValueError('x' * 10**7)", "failed", "ValueError: xxx"),
    "exception that cannot be told": Case(
        "class E(Exception):\n  def __str__(self): raise RuntimeError\nraise E", "failed", "exited"
    ),
    "not text": Case("x = '\udcff'", "failed", "SyntaxError"),
    "null": Case("x = 1\0", "failed", "null"),
}

# What the room holds back.
ROOM = {
    "kills its watcher": Case(
        "import os\nfor p in (1, os.getppid(), -1):\n  try: os.kill(p, 9)\n  except OSError: pass",
        "passed",
    ),
    "sees other processes": Case(
        "import os\nassert os.getpid() < 4 and not os.path.exists('/proc')", "passed"
    ),
    "writes to the kernel": Case(
        "open('/proc/sys/kernel/hostname', 'w').write('x')", "failed", "FileNotFoundError"
    ),
    "writes to the system": Case("open('/usr/x', 'w')", "failed", "Read-only file system"),
    "writes to the packages": Case("import os\nopen(os.__file__, 'a')", "failed", "Error: [Errno"),
    "removes the system": Case(
        "import json, os, shutil\n"
        "shutil.rmtree(os.path.dirname(json.__file__), ignore_errors=True)\n"
        "assert os.path.exists(json.__file__)",
        "passed",
    ),
    "fills the disk": Case(
        "for i in range(99): open(f'f{i}', 'wb').write(b'x' * 2**20)", "failed", "No space left"
    ),
    "fills the disk with empty files": Case(
        "import time\nfor i in range(9000): open(f'f{i}', 'w')\ntime.sleep(9)",
        "failed",
        "more than 4096 files",
        limits=replace(LIMITS, cpu_s=9),
    ),
    "fills what is not its own": Case(
        "import os\nfor place in ('/', '/dev', '/usr', '/etc', '/dev/shm', '/proc', '/run'):\n"
        "  try: open(os.path.join(place, 'x'), 'wb').write(bytes(2**24 - 2**18))\n"
        "  except OSError: continue\n"
        "  assert place == '/dev/shm', place",
        "passed",
    ),
    "makes devices": Case("import os\nos.mknod('d', 0o60666, 0x801)", "failed", "PermissionError"),
    "makes namespaces": Case(
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "assert libc.unshare(0x10000000) == libc.unshare(0x20000) == -1\n"
        "assert libc.mount(b'/', b'/tmp', None, 4096, None) == -1",
        "passed",
    ),
    "makes namespaces by clone": Case(
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "numbers = {'x86_64': 56, 'aarch64': 220, 'riscv64': 220}\n"
        f"number = numbers[{os.uname().machine!r}]\n"
        "assert libc.syscall(number, 0x10000000 | 17, 0, 0, 0, 0) == -1\n"
        "assert ctypes.get_errno() == 1\n"
        "assert libc.syscall(435, 0, 88) == -1 and ctypes.get_errno() == 38",
        "passed",
    ),
    "becomes root": Case("import os\nos.setuid(0)", "failed", "[Errno"),
    "asks the network": Case(
        "import socket\nsocket.create_connection(('1.1.1.1', 53))",
        "failed",
        "Network is unreachable",
    ),
}
LONG = {"endless loop that ignores signals", "deep recursion", "waits for its tests"}
ALL = [
    pytest.param(case, id=name, marks=pytest.mark.slow if name in LONG else ())
    for name, case in (LIMITED | ROOM).items()
]


@pytest.mark.parametrize("case", ALL)
def test_stays_in_its_sandbox(case: Case) -> None:
    outcome = run_program(case.source, case.tests, case.limits)

    assert outcome.status == case.status, outcome.message
    assert case.message in outcome.message
    assert len(outcome.message) < 1000
    assert psutil.Process().children(recursive=True) == []


def test_files_outside_stay(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for path in (tmp_path.parent, tmp_path):
        path.chmod(0o777)
    victim.chmod(0o666)
    source = (
        f"import os, shutil\nassert not os.path.exists({str(victim)!r})\n"
        f"os.makedirs({str(tmp_path)!r}); open({str(victim)!r}, 'w').write('gone')\n"
        f"shutil.rmtree('/tmp', ignore_errors=True)"
    )
    # Where the packages lie below /tmp, there is much to try to remove.
    outcome = run_program(source, limits=Limits(wall_s=60, cpu_s=30))

    assert outcome.status == "passed", outcome.message
    assert victim.read_text() == "precious"


def test_no_way_to_a_server_on_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)"
        outcome = run_program(source, limits=LIMITS)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()

    assert outcome.status == "failed"
    assert "Network is unreachable" in outcome.message or "refused" in outcome.message


@pytest.mark.slow
def test_nothing_is_left_when_the_caller_ends() -> None:
    """A caller that is killed takes a running program with it."""
    code = "from fedllm_flwr.evaluation.sandbox.bubblewrap import run_program as r"
    caller = subprocess.Popen([sys.executable, "-c", f"{code}; r('import time; time.sleep(99)')"])
    family: list[psutil.Process] = []
    ends = time.monotonic() + 30
    while not any(map(is_program, family)):
        assert time.monotonic() < ends
        family = psutil.Process(caller.pid).children(recursive=True)
    caller.kill()
    caller.wait()

    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def is_program(process: psutil.Process) -> bool:
    """Whether this is an interpreter in a sandbox, other than the one that tests for support."""
    try:
        return "bwrap" not in process.name() and time.time() - process.create_time() > 3
    except psutil.Error:
        return False
