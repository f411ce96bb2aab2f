"""The slow link of the system tests: its delay and its bandwidth are what they are said to be."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from slow_link import slow_link


@pytest.fixture
def echo() -> Iterator[int]:
    """Port of a server that sends back what it gets."""

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while data := connection.recv(65_536):
                connection.sendall(data)

    def serve() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    server.close()


def echoed(port: int, data: bytes) -> float:
    """Seconds until all of `data` has come back."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        began = time.monotonic()
        connection.sendall(data)
        left = len(data)
        while left:
            left -= len(connection.recv(65_536))
        return time.monotonic() - began


def test_round_trip_and_bandwidth(echo: int) -> None:
    """100 kB at 2 Mbit/s take 0.4 s; both directions are under way at once."""
    with slow_link(echo, round_trip_s=0.1, bits_per_s=2e6) as link:
        assert 0.1 <= echoed(link.port, b"x") < 1.0
        assert 0.5 <= echoed(link.port, bytes(100_000)) < 3.0
        assert link.num_bytes == {"up": 100_001, "down": 100_001}


def test_connections_share_the_line_and_may_stay_open_at_its_end(echo: int) -> None:
    with slow_link(echo, round_trip_s=0.02, bits_per_s=1e6) as link:
        open_still = socket.create_connection(("127.0.0.1", link.port))
        threads = [threading.Thread(target=echoed, args=(link.port, bytes(25_000))) for _ in "ab"]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 0.4 <= time.monotonic() - began < 3.0
    open_still.close()


def test_link_ends_with_and_without_connections(echo: int) -> None:
    with slow_link(echo, round_trip_s=0.01, bits_per_s=1e6) as link:
        port = link.port
    with pytest.raises(OSError, match=r"refused"):
        socket.create_connection(("127.0.0.1", port))
