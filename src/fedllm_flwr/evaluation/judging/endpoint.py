"""A judge behind an OpenAI-compatible endpoint."""

import asyncio
import difflib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fedllm_flwr.config.names import shown
from fedllm_flwr.errors import ConfigError, FedLLMError, JudgeError
from fedllm_flwr.evaluation.judging.judge import (
    DECLINED,
    MAX_TOKENS,
    Ask,
    Record,
    Reply,
    temperature,
)
from fedllm_flwr.evaluation.judging.transport import AnswerRefusedError, check_answer

if TYPE_CHECKING:
    import openai

    from fedllm_flwr.evaluation.judging.retries import Gate

_OPENAI_URL = "https://api.openai.com/v1"
# Codes of requests that this judge will never reply to, while others go on.
_DECLINES = ("context_length_exceeded", "content_filter", "content_policy_violation")
_NEWER_NAMES = {"max_tokens": "max_completion_tokens"}  # parameters that newer models call so


@dataclass
class EndpointJudge:
    """A model by its name at ``OPENAI_BASE_URL`` (OpenAI's own if unset), with ``OPENAI_API_KEY``.

    Args:
        concurrency: requests under way at once.
        timeout_s: of one try of one request, from sending it to the last byte of its reply.
        stream: take replies token by token, for proxies that cut silent connections.
    """

    model: str
    concurrency: int = 4
    timeout_s: float = 120.0
    stream: bool = False
    retries: int = 0  # requests made again so far
    dropped: set[str] = field(default_factory=set)  # parameters that the model has refused

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model

    @property
    def url(self) -> str:
        """Where it is, without a password or what else a query may hold."""
        parts = urlsplit(os.environ.get("OPENAI_BASE_URL") or _OPENAI_URL)
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="")
        return shown(bare.geturl())

    def check(self) -> None:
        """Look the model up, where the endpoint has a list of its models."""
        asyncio.run(self._check())

    def ask(self, asks: Sequence[Ask], record: Record) -> None:
        """Ask all, at most `concurrency` at once."""
        asyncio.run(self._ask_all(iter(asks), record))

    async def _check(self) -> None:
        import openai

        from fedllm_flwr.evaluation.judging.retries import Gate, retrying

        async def models() -> list[str]:
            return [model.id for model in (await client.models.list()).data or []]

        async with self._client() as client:
            try:
                names: list[str] = await retrying(Gate().sleep, lambda: True, tries=3)(models)
            except openai.APIStatusError as error:
                if error.status_code in (404, 405, 501):  # it has no list: the first question tells
                    return
                raise self._failure(error) from error
            except (openai.OpenAIError, TimeoutError, AnswerRefusedError) as error:
                raise self._failure(error) from error
        if names and self.model not in names:
            close = difflib.get_close_matches(self.model, names, n=1)
            hint = f"Did you mean {shown(close[0])!r}?" if close else f"It has {shown(names[:5])}."
            raise ConfigError(f"--judge-model {self.model}: {self.url} has no such model. {hint}")

    async def _ask_all(self, todo: Iterator[Ask], record: Record) -> None:
        from fedllm_flwr.evaluation.judging.retries import Gate

        gate = Gate()
        failures: list[FedLLMError] = []

        async def work(client: "openai.AsyncOpenAI") -> None:
            for ask in todo:  # shared by all
                if gate.closed.is_set():
                    return
                try:
                    record(ask, await self._ask(client, ask, gate))
                except FedLLMError as error:  # the others finish what they have under way
                    failures.append(error)
                    gate.closed.set()

        async with self._client() as client, asyncio.TaskGroup() as group:
            for _ in range(self.concurrency):
                group.create_task(work(client))
        if failures:
            raise failures[0]

    async def _ask(
        self, client: "openai.AsyncOpenAI", ask: Ask, gate: "Gate", may_adapt: int = 2
    ) -> Reply:
        import openai

        from fedllm_flwr.evaluation.judging.retries import TruncatedError, retry_after_s, retrying

        tries = retrying(gate.sleep, lambda: not gate.closed.is_set())

        async def once() -> Reply:
            self.retries += tries.statistics["attempt_number"] > 1
            await gate.passed()
            try:
                async with asyncio.timeout(self.timeout_s):
                    return await self._request(client, ask)
            except openai.APIStatusError as error:
                if error.status_code in (429, 503):
                    gate.hold(retry_after_s(error) or 0.0)
                raise

        try:
            return await tries(once)
        except openai.BadRequestError as error:
            if error.code in _DECLINES:
                return Reply(_message(error), DECLINED)
            if may_adapt and self._adapts_to(error):
                return await self._ask(client, ask, gate, may_adapt - 1)
            raise self._failure(error) from error
        except (openai.OpenAIError, TimeoutError, TruncatedError, AnswerRefusedError) as error:
            raise self._failure(error) from error

    async def _request(self, client: "openai.AsyncOpenAI", ask: Ask) -> Reply:
        from fedllm_flwr.evaluation.judging.retries import TruncatedError

        options: dict[str, Any] = {
            "max_tokens": MAX_TOKENS,
            "temperature": temperature(ask.attempt),
        }
        for parameter in self.dropped & set(options):
            value = options.pop(parameter)
            if parameter in _NEWER_NAMES:
                options[_NEWER_NAMES[parameter]] = value
        create: Any = client.chat.completions.create
        if self.stream:
            return await self._streamed(
                await create(
                    model=self.model,
                    messages=ask.messages,
                    stream=True,
                    stream_options={"include_usage": True},
                    **options,
                )
            )
        answer = await create(model=self.model, messages=ask.messages, **options)
        if not getattr(answer, "choices", None):
            raise TruncatedError("a reply without choices")
        [choice, *_] = answer.choices
        return _reply(choice.message.content, choice.finish_reason, answer.usage)

    async def _streamed(self, stream: Any) -> Reply:
        parts: list[str] = []
        reason = usage = None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices[:1]:
                parts.append(choice.delta.content or "")
                reason = choice.finish_reason or reason
        return _reply("".join(parts), reason, usage)

    def _client(self) -> "openai.AsyncOpenAI":
        if importlib.util.find_spec("openai") is None:
            raise ConfigError(
                f"--judge-model {self.model} needs the openai client; "
                "pip install 'fedllm-flwr[judge]'."
            )
        import openai

        own = os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY") or ("none" if own else None)
        if key is None:
            raise ConfigError(
                f"--judge-model {self.model}: set OPENAI_API_KEY, or OPENAI_BASE_URL for an "
                "endpoint of your own, or give the directory of a local model."
            )
        return openai.AsyncOpenAI(
            api_key=key,
            base_url=own,
            max_retries=0,
            timeout=self.timeout_s,
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False, event_hooks={"response": [check_answer]}
            ),
        )

    def _adapts_to(self, error: "openai.BadRequestError") -> bool:
        """Whether the model refuses a parameter that it can be asked without."""
        refused = error.code in ("unsupported_parameter", "unsupported_value")
        parameter = str(error.param)
        if not refused or parameter not in ("max_tokens", "temperature"):
            return False
        self.dropped.add(parameter)
        return True

    def _failure(self, error: BaseException) -> JudgeError:
        """One line: what failed, and what to do."""
        import openai

        refused = error if isinstance(error, AnswerRefusedError) else error.__cause__
        if isinstance(refused, AnswerRefusedError):
            error = refused
        message, remedy = _message(error), "run the same command again; what was judged is kept."
        if isinstance(error, AnswerRefusedError):
            remedy = "check OPENAI_BASE_URL."
        elif isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            remedy = "check OPENAI_API_KEY and OPENAI_BASE_URL."
        elif isinstance(error, openai.NotFoundError | openai.BadRequestError):
            remedy = "check --judge-model and OPENAI_BASE_URL."
        elif isinstance(error, TimeoutError | openai.APITimeoutError):
            message = f"no reply within {self.timeout_s:g} s"
        elif isinstance(error, openai.APIConnectionError):
            remedy = f"check OPENAI_BASE_URL, or {remedy}"
        return JudgeError(f"judge {self.model} at {self.url}: {message}; {remedy}")


def _reply(text: str | None, reason: str | None, usage: Any) -> Reply:
    from fedllm_flwr.evaluation.judging.retries import TruncatedError

    if reason is None:
        raise TruncatedError("a reply that breaks off")
    tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
    return Reply(text or "", reason, *tokens)


def _message(error: BaseException) -> str:
    """What the server says, on one line, shortened, printable and without the key."""
    status = getattr(error, "status_code", None)
    body: Any = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    text = " ".join(str(said or error or type(error).__name__).split())
    if key := os.environ.get("OPENAI_API_KEY"):
        text = text.replace(key, "[the key]")
    text = "".join(letter if letter.isprintable() else "?" for letter in text)[:200].rstrip(".")
    return f"HTTP {status}, {text}" if status and said else text
