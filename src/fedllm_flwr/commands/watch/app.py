"""The live page's web application: two read-only addresses, protected by a token."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedllm_flwr.commands.watch.state import Seen
from fedllm_flwr.errors import FedLLMError
from fedllm_flwr.reporting.html.render import render, render_body

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_HEARTBEAT_S = 15.0
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass
class LivePage:
    """The current version of the page, for any number of readers.

    Args:
        look: reads the directory and creates the page.
        signature: changes whenever the result of `look` changes.
        seen: the initial page.
    """

    look: Callable[[], Seen]
    signature: Callable[[], object]
    seen: Seen
    version: int = 0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def follow(self, every_s: float) -> None:
        """Update the page whenever the signature changes, until the run has ended."""
        before = self.signature()
        while not self.seen.has_ended:
            await asyncio.sleep(every_s)
            now = self.signature()
            if now == before:
                continue
            try:
                self.seen = await asyncio.to_thread(self.look)
            except FedLLMError:  # files are inconsistent during a restart; the next look succeeds
                continue
            before = now
            async with self._changed:
                self.version += 1
                self._changed.notify_all()

    async def events(self, version: int) -> AsyncIterator[str]:
        """Server-sent events for a reader that already has `version` of the page."""
        while True:
            while self.version == version and not self.seen.has_ended:
                try:
                    async with self._changed:
                        await asyncio.wait_for(self._changed.wait(), _HEARTBEAT_S)
                except TimeoutError:
                    yield ": still here\n\n"
            version, ended = self.version, self.seen.has_ended
            body, charts = render_body(self.seen.page)
            data = json.dumps({"body": body, "charts": charts, "ended": ended})
            yield f"id: {version}\ndata: {data}\n\n"
            if ended:
                return


def make_app(live: LivePage, token: str, port: int) -> "Starlette":
    """The application; every other address, method, host or token is rejected.

    A page of another origin cannot read a response, and DNS rebinding is prevented by checking the
    host header.
    """
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    def is_known(request: "Request") -> bool:
        given = str(request.path_params["token"]).encode()
        is_token = secrets.compare_digest(given, token.encode())
        return is_token and request.headers.get("host", "") in hosts

    def refused() -> "Response":
        return PlainTextResponse("not found\n", 404, _HEADERS)

    async def page(request: "Request") -> "Response":
        if not is_known(request):
            return refused()
        return HTMLResponse(render(live.seen.page, live.version), headers=_HEADERS)

    async def events(request: "Request") -> "Response":
        if not is_known(request):
            return refused()
        given: Any = request.headers.get("last-event-id") or request.query_params.get("version")
        version = int(given) if str(given).isdecimal() else -1
        return StreamingResponse(
            live.events(version), media_type="text/event-stream", headers=_HEADERS
        )

    return Starlette(
        routes=[
            Route("/{token}/", page, methods=["GET"]),
            Route("/{token}/events", events, methods=["GET"]),
        ]
    )
