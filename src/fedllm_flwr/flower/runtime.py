"""Calls of a run's app to its SuperLink: over gRPC in Flower 1.31, over HTTP in 1.42.

The methods of both clients have the same names and take the same requests.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import grpc
from flwr.serverapp import Grid

from fedllm_flwr.flower.names import find, find_if_there, is_http

Result = TypeVar("Result")

_COMPONENT = "flwr-serverapp"
_BUSY, _BUSY_S, _BUSY_PAUSE_S = "database is locked", 120.0, 0.5
_INTERNAL_ERROR = 500  # HTTP's status, whose reason the SuperLink keeps to itself


class TooLargeError(Exception):
    """An answer of a SuperLink that is larger than what the client takes."""


def act_as_server(run_id: int) -> None:
    """Let messages be made in a process in which Flower has started no app.

    Flower 1.42 takes a message's run and sender from the process, 1.31 when it is pushed.
    """
    if (identity := find_if_there("TaskIdentity")) is not None:
        identity.task_id, identity.run_id = 1, run_id
        identity.node_id = find("SUPERLINK_NODE_ID")


def is_superlink_grid(grid: Grid) -> bool:
    """Whether a SuperLink is behind a grid, rather than nodes of this process or machine."""
    return isinstance(grid, find("SuperLinkGrid"))


def is_engine_grid(grid: Grid) -> bool:
    """Whether a grid is that of Flower's simulation engine in this process."""
    return isinstance(grid, find("InMemoryGrid"))


def runtime_client(grid: Any) -> Any:
    """The client with which a SuperLink's grid makes its calls."""
    return grid._runtime_client if is_http() else grid._stub


def bounded_client(grid: Any, most_bytes: int) -> Any:
    """A client of the grid's SuperLink on a connection of its own.

    No answer of more than `most_bytes` passes; Flower's own takes 2 GB at once over gRPC, and any
    size over HTTP. The connection's parameters are private to the grid.
    """
    token, version = find("RuntimeToken"), find("RuntimeVersion")
    interceptors = [version(component_name=_COMPONENT), token(token=grid._token)]
    retries = find("make_retry_invoker")()
    if is_http():
        client = _bounded_http_client().from_server_address(
            server_address=grid._addr,
            insecure=grid._insecure,
            root_certificates=grid._cert,
            interceptors=interceptors,
            retry_invoker=retries,
        )
        client.most_bytes = most_bytes
        return client
    channel = find("create_channel")(
        server_address=grid._addr,
        insecure=grid._insecure,
        root_certificates=grid._cert,
        max_message_length=most_bytes,
        interceptors=interceptors,
    )
    stub = find("RuntimeClient")(channel)
    find("wrap_stub")(stub, retries)
    return stub


@cache
def _bounded_http_client() -> Any:
    import httpx

    class BoundedClient(find("RuntimeClient")):  # type: ignore[misc]
        most_bytes = 0

        def _send(self, context: Any, *, stream: bool = False) -> httpx.Response:
            response: httpx.Response = super()._send(context, stream=True)
            if response.is_error:  # read already, up to 64 kB
                return response
            content = bytearray()
            try:
                for chunk in response.iter_raw():
                    content += chunk
                    if len(content) > self.most_bytes:
                        raise TooLargeError(f"more than {self.most_bytes} bytes")
            finally:
                response.close()
            headers = [
                (key, value)
                for key, value in response.headers.multi_items()
                if key not in ("content-length", "transfer-encoding")
            ]
            return httpx.Response(
                response.status_code,
                headers=headers,
                content=bytes(content),
                request=response.request,
            )

    return BoundedClient


def call_errors() -> tuple[type[Exception], ...]:
    """What a call that fails raises, after Flower's own retries."""
    if not is_http():
        return (grpc.RpcError,)
    import httpx

    return (grpc.RpcError, httpx.HTTPError, TooLargeError)


def patiently(call: Callable[[], Result]) -> Result:
    """The answer of the SuperLink, which is asked again while its database is busy.

    On a machine with too much to do a query of it can wait for more than Flower allows; the
    SuperLink then answers with an error and has done nothing.

    Raises:
        Exception: of `call_errors`, any other error, or one that lasts.
    """
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            return call()
        except call_errors() as error:
            if not _is_busy(error) or time.monotonic() >= deadline:
                raise
        time.sleep(_BUSY_PAUSE_S)


def _is_busy(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status == _INTERNAL_ERROR or _BUSY in details_of(error)


def is_too_large(error: Exception) -> bool:
    """Whether a call failed because of the size of its answer."""
    code = getattr(error, "code", lambda: None)()
    return isinstance(error, TooLargeError) or code is grpc.StatusCode.RESOURCE_EXHAUSTED


def details_of(error: Exception) -> str:
    """What the SuperLink said of its error."""
    return getattr(error, "details", lambda: None)() or ""
