"""The model's own answers to held-out prompts: how long they are, and what they say."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.config import Config
from fedllm_flwr.data.encode import encode_prompts
from fedllm_flwr.data.tokens import TokenArray
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.generation import Decoding, as_text, generate
from fedllm_flwr.params import Params


@dataclass(frozen=True)
class Prompts:
    """Held-out prompts that the model answers freely, and the better answers in the data."""

    texts: list[str]  # the last turn of each
    tokens: list[TokenArray]
    chosen: list[str]
    decoding: Decoding

    @classmethod
    def none(cls) -> "Prompts":
        """No prompts."""
        return cls([], [], [], Decoding(0))

    @classmethod
    def of(
        cls, config: Config, model: AdaptedModel, records: Any, rows: NDArray[np.int64], column: str
    ) -> "Prompts":
        """The prompts of the first ``evaluation.answers`` of `rows`, cut to leave room to answer.

        Args:
            records: a data set with the column messages.
            rows: indices of the records that may be asked.
            column: of `records`, that holds the better answers.
        """
        room = config.evaluation.max_new_tokens
        wanted = rows[: config.evaluation.answers].tolist()
        every = records["messages"]
        messages = [every[i] for i in wanted]
        longest = max(1, config.training.max_length - room)
        tokens = encode_prompts(messages, model.tokenizer, config.data.template, longest)
        better = records[column]
        texts = [turns[-1]["content"] for turns in messages]
        return cls(texts, tokens, [better[i] for i in wanted], Decoding(room))

    def mean_tokens(self, model: AdaptedModel) -> float:
        """Mean length of the greedy answers of the model as it is."""
        answers = generate(model, self.tokens, self.decoding)
        return float(np.mean([len(answer) for answer in answers]))

    def side_by_side(
        self, model: AdaptedModel, params: Params, label: str = "with the adapter"
    ) -> str:
        """Markdown with the prompts and their answers: base model's, adapter's, the data's.

        Args:
            label: what the adapter `params` is called there.
        """
        if not self.tokens:
            return ""
        model.load(params)
        with model.peft.disable_adapter():
            base = generate(model, self.tokens, self.decoding)
        adapted = generate(model, self.tokens, self.decoding)
        sections = ["# Answers to held-out prompts"]
        for prompt, before, after, chosen in zip(
            self.texts, base, adapted, self.chosen, strict=True
        ):
            answers = {
                "base model": as_text(model, before),
                label: as_text(model, after),
                "the better answer in the data": chosen,
            }
            parts = [f"**{name}**\n\n{_quoted(text)}" for name, text in answers.items()]
            sections.append("\n\n".join([f"## Prompt\n\n{_quoted(prompt)}", *parts]))
        return "\n\n".join(sections) + "\n"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])
