"""Runs inside the sandbox: executes the program, then its tests. Imports nothing of this package.

Frames (eight bytes of length, then the content) arrive on descriptor 3 and leave on descriptor 4.
The first outgoing frame confirms that the limits are set. The first incoming frame is a token and
the program. Once the program's code has ended, the token is sent back, and a second token with the
tests arrives; sending it back proves that the tests ran to completion. Everything used after the
program has started is held in local variables, so the program cannot replace it.
"""

import json
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any

TOKEN_BYTES = 32
LONGEST_MESSAGE = 500  # characters
READY = b"ready"


def main(
    order: dict[str, Any],
    read: Callable[[int, int], bytes] = os.read,
    write: Callable[[int, Any], int] = os.write,
    leave: Callable[[int], Any] = os._exit,
    run: Callable[[Any, dict[str, Any]], None] = exec,
    translate: Callable[..., Any] = compile,
    say: Callable[..., str] = json.dumps,
    out_of_memory: type[BaseException] = MemoryError,
) -> None:
    """Never returns: the process exits without the program's threads and exit handlers."""

    def receive() -> tuple[bytes, bytes]:
        frame, size = b"", 8
        while len(frame) < size:
            frame += read(3, size - len(frame))
            if len(frame) == 8 == size:
                size += int.from_bytes(frame, "big")
        return frame[8 : 8 + TOKEN_BYTES], frame[8 + TOKEN_BYTES :]

    def send(content: bytes) -> None:
        write(4, len(content).to_bytes(8, "big") + content)

    place_descriptors(order["tasks"], order["results"])
    if order["user"] is not None:
        os.setgroups([])
        os.setresgid(order["user"], order["user"], order["user"])
        os.setresuid(order["user"], order["user"], order["user"])
    for name, limit in order["limits"].items():
        resource.setrlimit(getattr(resource, name), limit)
    sys.path += order["packages"]
    sys.argv = ["program"]
    module = types.ModuleType("program")
    sys.modules["program"] = sys.modules["__main__"] = module
    try:
        send(b"ready")
        token, source = receive()
        run(translate(source, "program", "exec", dont_inherit=True), module.__dict__)
        send(token)
        token, source = receive()
        run(translate(source, "tests", "exec", dont_inherit=True), module.__dict__)
        send(token)
    except out_of_memory:
        send(b'{"status": "memory", "message": "MemoryError"}')
    except BaseException as error:
        send(say({"status": "failed", "message": describe(error)}).encode())
    leave(0)


def place_descriptors(tasks: int, results: int) -> None:
    """Move both descriptors to 3 and 4, and close all higher ones."""
    first, second = os.dup2(tasks, 200), os.dup2(results, 201)
    os.dup2(first, 3)
    os.dup2(second, 4)
    os.closerange(5, 256)


def describe(error: BaseException) -> str:
    """Type, message and location of an error in the program or its tests, in one line."""
    place, trace = "", error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename in ("program", "tests"):
            place = f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})"
        trace = trace.tb_next
    text = " ".join(str(error).split())[:LONGEST_MESSAGE]
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
