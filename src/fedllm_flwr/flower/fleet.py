"""A site's connection over gRPC for a SuperNode that itself speaks HTTP (Flower 1.40 to 1.42).

The SuperLink of these versions serves its Fleet API over gRPC if it is told to, and the same API
over HTTP; the SuperNode brings a client for HTTP only. Both take the same requests, so that all
that is needed is a client for gRPC in its place: a stub whose errors are put in HTTP's terms, by
which the SuperNode decides whether to try again, to leave a run or to end.
"""

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import grpc

from fedllm_flwr.errors import FederationError
from fedllm_flwr.flower.names import find, missing

_CLIENT = "FleetHttpClient"  # name in Flower's module
_MOST_BYTES = 2**31 - 1  # of a message
_LIMITS_S = {"SendNodeHeartbeat": 5.0}  # of a call; others wait as long as their connection lasts
_KEY, _TIME, _SIGNATURE = "flwr-public-key-bin", "flwr-timestamp", "flwr-signature-bin"
_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_ENDED, _UNKNOWN_SITE, _OTHERWISE = 403, 401, 400  # HTTP's status: of a run, of a key
_STATUS = {
    grpc.StatusCode.PERMISSION_DENIED: _ENDED,
    grpc.StatusCode.UNAUTHENTICATED: _UNKNOWN_SITE,
}
_NOT_TAKEN = (
    "the server does not take this site: its key is not registered there (fedllm server register), "
    "or the server has heard of it less than a minute ago and takes it after that"
)


def connect_over_grpc(module: ModuleType) -> None:
    """Let Flower's `module`, a SuperNode's connection, use gRPC.

    Raises:
        FederationError: this version of Flower makes the connection by other means.
    """
    if not hasattr(module, _CLIENT):
        raise FederationError(missing(f"{module.__name__}.{_CLIENT}"))
    setattr(module, _CLIENT, FleetGrpcClient)


class FleetGrpcClient:
    """A site's calls to the Fleet API of its SuperLink, as Flower's client for HTTP has them."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._stub = find("FleetStub")(channel)

    @classmethod
    def from_server_address(
        cls,
        server_address: str,
        insecure: bool,
        root_certificates: bytes | str | None,
        interceptors: Any,
    ) -> Self:
        """A client that signs its calls with the keys of Flower's interceptor for HTTP.

        Args:
            root_certificates: PEM, or the path of such a file.
            interceptors: Flower's for HTTP, of which only the last, with the site's key, is used.
        """
        if isinstance(root_certificates, str):
            root_certificates = Path(root_certificates).read_bytes()
        channel = find("create_channel")(
            server_address=server_address,
            insecure=insecure,
            root_certificates=root_certificates,
            max_message_length=_MOST_BYTES,
            interceptors=[_Signing(interceptors[-1]._private_key)],
        )
        return cls(channel)

    def __getattr__(self, method: str) -> Callable[[Any], Any]:
        call = getattr(self._stub, method)

        def translated(request: Any) -> Any:
            try:
                return call(request, timeout=_LIMITS_S.get(method))
            except grpc.RpcError as error:
                raise _in_terms_of_http(error, method) from error

        return translated

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()


class _Signing(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    """Signs each call with a site's key, as a SuperLink expects it over gRPC."""

    def __init__(self, private_key: Any) -> None:
        self._private_key = private_key
        self._public_key = find("public_key_to_bytes")(private_key.public_key())

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        moment = datetime.now(UTC).isoformat()
        signature = find("sign_message")(self._private_key, moment.encode("ascii"))
        own = [(_KEY, self._public_key), (_TIME, moment), (_SIGNATURE, signature)]
        metadata = [*(details.metadata or []), *own]
        return continuation(details._replace(metadata=metadata), request)


def _in_terms_of_http(error: grpc.RpcError, method: str) -> Exception:
    import httpx

    request = httpx.Request("POST", f"https://superlink/{method}")
    said = error.details() or error.code().name
    if error.code() in _AGAIN:
        return httpx.ConnectError(said, request=request)
    if method == "ActivateNode":  # Flower 1.42 tells only its own log why
        print(_NOT_TAKEN, file=sys.stderr)
    response = httpx.Response(_STATUS.get(error.code(), _OTHERWISE), text=said, request=request)
    return httpx.HTTPStatusError(said, request=request, response=response)
