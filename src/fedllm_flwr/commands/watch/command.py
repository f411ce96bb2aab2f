"""The command: serves the live page on loopback until the run ends or Ctrl-C."""

import asyncio
import contextlib
import secrets
import socket
from pathlib import Path

from fedllm_flwr.commands.watch.state import look, signature
from fedllm_flwr.errors import ConfigError, FederationError

_LOOK_S = 1.0
_LINGER_S = 5.0  # after the end, for readers that have to reconnect


def watch(directory: str, port: int) -> int:
    """Serve the live page of a directory, and print its address.

    Args:
        port: port on 127.0.0.1; 0 chooses a free one.

    Raises:
        ConfigError: Starlette or uvicorn is missing, or there is no active run.
        FederationError: the port is in use.
    """
    try:
        import uvicorn
        from starlette.applications import Starlette  # noqa: F401
    except ImportError:
        raise ConfigError(
            "fedllm watch needs Starlette and uvicorn: pip install 'fedllm-flwr[watch]'"
        ) from None
    from fedllm_flwr.commands.watch.app import LivePage, make_app

    folder = Path(directory).expanduser()
    seen = look(folder)
    if seen.has_ended:
        raise ConfigError(f"{folder} has ended; open its report.html, or fedllm report {folder}.")
    listening = _listen(port)
    token, taken = secrets.token_urlsafe(18), listening.getsockname()[1]

    async def serve() -> None:
        live = LivePage(lambda: look(folder), lambda: signature(folder), seen)
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(live, token, taken), log_level="error", timeout_graceful_shutdown=1
            )
        )

        async def follow() -> None:
            try:
                await live.follow(_LOOK_S)
                await asyncio.sleep(_LINGER_S)
            finally:
                server.should_exit = True

        following = asyncio.create_task(follow())
        where = f"http://127.0.0.1:{taken}/{token}/"
        print(f"{where}   (read-only, until the run ends or Ctrl-C)", flush=True)
        await server.serve(sockets=[listening])
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following

    with contextlib.suppress(KeyboardInterrupt), listening:
        asyncio.run(serve())
    return 0


def _listen(port: int) -> socket.socket:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
        listening.listen()  # early readers wait until the server is ready
    except (OSError, OverflowError) as error:
        listening.close()
        raise FederationError(f"--port {port}: {error}; give a free one.") from error
    return listening
