"""Models behind an OpenAI-compatible endpoint, which grade or write answers.

A local model is used as an endpoint, too (``vllm serve``, ``transformers serve``). The openai
client retries, waits and honours ``Retry-After``. Redirects are not followed, and the size of
responses is limited.
"""

import asyncio
import importlib
import importlib.util
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from fedllm_flwr.config.names import did_you_mean, shown
from fedllm_flwr.data.records import Messages
from fedllm_flwr.errors import ConfigError, FedLLMError, JudgeError

if TYPE_CHECKING:
    import openai

RETRIES = 6  # per request; with exponential back-off, about half a minute in total
LARGEST_BODY = 2**23  # bytes of one response
MAX_TOKENS = 2048  # of a reply, as in MT-Bench
# Finish reasons in addition to the endpoint's: the request is declined; the reply is incomplete.
DECLINED, BROKEN = "declined", "broken"
_OPENAI_URL = "https://api.openai.com/v1"
# Error codes that concern one request only; others can continue.
_DECLINES = ("context_length_exceeded", "content_filter", "content_policy_violation")
_NEWER_NAMES = {"max_tokens": "max_completion_tokens"}  # parameter names of newer models

OnProgress = Callable[[int, int], None]  # done, total
Item = TypeVar("Item")


class AnswerRefusedError(Exception):
    """A response from an endpoint that is rejected."""


@dataclass(frozen=True)
class Completion:
    """A judge's reply. Token counts are None if the endpoint does not report them."""

    text: str
    finish_reason: str  # stop, length, `DECLINED`, `BROKEN`
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass
class Endpoint:
    """An OpenAI-compatible endpoint.

    Args:
        url: its base URL; None: ``OPENAI_BASE_URL``, or OpenAI's if that is unset. The key is
            ``OPENAI_API_KEY``.
        concurrency: maximum number of concurrent requests.
        timeout_s: timeout of one attempt of a request.
        option: the command-line option that selects it, for messages.
    """

    url: str | None = None
    concurrency: int = 4
    timeout_s: float = 120.0
    option: str = "--judge-model"

    @property
    def shown_url(self) -> str:
        """The URL without credentials or query."""
        parts = urlsplit(self.url or os.environ.get("OPENAI_BASE_URL") or _OPENAI_URL)
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="")
        return shown(bare.geturl())

    def each(
        self,
        items: Iterable[Item],
        work: Callable[["openai.AsyncOpenAI", Item], Awaitable[None]],
    ) -> None:
        """Run `work` for every item, at most `concurrency` at a time.

        Raises:
            FedLLMError: the first one raised; requests in progress are completed before.
        """
        todo, failures = iter(items), list[FedLLMError]()

        async def one_after_the_other(client: "openai.AsyncOpenAI") -> None:
            for item in todo:  # one iterator for all workers
                if failures:
                    return
                try:
                    await work(client, item)
                except FedLLMError as error:  # the other workers complete their current requests
                    failures.append(error)

        async def all_of_them() -> None:
            async with self.client() as client, asyncio.TaskGroup() as group:
                for _ in range(self.concurrency):
                    group.create_task(one_after_the_other(client))

        asyncio.run(all_of_them())
        if failures:
            raise failures[0]

    def client(self) -> "openai.AsyncOpenAI":
        """The openai client, which retries transient errors.

        Raises:
            ConfigError: it is not installed, or there is no key.
        """
        if importlib.util.find_spec("openai") is None:
            raise ConfigError(
                f"{self.option} needs the openai client; pip install 'fedllm-flwr[judge]'."
            )
        import openai

        own = self.url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY") or ("none" if own else None)
        if key is None:
            raise ConfigError(
                f"{self.option}: set OPENAI_API_KEY, or OPENAI_BASE_URL for an endpoint of your "
                "own, such as vllm serve or transformers serve for a local model."
            )
        return openai.AsyncOpenAI(
            api_key=key,
            base_url=own,
            max_retries=RETRIES,
            timeout=self.timeout_s,
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False, event_hooks={"response": [self._bound]}
            ),
        )

    def failure(self, error: BaseException) -> JudgeError:
        """The error as one line: what failed, and the remedy."""
        import openai

        if isinstance(error.__cause__, AnswerRefusedError):
            error = error.__cause__
        status = getattr(error, "status_code", None)
        message, remedy = _message(error), "run the same command again; finished requests are kept."
        if isinstance(error, openai.APIStatusError) and error.response.is_redirect:
            target = urlsplit(error.response.headers.get("location", "")).netloc or "another page"
            message = f"HTTP {status}, it redirects to {shown(target)}"
        if isinstance(error, AnswerRefusedError) or (status and 300 <= status < 400):
            remedy = "check OPENAI_BASE_URL."
        elif isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            remedy = "check OPENAI_API_KEY and OPENAI_BASE_URL."
        elif isinstance(error, openai.NotFoundError | openai.BadRequestError):
            remedy = f"check {self.option} and OPENAI_BASE_URL."
        elif isinstance(error, openai.APITimeoutError):
            message = f"no reply within {self.timeout_s:g} s"
        elif isinstance(error, openai.APIConnectionError):
            remedy = f"check OPENAI_BASE_URL, or {remedy}"
        return JudgeError(f"{self.shown_url}: {message}; {remedy}")

    async def _bound(self, response: Any) -> None:
        """Reject encoded responses, and limit the bytes and the time of reading a response.

        An event hook of openai's HTTP client: httpx, or httpx2 in newer versions. The size of a
        compressed body is unknown before it is decompressed.
        """
        if encoding := response.headers.get("content-encoding"):
            raise AnswerRefusedError(
                f"its response has an encoding ({shown(encoding)}) that was not requested"
            )
        http = importlib.import_module(type(response).__module__.partition(".")[0])
        ends, stream, limit_s = time.monotonic() + self.timeout_s, response.stream, self.timeout_s

        class BoundedBody(http.AsyncByteStream):  # type: ignore[misc, name-defined]
            async def __aiter__(self) -> AsyncIterator[bytes]:
                read = 0
                async for part in stream:
                    read += len(part)
                    if read > LARGEST_BODY:
                        raise AnswerRefusedError(f"its reply is longer than {LARGEST_BODY} bytes")
                    if time.monotonic() > ends:
                        raise http.ReadTimeout(f"no complete response within {limit_s:g} s")
                    yield part

            async def aclose(self) -> None:
                await stream.aclose()

        response.stream = BoundedBody()


