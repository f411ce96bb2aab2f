"""Generated answers to held-out prompts: their mean length, and a side-by-side comparison."""

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
    """Held-out prompts for generation, and the preferred answers in the data."""

    texts: list[str]  # the last turn of each prompt
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
        """The first ``evaluation.answers`` prompts, truncated to leave room for an answer.

        Args:
            records: a data set with the column messages.
            rows: indices of the records to choose from.
            column: column of `records` with the preferred answers.
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
        """Mean length of greedy answers of the model with its current adapter."""
        answers = generate(model, self.tokens, self.decoding)
        return float(np.mean([len(answer) for answer in answers]))

    def side_by_side(
        self, model: AdaptedModel, params: Params, label: str = "with the adapter"
    ) -> str:
        """Markdown with the prompts and the answers of base model, adapter and data.

        Args:
            label: name of the adapter `params` in the text.
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
