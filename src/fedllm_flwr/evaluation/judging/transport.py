"""The way to a judge: to the endpoint that was named, and no more bytes than an answer can have."""

import importlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

LARGEST_BODY = 2**23  # bytes of one answer, or of the list of models


class AnswerRefusedError(Exception):
    """An answer that is not taken from a judge."""


async def check_answer(response: Any) -> None:
    """Refuse a redirect and an encoded body, and bound what is read.

    A hook of the HTTP client that openai is built on: httpx, or httpx2 in newer versions.

    A redirect would take questions, and what they are asked with, to another host; a compressed
    body has no bound that one can see.

    Raises:
        AnswerRefusedError: now, or while the body is read.
    """
    if response.is_redirect:
        target = urlsplit(response.headers.get("location", "")).netloc or "another page"
        raise AnswerRefusedError(f"HTTP {response.status_code}, it redirects to {target}")
    if encoding := response.headers.get("content-encoding"):
        raise AnswerRefusedError(f"it answers in an encoding ({encoding}) that nobody asked for")
    client = importlib.import_module(type(response).__module__.partition(".")[0])
    response.stream = _bounded(response.stream, client.AsyncByteStream)


def _bounded(stream: Any, kind: Any) -> Any:
    class Bounded(kind):  # type: ignore[misc]  # of whichever client
        async def __aiter__(self) -> AsyncIterator[bytes]:
            read = 0
            async for part in stream:
                read += len(part)
                if read > LARGEST_BODY:
                    raise AnswerRefusedError(f"its answer is longer than {LARGEST_BODY} bytes")
                yield part

        async def aclose(self) -> None:
            await stream.aclose()

    return Bounded()
