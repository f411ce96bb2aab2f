"""A link with a delay and a bandwidth, as a TCP proxy on loopback in a thread of this process."""

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Iterator

_PIECE = 8192  # bytes read at once


class SlowLink:
    """Carries connections to a local port over one line, each direction with its own queue.

    Args:
        port: where the connections go on this machine.
        delay_s: of one way, half a round trip.
        bits_per_s: of each direction, shared by all connections.
    """

    def __init__(self, port: int, delay_s: float, bits_per_s: float) -> None:
        self._target, self._delay_s, self._seconds_per_byte = port, delay_s, 8 / bits_per_s
        self._free_at = {"up": 0.0, "down": 0.0}  # time.monotonic() when the line is free again
        self.num_bytes = {"up": 0, "down": 0}
        self.port = 0

    async def serve(self, ready: threading.Event, end: asyncio.Event) -> None:
        """Until `end`."""
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await end.wait()
        server.close()

    async def _connect(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        try:
            far, forth = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            back.close()
            return
        await asyncio.gather(self._carry(near, forth, "up"), self._carry(far, back, "down"))

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str
    ) -> None:
        on_their_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivery = asyncio.create_task(_deliver(on_their_way, writer))
        data = b"-"
        while data:
            try:
                data = await reader.read(_PIECE)
            except OSError:
                data = b""
            sent_at = max(time.monotonic(), self._free_at[way])
            self._free_at[way] = sent_at + len(data) * self._seconds_per_byte
            self.num_bytes[way] += len(data)
            on_their_way.put_nowait((self._free_at[way] + self._delay_s, data))
            await asyncio.sleep(self._free_at[way] - time.monotonic())
        await delivery


async def _deliver(
    on_their_way: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter
) -> None:
    """Write what has travelled long enough; an empty piece closes the connection."""
    data = b"-"
    while data:
        arrives_at, data = await on_their_way.get()
        await asyncio.sleep(arrives_at - time.monotonic())
        with contextlib.suppress(OSError):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.contextmanager
def slow_link(port: int, round_trip_s: float, bits_per_s: float) -> Iterator[SlowLink]:
    """A link to `port`; its own port is `SlowLink.port`."""
    link, ready = SlowLink(port, round_trip_s / 2, bits_per_s), threading.Event()
    loop, end = asyncio.new_event_loop(), asyncio.Event()
    loop.set_exception_handler(lambda *_: None)  # connections end in many ways
    thread = threading.Thread(target=loop.run_until_complete, args=(link.serve(ready, end),))
    thread.start()
    try:
        assert ready.wait(10)
        yield link
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(10)
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks))
        loop.close()
        gc.collect()  # here, not in the middle of an import that parses code (CPython gh-106905)
