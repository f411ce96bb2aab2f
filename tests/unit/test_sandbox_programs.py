"""Ordinary programs in the sandbox: they run as anywhere, and what is wrong with them is told."""

import os
import time

import pytest

from fedllm_flwr.evaluation.sandbox import bubblewrap
from fedllm_flwr.evaluation.sandbox.bubblewrap import (
    Limits,
    Program,
    run_program,
    run_programs,
    why_refused,
)
from fedllm_flwr.evaluation.sandbox.seccomp import call_filter

needs_bubblewrap = pytest.mark.skipif(why_refused() is not None, reason=str(why_refused()))


@needs_bubblewrap
def test_a_program_passes() -> None:
    outcome = run_program("def twice(x):\n    return 2 * x", "assert twice(3) == 6")

    assert outcome.passed
    assert (outcome.status, outcome.message) == ("passed", "")


@needs_bubblewrap
@pytest.mark.parametrize(
    ("source", "tests", "message"),
    [
        ("x = 1", "assert x == 2, 'x is not 2'", "AssertionError: x is not 2 (tests, line 1)"),
        ("\n1 / 0", "", "ZeroDivisionError: division by zero (program, line 2)"),
        ("def f(:", "", "SyntaxError: invalid syntax (program, line 1)"),
        ("def f():\n    return g()", "f()", "NameError: name 'g' is not defined (program, line 2)"),
        ("input()", "", "EOFError: EOF when reading a line (program, line 1)"),
    ],
)
def test_what_is_wrong_is_told(source: str, tests: str, message: str) -> None:
    outcome = run_program(source, tests)

    assert (outcome.status, outcome.message) == ("failed", message)


@needs_bubblewrap
def test_usual_means_work() -> None:
    source = """
from __future__ import annotations
import dataclasses, multiprocessing, pickle, subprocess, sys, tempfile, threading
import numpy

@dataclasses.dataclass
class Point:
    x: int = 0

    def moved(self) -> Point:
        return dataclasses.replace(self, x=self.x + 1)

if __name__ == "__main__":
    raise RuntimeError("a program is imported, not started")
print("noise")
with tempfile.TemporaryFile() as file:
    file.write(b"1")
thread = threading.Thread(target=print)
thread.start()
thread.join()
child = subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True)
pipe = multiprocessing.Pipe()
"""
    tests = (
        "assert pickle.loads(pickle.dumps(Point(1).moved())) == Point(2)\n"
        "assert numpy.arange(3).sum() == 3 and child.stdout == '42\\n'\n"
        f"assert len({'x' * 300_000!r}) == 300_000"
    )
    outcome = run_program(source + f"\nbig = {'y' * 300_000!r}", tests)

    assert outcome.passed, outcome.message


@needs_bubblewrap
def test_many_keep_their_order_and_run_side_by_side() -> None:
    programs = [
        Program(f"import time; time.sleep(0.5); x = {i}", "assert x != 2") for i in range(4)
    ]
    began = time.monotonic()
    outcomes = run_programs(programs, jobs=4)
    seconds = time.monotonic() - began

    assert [outcome.passed for outcome in outcomes] == [True, True, False, True]
    assert seconds < 4 * 0.5 + 1.5


@needs_bubblewrap
def test_programs_leave_nothing_to_each_other() -> None:
    first = Program("import os; open('/tmp/x', 'w').write('1')", "assert os.path.exists('/tmp/x')")
    second = Program("import os", "assert not os.path.exists('/tmp/x')")
    assert [outcome.status for outcome in run_programs([first, second], jobs=1)] == ["passed"] * 2


@needs_bubblewrap
def test_nothing_to_run() -> None:
    assert run_programs([]) == []


@needs_bubblewrap
def test_callers_secrets_do_not_reach_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    source = "import os\nassert 'hunter2' not in str(os.environ), os.environ"
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    tests = (
        "for d in range(5, 200):\n"
        "    try: os.fstat(d)\n"
        "    except OSError: continue\n"
        "    raise AssertionError(f'descriptor {d} is open')"
    )
    outcome = run_program(source, tests, Limits(open_files=300))
    os.close(descriptor)

    assert outcome.passed, outcome.message


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    why_refused.cache_clear()
    try:
        [outcome] = run_programs([Program("x = 1")])
    finally:
        why_refused.cache_clear()

    assert outcome.status == "refused"
    assert "bubblewrap is not installed: apt-get install bubblewrap" in outcome.message


@needs_bubblewrap
def test_a_room_that_cannot_be_built_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "_readable", lambda: ["/no/such/python"])
    why_refused.cache_clear()
    try:
        [outcome] = run_programs([Program("x = 1")])
    finally:
        why_refused.cache_clear()

    assert outcome.status == "refused"
    assert "/no/such/python" in outcome.message


def test_filters_of_machines() -> None:
    """Eight bytes an instruction; a machine without a list is refused."""
    assert len(call_filter("x86_64")) == len(call_filter("aarch64")) == 8 * 20
    with pytest.raises(OSError, match="known for vax"):
        call_filter("vax")
