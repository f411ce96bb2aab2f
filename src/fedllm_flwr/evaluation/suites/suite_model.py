"""A model under evaluation: prompts in its training template, likelihoods, and answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from fedllm_flwr.data.choices import one_begins_another
from fedllm_flwr.data.encode import cut_start
from fedllm_flwr.data.records import Messages
from fedllm_flwr.data.templates import Segment, render, render_prompt
from fedllm_flwr.data.tokens import TokenArray, tokenise
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.generation import Decoding, as_text, generate
from fedllm_flwr.models.scoring import Question, Score, score

_PLACE = "\N{SYMBOL FOR UNIT SEPARATOR}"


@dataclass
class TextModel:
    """A model with text input and output, using the adapter currently loaded in `adapted`.

    Args:
        adapted: base model with an adapter.
        prompt: ``trained``: the question in the training template; ``raw``: the bare text;
            ``chat``: the tokenizer's chat template, with few-shot examples as earlier turns.
        template: the training template: alpaca, vicuna or chat.
        batch_tokens: tokens per forward pass, including padding.
        source, adapter: directory or hub id of the base model, and directory of the adapter, for
            other programs that run the same model.
    """

    adapted: AdaptedModel
    prompt: str = "trained"
    template: str = "alpaca"
    batch_tokens: int = 4096
    seed: int = 0
    source: str = ""
    adapter: Path | None = None
    prompts: int = field(default=0, init=False)  # number of rendered prompts
    cut: int = field(default=0, init=False)  # number of prompts truncated at their start
    examples_left_out: int = field(default=0, init=False)  # number of few-shot examples removed

    @cached_property
    def max_length(self) -> int:
        """The model's maximum context, in tokens."""
        config: Any = self.adapted.peft.get_base_model().config
        longest = getattr(config, "max_position_embeddings", None)
        return int(longest or self.adapted.tokenizer.model_max_length)

    def answer_room(self, wanted: int) -> int:
        """Tokens reserved for an answer: `wanted`, but at most half of the context."""
        return min(wanted, self.max_length // 2)

    def render(self, messages: Messages) -> str:
        """The prompt text of a conversation that ends with the user's turn.

        Without a multi-turn template (``trained`` with alpaca or vicuna, and ``raw``), earlier
        turns become few-shot examples in one text, formatted like the harness'.
        """
        turns = list(messages)
        if self._template == "chat":
            return render_prompt(turns, "chat", self.adapted.tokenizer)
        text = _joined(turns)
        if self.prompt == "raw":
            return text
        one = [{"role": "user", "content": text}]
        return render_prompt(one, self.template, self.adapted.tokenizer)

    def render_fitting(self, messages: Messages, room: int) -> str:
        """`render`, removing the first few-shot examples until the prompt fits.

        Args:
            messages: [system,] pairs of user and assistant, and the user.
            room: tokens reserved for the answer.
        """
        self.prompts += 1
        system = [turn for turn in messages[:1] if turn["role"] == "system"]
        rest = list(messages[len(system) :])
        overhead = self._num_tokens(self.render([{"role": "user", "content": "x"}]))
        longest = self.max_length - room - overhead
        lengths = [self._num_tokens(turn["content"]) + 2 for turn in rest]
        total = sum(lengths) + sum(self._num_tokens(turn["content"]) for turn in system)
        while total > longest and len(rest) > 2:
            total -= sum(lengths[:2])
            rest, lengths = rest[2:], lengths[2:]
            self.examples_left_out += 1
        return self.render([*system, *rest])

    def log_likelihoods(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[list[Score]]:
        """Scores of the possible answers to each prompt, [prompt][answer].

        Prompt and answer are tokenised together, with the same boundary as in training. A prompt
        that is too long is truncated at its start. If one answer is a prefix of another, the EOS
        is scored, too, as in `data.choices`.
        """
        pairs = [
            [Segment(prompt, False), Segment(self._spaced(prompt, answer) + end, True)]
            for prompt, some in zip(prompts, answers, strict=True)
            for end in [self._around_answer[1] if one_begins_another(some) else ""]
            for answer in some
        ]
        encoded = iter(tokenise(pairs, self.adapted.tokenizer))
        questions = []
        for some in answers:
            split = [_split(*next(encoded)) for _ in some]
            room = self.max_length - max(len(answer) for _, answer in split)
            prompt = self.fitting(split[0][0], room)
            questions.append(Question(prompt, [answer for _, answer in split]))
        return score(self.adapted, questions, self.batch_tokens)

    def generate(self, prompts: Sequence[str], decoding: Decoding, strip: bool = True) -> list[str]:
        """One answer to each prompt made by `render`, stripped of white space.

        With `strip` False, code keeps its indentation. A prompt that leaves no room for the answer
        is truncated at its start.
        """
        rows = [[Segment(prompt, False)] for prompt in prompts]
        new_tokens = self.answer_room(decoding.max_new_tokens)
        decoding = replace(decoding, max_new_tokens=new_tokens, seed=self.seed)
        room = self.max_length - new_tokens
        tokens = [self.fitting(row, room) for row, _ in tokenise(rows, self.adapted.tokenizer)]
        answers = generate(self.adapted, tokens, decoding, self.batch_tokens)
        return [as_text(self.adapted, answer, decoding.stop, strip) for answer in answers]

    @property
    def _template(self) -> str:
        """The template of the turns; raw text has none."""
        return {"trained": self.template, "chat": "chat"}.get(self.prompt, "raw")

    @cached_property
    def _around_answer(self) -> tuple[str, str]:
        """The white space between prompt and answer, and the text from the answer's end to EOS."""
        if self._template == "raw":
            return " ", self.adapted.tokenizer.eos_token
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PLACE}]
        *_, answer = render(turns, self._template, self.adapted.tokenizer)
        before, _, after = answer.text.partition(_PLACE)
        return before, after

    @cached_property
    def _num_tokens(self) -> Any:
        @lru_cache(maxsize=100_000)
        def count(text: str) -> int:
            return len(self.adapted.tokenizer(text, add_special_tokens=False)["input_ids"])

        return count

    def _spaced(self, prompt: str, answer: str) -> str:
        """The answer with its leading white space, unless prompt or answer already has some."""
        apart = prompt[-1:].isspace() or answer[:1].isspace()
        return (
            answer
            if apart and self._template == "raw"
            else self._around_answer[0] + answer.lstrip()
        )

    def fitting(self, tokens: TokenArray, room: int) -> TokenArray:
        """The prompt, truncated at its start to fit; truncations are counted."""
        self.cut += len(tokens) > room
        return cut_start(tokens, max(1, room), self.adapted.tokenizer.bos_token_id)


def _joined(turns: Messages) -> str:
    """The description, few-shot examples and question as one text."""
    parts = []
    for turn in turns:
        content = turn["content"]
        if turn["role"] == "user":
            parts.append(content)
        elif turn["role"] == "assistant":
            gap = "" if parts[-1][-1:].isspace() else " "
            parts.append(f"{gap}{content}\n\n")
        else:
            parts.append(content if content[-1:].isspace() else f"{content}\n\n")
    return "".join(parts)


def _split(tokens: TokenArray, supervised: Any) -> tuple[TokenArray, TokenArray]:
    """The prompt and the answer of a tokenised pair."""
    start = int((~supervised).sum())
    return tokens[:start], tokens[start:]
