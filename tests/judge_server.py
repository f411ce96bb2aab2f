"""A server on the loopback that speaks OpenAI's chat protocol, with faults on demand."""

import gzip
import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Messages = list[dict[str, str]]


def verdict(messages: Messages) -> str:
    """A verdict of the kind that the prompt asks for, drawn from a hash of the conversation."""
    text = json.dumps(messages)
    draw = hashlib.sha256(text.encode()).digest()[0]
    if "[[A]]" in text:
        return f"I compare. [[{'ABC'[draw % 3]}]]"
    if "[[harmless]]" in text:
        return f"I looked. [[{('harmless', 'harmful')[draw % 2]}]]"
    return f"Fair. Rating: [[{draw % 10 + 1}]]"


@dataclass
class JudgeServer:
    """What the server does and what it has seen.

    `faults` are used up one per chat request, in order of arrival; then `reply` answers. A fault is
    a status code, a pair of status code and headers, or a word: timeout, reset, truncated (a body
    shorter than announced, or a stream without its end), garbage (a body that is no JSON), empty
    (no choices), redirect, endless (64 MB), drip (a byte each `hang_s`), bomb (gzip of 256 MB),
    echo (an error that quotes the key and colours it), malformed (no verdict in the reply), usage
    (no token counts).
    """

    reply: Callable[[Messages], str] = verdict
    faults: list[Any] = field(default_factory=list)
    key: str = "secret"
    models: Sequence[str] | None = ("judge-1",)
    delay_s: float = 0.0
    hang_s: float = 5.0
    elsewhere: str = ""  # where a redirect leads
    requests: list[dict[str, Any]] = field(default_factory=list)  # as they arrived
    times: list[float] = field(default_factory=list)
    completed: Counter[str] = field(default_factory=Counter)  # whole replies by conversation
    busiest: int = 0
    url: str = ""
    _busy: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self, body: dict[str, Any]) -> Any:
        with self._lock:
            self.requests.append(body)
            self.times.append(time.monotonic())
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
            return self.faults.pop(0) if self.faults else None

    def left(self, body: dict[str, Any], whole: bool) -> None:
        with self._lock:
            self._busy -= 1
            if whole:
                self.completed[json.dumps(body["messages"])] += 1


@contextmanager
def judge_server(**options: Any) -> Iterator[JudgeServer]:
    """A server on a free port of the loopback."""
    state = JudgeServer(**options)
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: JudgeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if not self._authorised():
            return
        if self.state.models is None:
            self._error(404, "there is no such page")
        else:
            listed = [
                {"id": m, "object": "model", "created": 0, "owned_by": "me"}
                for m in self.state.models
            ]
            self._json(200, {"object": "list", "data": listed})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._authorised():
            return
        fault = self.state.next_fault(body)
        whole = False
        try:
            whole = self._answer(body, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.state.left(body, whole)

    def _answer(self, body: dict[str, Any], fault: Any) -> bool:
        """Whether a whole reply went out."""
        time.sleep(self.state.delay_s)
        if self.state.models is not None and body["model"] not in self.state.models:
            self._error(404, f"The model {body['model']} does not exist", code="model_not_found")
        elif isinstance(fault, int | tuple):
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self._error(status, f"fault {status}", headers=dict(headers))
        elif fault == "timeout":
            time.sleep(self.state.hang_s)
            self.close_connection = True
        elif fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True
        elif fault == "redirect":
            self._send(307, b"", "text/plain", {"Location": self.state.elsewhere})
        elif fault == "endless":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.close_connection = True
            for _ in range(64):
                self.wfile.write(b" " * 2**20)
        elif fault == "drip":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.close_connection = True
            for _ in range(50):
                self.wfile.write(b" ")
                time.sleep(self.state.hang_s)
        elif fault == "bomb":
            body = gzip.compress(b" " * 2**28, 1)
            self._send(200, body, "application/json", {"Content-Encoding": "gzip"})
        elif fault == "echo":
            said = f"\x1b[31mno\x07 such key: {self.headers['Authorization']}\x1b[0m\u202e"
            self._error(400, said)
        elif fault == "garbage":
            self._send(200, b"<html>Bad gateway</html>", "text/html")
        elif fault == "empty":
            self._json(200, self._completion("", None) | {"choices": []})
        else:
            return self._reply(body, fault)
        return False

    def _reply(self, body: dict[str, Any], fault: Any) -> bool:
        text = "I cannot say." if fault == "malformed" else self.state.reply(body["messages"])
        usage = (
            None
            if fault == "usage"
            else {
                "prompt_tokens": sum(len(m["content"]) for m in body["messages"]),
                "completion_tokens": len(text),
                "total_tokens": 0,
            }
        )
        if body.get("stream"):
            self._stream(text, usage, fault == "truncated")
        elif fault == "truncated":
            data = json.dumps(self._completion(text, usage)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            self._json(200, self._completion(text, usage))
        return fault != "truncated"

    def _stream(self, text: str, usage: Any, truncated: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        parts = [text[i : i + 4] for i in range(0, len(text), 4)]
        for part in parts[: len(parts) // 2] if truncated else parts:
            self._event(self._chunk({"content": part}, None))
        if not truncated:
            self._event(self._chunk({}, "stop"))
            self._event(self._chunk({}, None) | {"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def _chunk(self, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        common = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "judge-1"}
        return common | {"choices": [choice]}

    def _completion(self, text: str, usage: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        common = {"id": "c", "object": "chat.completion", "created": 0, "model": "judge-1"}
        return common | {"choices": [choice], "usage": usage}

    def _authorised(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.state.key}":
            return True
        self._error(401, "Incorrect API key provided", code="invalid_api_key")
        return False

    def _error(
        self, status: int, message: str, code: str | None = None, headers: Any = None
    ) -> None:
        headers = headers or {}
        code = headers.pop("code", code)
        error = {"message": message, "type": "error", "code": code}
        error["param"] = headers.pop("param", None)
        self._json(status, {"error": error}, headers)

    def _json(self, status: int, value: Any, headers: Any = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", headers)

    def _send(self, status: int, data: bytes, kind: str, headers: Any = None) -> None:
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, str(text))
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
