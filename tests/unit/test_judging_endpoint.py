"""The judge behind an endpoint, against a real server on the loopback that misbehaves."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError, FedLLMError, JudgeError
from fedllm_flwr.evaluation.judging.endpoint import (
    BROKEN,
    DECLINED,
    RETRIES,
    Completion,
    EndpointJudge,
)
from fedllm_flwr.evaluation.judging.verdicts import Case, Scale, judge_all
from judge_server import JudgeServer, judge_server, verdict

client = pytest.importorskip("openai._base_client")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(client, "MAX_RETRY_DELAY", 0.05)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    with judge_server(hang_s=1.0) as running:
        monkeypatch.setenv("OPENAI_BASE_URL", running.url)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        yield running


def conversation(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Rate answer {number}"}]


def cases(count: int) -> list[Case]:
    return [Case(Scale.RATING, conversation(number)) for number in range(count)]


def expected(number: int) -> float:
    return float(verdict(conversation(number)).partition("[[")[2].removesuffix("]]"))


def judge(**options: Any) -> EndpointJudge:
    return EndpointJudge(model="judge-1", **{"timeout_s": 30.0, **options})


def ask_one(asked: EndpointJudge) -> Completion:
    [reply] = ask_all(asked, [1])
    return reply


def ask_all(asked: EndpointJudge, numbers: Iterable[int]) -> list[Completion]:
    replies: list[Completion] = []

    async def ask(client: Any, number: int) -> None:
        replies.append(await asked.reply(client, conversation(number), 0.0))

    asked.each(numbers, ask)
    return replies


PASSING: list[Any] = [
    *(429, 500, 502, 503, 408, (429, {"Retry-After": "0"}), (429, {"retry-after-ms": "20"})),
    "reset",
]


@pytest.mark.parametrize("stream", [False, True])
def test_each_passing_fault_is_tried_again(stream: bool, server: JudgeServer) -> None:
    """All of them in one queue of cases, one request at a time."""
    server.faults = [item for fault in PASSING for item in (fault, None)]
    asked = judge(concurrency=1, stream=stream)
    numbers = range(len(PASSING))
    replies = ask_all(asked, numbers)
    assert [reply.text for reply in replies] == [verdict(conversation(i)) for i in numbers]
    assert all(reply.finish_reason == "stop" and reply.prompt_tokens for reply in replies)
    assert len(server.requests) == 2 * len(PASSING)
    assert set(server.completed.values()) == {1}


@pytest.mark.parametrize("stream", [False, True])
def test_replies_that_break_off_have_no_verdict_and_are_asked_for_again(
    stream: bool, server: JudgeServer, tmp_path: Path
) -> None:
    server.faults = ["garbage", "empty", *(["truncated"] if stream else [])]
    broken = len(server.faults)
    asked = judge(concurrency=1, stream=stream)
    path = tmp_path / "v.jsonl"
    verdicts, usage = judge_all(cases(1), asked, path, attempts=broken + 1)
    assert verdicts == [expected(0)]
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["finish_reason"] for entry in entries] == [BROKEN] * broken + ["stop"]
    assert (usage["replies"], usage["uncounted"]) == (broken + 1, broken)


def test_a_silent_server_is_asked_again(server: JudgeServer) -> None:
    server.faults = ["timeout"]
    assert ask_one(judge(timeout_s=0.5)).text == verdict(conversation(1))
    assert len(server.requests) == 2


def test_a_server_that_drips_is_given_up(server: JudgeServer) -> None:
    """Each byte comes in time, and the answer does not."""
    server.faults = ["drip"]
    server.hang_s = 0.2  # between two bytes
    assert ask_one(judge(timeout_s=0.7)).text == verdict(conversation(1))
    assert len(server.requests) == 2


def test_retry_after_is_waited_for(server: JudgeServer) -> None:
    server.faults = [(429, {"Retry-After": "0.9"})]
    ask_one(judge())
    first, second = server.times
    assert 0.85 <= second - first < 3


FATAL = [
    ((400, {}), "HTTP 400, fault 400; check --judge-model"),
    ((429, {"Retry-After": "4000"}), "HTTP 429"),
    ((403, {}), "check OPENAI_API_KEY"),
    ((404, {}), "check --judge-model and OPENAI_BASE_URL"),
]


@pytest.mark.parametrize(("fault", "message"), FATAL)
def test_what_will_not_pass_ends_at_once(fault: Any, message: str, server: JudgeServer) -> None:
    server.faults = [fault]
    with pytest.raises(JudgeError, match=message) as raised:
        ask_one(judge())
    assert len(server.requests) == 1
    assert "\n" not in str(raised.value)


def test_gives_up_in_the_end(server: JudgeServer) -> None:
    server.faults = [500] * 20
    with pytest.raises(JudgeError, match="HTTP 500, fault 500; run the same command again"):
        ask_one(judge())
    assert len(server.requests) == 1 + RETRIES


def test_wrong_key_and_unknown_model_are_seen_before_any_question(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge().check()
    with pytest.raises(ConfigError, match=r"--judge-model judge-2: .* Did you mean 'judge-1'"):
        EndpointJudge(model="judge-2").check()
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(JudgeError, match=r"HTTP 401, Incorrect API key.*check OPENAI_API_KEY"):
        judge().check()
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL")
    with pytest.raises(ConfigError, match="set OPENAI_API_KEY, or OPENAI_BASE_URL"):
        judge().check()
    assert server.requests == []


def test_an_endpoint_without_a_list_of_models(server: JudgeServer) -> None:
    server.models = None
    judge().check()


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:password@127.0.0.1:9/v1")
    with pytest.raises(
        JudgeError, match=r"judge judge-1 at http://127.0.0.1:9/v1: Connection"
    ) as e:
        judge().check()
    assert "password" not in str(e.value)


def test_newer_models_are_asked_in_their_own_words(server: JudgeServer) -> None:
    server.faults = [
        (400, {"code": "unsupported_parameter", "param": "max_tokens"}),
        (400, {"code": "unsupported_value", "param": "temperature"}),
    ]
    asked = judge()
    assert ask_one(asked).finish_reason == "stop"
    first, _, last = server.requests
    assert {"max_tokens", "temperature"} <= set(first)
    assert not {"max_tokens", "temperature"} & set(last)
    assert last["max_completion_tokens"] == first["max_tokens"]
    ask_one(asked)
    assert len(server.requests) == 4  # it remembers


def test_a_question_that_the_judge_declines(server: JudgeServer, tmp_path: Path) -> None:
    server.faults = [None, (400, {"code": "content_filter"})]
    verdicts, usage = judge_all(cases(3), judge(concurrency=1), tmp_path / "v.jsonl", attempts=3)
    assert verdicts == [expected(0), None, expected(2)]
    assert (usage["declined"], usage["replies"]) == (1, 3)


def test_verdicts_are_asked_for_again_a_few_times(server: JudgeServer, tmp_path: Path) -> None:
    server.faults = ["malformed", "malformed", None, "malformed"]
    path = tmp_path / "v.jsonl"
    verdicts, usage = judge_all(cases(2), judge(concurrency=1), path, attempts=2)
    # case 0: malformed, malformed; case 1: fine
    assert verdicts == [None, expected(1)]
    assert [request["temperature"] for request in server.requests] == [0.0, 0.7, 0.0]
    assert usage["replies"] == 3
    # Three attempts now: one more, and the last reply has no verdict either.
    verdicts, usage = judge_all(cases(2), judge(concurrency=1), path, attempts=3)
    assert verdicts == [None, expected(1)]
    assert len(server.requests) == usage["replies"] == 4
    judge_all(cases(2), judge(), path, attempts=3)
    assert len(server.requests) == 4


def test_the_same_question_is_asked_once(server: JudgeServer, tmp_path: Path) -> None:
    verdicts, _ = judge_all(cases(2) * 3, judge(), tmp_path / "v.jsonl", attempts=1)
    assert verdicts == [expected(0), expected(1)] * 3
    assert len(server.requests) == 2
    judge_all(cases(2), EndpointJudge(model="judge-1"), tmp_path / "v.jsonl", attempts=1)
    assert len(server.requests) == 2
    server.models = ("judge-1", "judge-2")
    judge_all(cases(2), EndpointJudge(model="judge-2"), tmp_path / "v.jsonl", attempts=1)
    assert len(server.requests) == 4  # another judge's verdicts are its own


def test_tokens_and_cost(server: JudgeServer, tmp_path: Path) -> None:
    server.faults = ["usage"]
    _, usage = judge_all(cases(4), judge(concurrency=1), tmp_path / "v.jsonl", attempts=1)
    prompts = sum(len(conversation(i)[0]["content"]) for i in (1, 2, 3))
    replies = sum(len(verdict(conversation(i))) for i in (1, 2, 3))
    counts = {"replies": 4, "prompt_tokens": prompts, "completion_tokens": replies}
    assert usage == {**counts, "uncounted": 1, "declined": 0}


def test_no_more_at_once_than_allowed(server: JudgeServer, tmp_path: Path) -> None:
    server.delay_s = 0.05
    judge_all(cases(12), judge(concurrency=3, timeout_s=60), tmp_path / "v.jsonl", attempts=1)
    assert server.busiest == 3


def test_what_is_under_way_at_a_fatal_error_is_kept(server: JudgeServer, tmp_path: Path) -> None:
    """The second request fails for good while the first and third are being answered."""
    server.faults = [None, (403, {})]
    server.delay_s = 0.1
    path = tmp_path / "v.jsonl"
    asked = judge(concurrency=3, timeout_s=60)
    with pytest.raises(FedLLMError, match="HTTP 403"):
        judge_all(cases(9), asked, path, attempts=1)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(kept) == sum(server.completed.values()) >= 1
    assert len(server.requests) < 9
    verdicts, _ = judge_all(cases(9), asked, path, attempts=1)
    assert verdicts == [expected(i) for i in range(9)]
    assert set(server.completed.values()) == {1}


def test_declined_is_no_verdict_even_if_it_looks_like_one(
    server: JudgeServer, tmp_path: Path
) -> None:
    class Strict(EndpointJudge):
        async def reply(self, *asked: Any) -> Completion:
            return Completion("too long: [[9]]", DECLINED)

    asked = Strict(model="judge-1")
    verdicts, usage = judge_all(cases(1), asked, tmp_path / "v.jsonl", attempts=3)
    assert (verdicts, usage["declined"]) == ([None], 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_redirect_is_not_followed(stream: bool, server: JudgeServer) -> None:
    """Neither the questions nor the key reach a host that nobody has named."""
    with judge_server() as other:
        server.elsewhere = f"{other.url}/chat/completions"
        server.faults = ["redirect"] * 9
        with pytest.raises(JudgeError, match=r"HTTP 307, it redirects to 127\.0\.0\.1:\d+; check"):
            ask_one(judge(stream=stream))
        assert other.requests == []
    assert len(server.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "message"),
    [("endless", "longer than 8388608 bytes"), ("bomb", r"an encoding \(gzip\)")],
)
def test_an_answer_has_a_bounded_length(
    fault: str, message: str, stream: bool, server: JudgeServer
) -> None:
    server.faults = [fault] * 20
    with pytest.raises(JudgeError, match=message):
        ask_one(judge(stream=stream))
    assert len(server.requests) <= 1 + RETRIES


def test_neither_the_key_nor_colours_are_printed(server: JudgeServer) -> None:
    server.faults = ["echo"]
    with pytest.raises(JudgeError) as caught:
        ask_one(judge())
    assert "such key: Bearer [the key]" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_names_of_models_are_printed_without_colours(server: JudgeServer) -> None:
    server.models = ["\x1b[31mred", "x" * 10_000]
    with pytest.raises(ConfigError) as caught:
        judge().check()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_password_in_the_address_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "https://me:pass@judge.org/v1?api-key=hidden#x")
    assert judge().shown_url == "https://judge.org/v1"
