"""The process that stands between a caller and programs: starts them, watches them, ends them.

It reads orders (eight bytes of length, then JSON) from its standard input, and ends everything when
that is closed, which happens also when the caller is killed. Each outcome is a line of JSON on its
standard output; the next order comes after it.
"""

import contextlib
import json
import os
import select
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from fedllm_flwr.evaluation.sandbox import linux, processes
from fedllm_flwr.evaluation.sandbox.inside import LONGEST_MESSAGE, TOKEN_BYTES
from fedllm_flwr.evaluation.sandbox.room import start

_LOOK_S = 0.1  # between two looks at the memory
_LONGEST_FRAME = 8 * LONGEST_MESSAGE + 200  # bytes, with every character escaped
_KEPT_OUTPUT = 4000  # bytes


@dataclass
class Verdict(Exception):  # noqa: N818  (an end, not an error)
    """How the program ended."""

    status: str
    message: str

    def as_json(self) -> bytes:
        return json.dumps({"status": self.status, "message": self.message}).encode()


@dataclass
class Watch:
    """The pipes to one program and what came out of them so far."""

    order: dict[str, Any]
    tasks: int
    results: int
    output: int
    reports: int
    tokens: list[bytes] = field(default_factory=lambda: [os.urandom(TOKEN_BYTES) for _ in range(2)])
    unsent: bytes = b""
    frames: bytes = b""
    accepted: int = 0
    printed: bytes = b""
    printed_bytes: int = 0
    report: bytes = b""

    def send(self, token: bytes, text: str) -> None:
        content = token + text.encode("utf-8", "surrogatepass")
        self.unsent += len(content).to_bytes(8, "big") + content

    def until_the_end(self) -> Verdict:
        """Serve the pipes until the program has ended, or has to."""
        self.send(self.tokens[0], self.order["program"])
        os.set_blocking(self.tasks, False)
        ends = time.monotonic() + self.order["limits"]["wall_s"]
        looked = time.monotonic()
        try:
            while True:
                self._serve(min(_LOOK_S, max(0.0, ends - time.monotonic())))
                now = time.monotonic()
                if now >= ends:
                    limit = self.order["limits"]["wall_s"]
                    raise Verdict("timeout", f"still running after {limit:g} s")
                if now - looked >= _LOOK_S:
                    looked = now
                    self._look_at_memory()
        except Verdict as verdict:
            return verdict

    def _serve(self, wait_s: float) -> None:
        readable = [fd for fd in (self.results, self.output, self.reports, 0) if fd >= 0]
        writable = [self.tasks] if self.unsent else []
        ready, free, _ = select.select(readable, writable, [], wait_s)
        if free:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                self.unsent = self.unsent[os.write(self.tasks, self.unsent) :]
        if 0 in ready and not os.read(0, 1):
            raise Verdict("refused", "the caller is gone")
        if self.output in ready:
            self._take_output()
        if self.results in ready:
            self._take_frames()
        if self.reports in ready:
            self._take_report()

    def _take_output(self) -> None:
        text = os.read(self.output, 65536)
        if not text:
            self.output = -1
        self.printed = (self.printed + text)[-_KEPT_OUTPUT:]
        self.printed_bytes += len(text)
        if self.printed_bytes > self.order["limits"]["output_bytes"]:
            limit = self.order["limits"]["output_bytes"]
            raise Verdict("failed", f"printed more than {limit} bytes")

    def _take_frames(self) -> None:
        data = os.read(self.results, 65536)
        if not data:
            self.results = -1
        self.frames += data
        while len(self.frames) >= 8:
            size = int.from_bytes(self.frames[:8], "big")
            if size > _LONGEST_FRAME:
                raise Verdict("failed", "wrote to the channel of its tests")
            if len(self.frames) < 8 + size:
                return
            content, self.frames = self.frames[8 : 8 + size], self.frames[8 + size :]
            self._take(content)

    def _take(self, content: bytes) -> None:
        if content == self.tokens[self.accepted]:
            self.accepted += 1
            if self.accepted == 2:
                raise Verdict("passed", "")
            self.send(self.tokens[1], self.order["tests"])
            return
        try:
            told = json.loads(content)
            status, message = told["status"], str(told["message"])
        except (ValueError, TypeError, KeyError):
            status, message = "failed", "wrote to the channel of its tests"
        raise Verdict("memory" if status == "memory" else "failed", message)

    def _take_report(self) -> None:
        """What the first process of the room says about the program's end, or about its own."""
        data = os.read(self.reports, 65536)
        self.report += data
        if data:
            return
        if self.results >= 0 and select.select([self.results], [], [], 0)[0]:
            self._take_frames()  # told before the end
            return
        raise verdict_of_end(self.report, self.order["limits"], last_line(self.printed))

    def _look_at_memory(self) -> None:
        limit = self.order["limits"]["memory_bytes"]
        if processes.resident_bytes(processes.descendants(os.getpid())) > limit:
            raise Verdict("memory", f"all its processes together took more than {limit} bytes")


def verdict_of_end(report: bytes, limits: dict[str, Any], said: str) -> Verdict:
    """The outcome of a program that ended without telling one."""
    try:
        told = json.loads(report.splitlines()[0])
    except (ValueError, IndexError):
        return Verdict("failed", "ended together with the process that watches it")
    if "error" in told:
        return Verdict("refused", told["error"])
    code = os.waitstatus_to_exitcode(told["status"])
    if code == -signal.SIGXCPU or told["cpu_s"] >= limits["cpu_s"]:
        return Verdict("timeout", f"took more than {limits['cpu_s']:g} s of processor time")
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    return Verdict("failed", f"{how} before its tests had ended{': ' if said else ''}{said}")


def last_line(output: bytes) -> str:
    lines = output.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:LONGEST_MESSAGE] if lines else ""


def exactly(size: int) -> bytes:
    """So many bytes from standard input, or fewer if it ends."""
    data = b""
    while len(data) < size and (part := os.read(0, size - len(data))):
        data += part
    return data


def watch(order: dict[str, Any]) -> Verdict:
    """Run one program to its end."""
    linux.adopt_orphans()
    os.chdir(order["directory"])
    try:
        return Watch(order, *start(order)).until_the_end()
    except OSError as error:
        return Verdict("refused", str(error))
    finally:
        processes.end_descendants()


def watch_apart(order: dict[str, Any]) -> bytes:
    """Watch one program in a process of its own; returns its outcome when that has ended too."""
    told, tell = os.pipe()
    if os.fork() == 0:
        os.write(tell, watch(order).as_json())
        os._exit(0)
    os.close(tell)
    with os.fdopen(told, "rb") as pipe:
        outcome = pipe.read()
    os.wait()
    return outcome or Verdict("failed", "ended the process that watched it").as_json()


def main() -> None:
    """Serve orders from standard input, one after the other."""
    while len(head := exactly(8)) == 8:
        order = json.loads(exactly(int.from_bytes(head, "big")))
        os.write(1, watch_apart(order) + b"\n")


if __name__ == "__main__":
    main()