@dataclass
class EndpointJudge(Endpoint):
    """A judge: a model of an endpoint, by its name there.

    Args:
        stream: receive replies token by token, for proxies that close idle connections.
    """

    model: str = ""
    stream: bool = False
    dropped: set[str] = field(default_factory=set)  # parameters that the model does not support

    def check(self) -> None:
        """Check that the endpoint lists the model, if it lists models.

        Raises:
            JudgeError, ConfigError: the judge cannot be used.
        """
        names = asyncio.run(self._models())
        if names and self.model not in names:
            hint = did_you_mean(self.model, names) or f" It has {shown(names[:5])}."
            raise ConfigError(
                f"--judge-model {self.model}: {self.shown_url} has no such model.{hint}"
            )

    async def reply(
        self, client: "openai.AsyncOpenAI", messages: Messages, temperature: float
    ) -> Completion:
        """The judge's reply to a conversation.

        Raises:
            JudgeError: the judge cannot be reached, or rejects the request.
        """
        import openai

        while True:
            try:
                return await self._request(client, messages, temperature)
            except openai.BadRequestError as error:
                if error.code in _DECLINES:
                    return Completion(_message(error), DECLINED)
                refused = error.code in ("unsupported_parameter", "unsupported_value")
                parameter = str(error.param)
                if not refused or parameter not in {"max_tokens", "temperature"} - self.dropped:
                    raise self.failure(error) from error
                self.dropped.add(parameter)  # and retry without it
            except openai.APIResponseValidationError:
                return Completion("", BROKEN)
            except (openai.OpenAIError, AnswerRefusedError) as error:
                raise self.failure(error) from error

    def failure(self, error: BaseException) -> JudgeError:
        """The error as one line: the judge, what failed, and the remedy."""
        return JudgeError(f"judge {self.model} at {super().failure(error)}")

    async def _models(self) -> list[str]:
        """The models that the endpoint lists; empty if it has no list."""
        import openai

        async with self.client() as client:
            try:
                found = await client.with_options(max_retries=2).models.list()
            except openai.OpenAIError as error:
                if getattr(error, "status_code", None) in (404, 405, 501):
                    return []
                raise self.failure(error) from error
            return [model.id for model in found.data or []]

    async def _request(
        self, client: "openai.AsyncOpenAI", messages: Messages, temperature: float
    ) -> Completion:
        options: dict[str, Any] = {"max_tokens": MAX_TOKENS, "temperature": temperature}
        for parameter in self.dropped & set(options):
            value = options.pop(parameter)
            if parameter in _NEWER_NAMES:
                options[_NEWER_NAMES[parameter]] = value
        create: Any = client.chat.completions.create
        if self.stream:
            options |= {"stream": True, "stream_options": {"include_usage": True}}
        answer = await create(model=self.model, messages=messages, **options)
        if self.stream:
            return await _streamed(answer)
        if not getattr(answer, "choices", None):
            return Completion("", BROKEN)
        [choice, *_] = answer.choices
        return _reply(choice.message.content, choice.finish_reason, answer.usage)


async def _streamed(stream: Any) -> Completion:
    import openai

    http = importlib.import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__)
    parts: list[str] = []
    reason = usage = None
    try:
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices[:1]:
                parts.append(choice.delta.content or "")
                reason = choice.finish_reason or reason
    except (http.HTTPError, ValueError):  # the connection is lost, or an event is not JSON
        reason = None
    return _reply("".join(parts), reason, usage)


def _reply(text: str | None, reason: str | None, usage: Any) -> Completion:
    tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
    return Completion(text or "", reason or BROKEN, *tokens)


def _message(error: BaseException) -> str:
    """The server's message: one printable, shortened line without the API key."""
    status = getattr(error, "status_code", None)
    body: Any = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    text = " ".join(str(said or error or type(error).__name__).split())
    if key := os.environ.get("OPENAI_API_KEY"):
        text = text.replace(key, "[the key]")
    text = "".join(letter if letter.isprintable() else "?" for letter in text)[:200].rstrip(".")
    return f"HTTP {status}, {text}" if status and said else text
