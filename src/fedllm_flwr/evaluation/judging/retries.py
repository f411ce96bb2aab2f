"""When a request to a judge is made again, and after how long."""

import asyncio
import email.utils
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

from fedllm_flwr.evaluation.judging.transport import AnswerRefusedError

TRIES = 7  # of one request: with doubling waits about half a minute in all
LONGEST_WAIT_S = 300.0  # that a server may ask for; a longer one ends the command
FIRST_WAIT_S, LONGEST_BACKOFF_S = 0.5, 30.0


class TruncatedError(Exception):
    """A reply that ends before its end."""


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: rate limits, timeouts, broken connections and
    replies, errors of the server.
    """
    import openai

    if isinstance(error.__cause__, AnswerRefusedError):
        return False
    if isinstance(error, TruncatedError | TimeoutError | openai.APIResponseValidationError):
        return True
    if isinstance(error, openai.APIStatusError):
        wait = retry_after_s(error)
        if error.code == "insufficient_quota" or (wait or 0.0) > LONGEST_WAIT_S:
            return False
        return error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    # A stream's own error event is an APIError without a status.
    return isinstance(error, openai.APIConnectionError) or type(error) is openai.APIError


def retry_after_s(error: BaseException | None) -> float | None:
    """Seconds that the server asks to wait: ``retry-after-ms``, or ``Retry-After`` in seconds or
    as a date.
    """
    headers: Any = getattr(getattr(error, "response", None), "headers", None) or {}
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            wait: float = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if math.isfinite(wait) and wait >= 0:
            return wait
    try:
        date = email.utils.parsedate_to_datetime(str(headers.get("retry-after", "")))
    except ValueError:
        return None
    return max(0.0, date.timestamp() - time.time())


def retrying(
    sleep: Callable[[float], Awaitable[None]], keep_on: Callable[[], bool], tries: int = TRIES
) -> AsyncRetrying:
    """Tries with waits between them: what the server asks for, or twice as long each time.

    Args:
        sleep: waits so many seconds.
        keep_on: asked after each failure; False ends the tries.
    """
    backoff = wait_exponential_jitter(FIRST_WAIT_S, LONGEST_BACKOFF_S, jitter=FIRST_WAIT_S)

    def wait(state: RetryCallState) -> float:
        asked = retry_after_s(state.outcome.exception() if state.outcome else None)
        return backoff(state) if asked is None else asked

    return AsyncRetrying(
        retry=retry_if_exception(lambda error: keep_on() and is_passing(error)),
        stop=stop_after_attempt(tries),
        wait=wait,
        sleep=sleep,
        reraise=True,
    )


class Gate:
    """Holds all requests back while the server has asked one of them to wait."""

    def __init__(self) -> None:
        self._open_at = 0.0
        self.closed = asyncio.Event()  # set: wait no longer, the work ends

    def hold(self, seconds: float) -> None:
        """Let nothing through for so long."""
        self._open_at = max(self._open_at, time.monotonic() + seconds)

    async def sleep(self, seconds: float) -> None:
        """Wait, or until the work ends."""
        if seconds > 0:
            try:
                await asyncio.wait_for(self.closed.wait(), seconds)
            except TimeoutError:
                return

    async def passed(self) -> None:
        """Wait until requests may go out."""
        while not self.closed.is_set() and (left := self._open_at - time.monotonic()) > 0:
            await self.sleep(left)
