"""Answers to a set of questions, turn by turn, saved on disk as they are generated."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm_flwr.data.records import Messages
from fedllm_flwr.data.templates import Segment, render_prompt
from fedllm_flwr.data.tokens import TokenArray, tokenise
from fedllm_flwr.errors import JudgeError
from fedllm_flwr.evaluation.judging.endpoint import Endpoint, OnProgress
from fedllm_flwr.evaluation.judging.json_lines import json_lines
from fedllm_flwr.evaluation.judging.questions import OpenQuestion
from fedllm_flwr.params import derive_seed

if TYPE_CHECKING:
    from fedllm_flwr.evaluation.suites.suite_model import TextModel


@dataclass(frozen=True)
class GenerationRequest:
    """A conversation to answer; its last turn is the user's."""

    messages: Messages
    temperature: float
    seed: int


@dataclass(frozen=True)
class WrittenAnswer:
    """A generated answer."""

    text: str
    num_tokens: int
    ended: bool  # by EOS, not by the limit of new tokens
    prompt_cut: int = 0  # tokens removed from the conversation's start


@dataclass(frozen=True)
class Writer:
    """The model under evaluation, and how it generates answers.

    Answers have at most half of the model's context, and prompts the other half.

    Args:
        endpoint: serves text completions of the same base model, named by its path or hub id, and
            of the adapter, named by its directory. None: generate in this process.
    """

    model: "TextModel"
    max_new_tokens: int
    endpoint: Endpoint | None = None

    @property
    def room(self) -> int:
        """Maximum number of tokens of an answer."""
        return self.model.answer_room(self.max_new_tokens)

    def write(self, requests: Sequence[GenerationRequest]) -> list[WrittenAnswer]:
        """One answer per request, generated as one batch."""
        texts = [[Segment(render(self.model, item.messages), False)] for item in requests]
        whole = [tokens for tokens, _ in tokenise(texts, self.model.adapted.tokenizer)]
        longest = self.model.max_length - self.room
        prompts = [self.model.fitting(prompt, longest) for prompt in whole]
        if self.endpoint is None:
            written = self._generated(prompts, requests)
        else:
            written = self._served(prompts, requests, self.endpoint)
        return [
            WrittenAnswer(*answer, prompt_cut=len(before) - len(after))
            for answer, before, after in zip(written, whole, prompts, strict=True)
        ]

    def _generated(
        self, prompts: Sequence[TokenArray], requests: Sequence[GenerationRequest]
    ) -> list[tuple[str, int, bool]]:
        """Text, number of tokens, and whether it ended by EOS."""
        from fedllm_flwr.models.generation import Decoding, as_text, generate

        adapted = self.model.adapted
        found = generate(
            adapted,
            prompts,
            Decoding(self.room),
            temperatures=[request.temperature for request in requests],
            seeds=[request.seed for request in requests],
        )
        eos = adapted.tokenizer.eos_token_id
        return [
            (as_text(adapted, tokens), len(tokens), bool(len(tokens) and tokens[-1] == eos))
            for tokens in found
        ]

    def _served(
        self,
        prompts: Sequence[TokenArray],
        requests: Sequence[GenerationRequest],
        endpoint: Endpoint,
    ) -> list[tuple[str, int, bool]]:
        name, tokenizer = str(self.model.adapter or self.model.source), self.model.adapted.tokenizer
        answers: dict[int, tuple[str, int, bool]] = {}

        async def complete(client: Any, row: int) -> None:
            import openai

            try:
                done = await client.completions.create(
                    model=name,
                    prompt=tokenizer.decode(prompts[row], skip_special_tokens=True),
                    max_tokens=self.room,
                    temperature=requests[row].temperature,
                    seed=requests[row].seed % 2**31,
                )
            except openai.OpenAIError as error:
                raise endpoint.failure(error) from error
            if not getattr(done, "choices", None):
                raise JudgeError(f"{endpoint.shown_url}: its reply has no choices.")
            [choice, *_] = done.choices
            text = str(choice.text).strip()
            counted = done.usage.completion_tokens if done.usage else len(tokenizer(text).input_ids)
            answers[row] = (text, int(counted), choice.finish_reason == "stop")

        endpoint.each(range(len(requests)), complete)
        return [answers[row] for row in range(len(requests))]


def render(model: "TextModel", messages: Messages) -> str:
    """Render a conversation that ends with the user's turn, in the format of training."""
    if model.prompt == "raw":
        return "\n\n".join(turn["content"] for turn in messages)
    template = "chat" if model.prompt == "chat" else model.template
    return render_prompt(messages, template, model.adapted.tokenizer)


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question, and an answer to each of its turns."""

    question: OpenQuestion
    answers: tuple[WrittenAnswer, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of the answers."""
        return tuple(answer.text for answer in self.answers)


def answer_all(
    questions: Sequence[OpenQuestion],
    writer: Writer,
    path: Path,
    identity: object,
    seed: int,
    batch_size: int,
    progress: OnProgress = lambda done, total: None,
) -> list[AnsweredQuestion]:
    """Answers to all questions; answers in the file at `path` are reused.

    Batches do not depend on earlier calls, so a resumed call gives the same answers as an
    uninterrupted one.

    Args:
        identity: identifies the model, its prompt and its limits; only answers with the same
            identity are reused.
        seed: seed of sampled answers; each question and turn has its own sequence.
    """
    keys = {}
    for question in questions:
        what = [question.id, question.turns, question.temperature, identity, seed]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        keys[question.id] = digest[:20]
    by_length = sorted(questions, key=lambda question: -len(question.turns[0]))
    with json_lines(path) as file:
        done = {record["key"]: record["answers"] for record in file.records}
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            if any(keys[question.id] not in done for question in batch):
                written = _write(batch, writer, seed)
                fresh = [
                    {
                        "key": keys[question.id],
                        "id": question.id,
                        "category": question.category,
                        "turns": question.turns,
                        "answers": [asdict(answer) for answer in written[question.id]],
                    }
                    for question in batch
                    if keys[question.id] not in done
                ]
                file.append(fresh)
                done |= {record["key"]: record["answers"] for record in fresh}
            progress(sum(key in done for key in keys.values()), len(keys))
    return [
        AnsweredQuestion(
            question, tuple(WrittenAnswer(**answer) for answer in done[keys[question.id]])
        )
        for question in questions
    ]


def _write(
    batch: Sequence[OpenQuestion], writer: Writer, seed: int
) -> dict[str, list[WrittenAnswer]]:
    """Answers to all turns of a batch; questions with fewer turns leave it earlier."""
    answers: dict[str, list[WrittenAnswer]] = {question.id: [] for question in batch}
    for turn in range(max(len(question.turns) for question in batch)):
        asked = [question for question in batch if turn < len(question.turns)]
        requests = []
        for question in asked:
            messages: Messages = []
            for text, answer in zip(question.turns, answers[question.id], strict=False):
                messages.append({"role": "user", "content": text})
                messages.append({"role": "assistant", "content": answer.text})
            messages.append({"role": "user", "content": question.turns[turn]})
            own_seed = derive_seed(seed, "answer", question.id, turn)
            requests.append(GenerationRequest(messages, question.temperature, own_seed))
        for question, answer in zip(asked, writer.write(requests), strict=True):
            answers[question.id].append(answer)
    return answers
