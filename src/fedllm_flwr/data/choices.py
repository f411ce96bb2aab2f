"""Label sets as answers, for scoring by likelihood."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fedllm_flwr.data.encode import cut_start
from fedllm_flwr.data.records import Messages
from fedllm_flwr.data.templates import Segment, Tokenizer, render
from fedllm_flwr.data.tokens import TokenArray, tokenise
from fedllm_flwr.errors import ConfigError

_PLACE = "\N{SYMBOL FOR UNIT SEPARATOR}"  # stands for the label while a conversation is rendered


@dataclass(frozen=True)
class EncodedChoices:
    """For each record, the prompt's tokens and the tokens of each label as the answer.

    The answers have no EOS, unless one label is a prefix of another.
    """

    prompts: list[TokenArray]  # each (prompt length,)
    answers: list[list[TokenArray]]  # [record][label], each (answer length,)

    def __len__(self) -> int:
        return len(self.prompts)


def encode_choices(
    conversations: Sequence[Messages],
    labels: Sequence[str],
    tokenizer: Tokenizer,
    template: str,
    max_length: int,
) -> EncodedChoices:
    """Tokens of each label as the last answer of each conversation.

    Prompt and label are tokenised together, with the same boundary rule as in training. A prompt is
    truncated at its start, after the BOS, so that it fits ``max_length`` with the longest label. If
    one label is a prefix of another (``no``, ``no effect``), all labels end with the EOS; otherwise
    the prefix would always win, as it is never less likely than the longer label.
    Raises ConfigError if there are no labels, or if one does not fit at all.
    """
    if not labels:
        raise ConfigError("data.labels is empty; list the labels to choose among")
    candidates = [
        candidate
        for messages in conversations
        for candidate in _candidates(messages, labels, tokenizer, template)
    ]
    split = []
    for tokens, supervised in tokenise(candidates, tokenizer):
        start = int(np.flatnonzero(~supervised)[-1]) + 1  # of the last answer
        split.append((tokens[:start], tokens[start:]))
    groups = [split[i : i + len(labels)] for i in range(0, len(split), len(labels))]
    prompts, answers = [], []
    for group in groups:
        answers.append([answer for _, answer in group])
        room = max_length - max(len(answer) for answer in answers[-1])
        if room < 1:
            raise ConfigError(
                f"training.max_length={max_length} leaves no room for a prompt before the longest "
                f"of data.labels; raise it"
            )
        prompts.append(cut_start(group[0][0], room, tokenizer.bos_token_id))
    return EncodedChoices(prompts, answers)


def one_begins_another(labels: Sequence[str]) -> bool:
    """Whether a label is a prefix of another label."""
    texts = sorted({label.strip() for label in labels})  # a prefix sorts right before the longer
    return any(after.startswith(before) for before, after in pairwise(texts))


def _candidates(
    messages: Messages, labels: Sequence[str], tokenizer: Tokenizer, template: str
) -> list[list[Segment]]:
    """The conversation with each label as its last answer, with or without the EOS."""
    marked = [*messages[:-1], {"role": "assistant", "content": _PLACE}]
    *prompt, answer = render(marked, template, tokenizer)
    before, _, after = answer.text.partition(_PLACE)
    end = after if one_begins_another(labels) else ""
    return [[*prompt, Segment(before + label + end, True)] for label in labels]
