"""The model under evaluation as a writer, in the prompt that it is evaluated with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedllm_flwr.data.records import Messages
from fedllm_flwr.data.templates import Segment, render_prompt
from fedllm_flwr.data.tokens import TokenArray, tokenise
from fedllm_flwr.evaluation.judging.writing import ModelWriter, VllmWriter, Writer

if TYPE_CHECKING:
    from fedllm_flwr.evaluation.suites.suite_model import TextModel


def render(model: "TextModel", messages: Messages) -> str:
    """A conversation that ends with the user, turn by turn as in training."""
    if model.prompt == "raw":
        return "\n\n".join(turn["content"] for turn in messages)
    template = "chat" if model.prompt == "chat" else model.template
    return render_prompt(messages, template, model.adapted.tokenizer)


def writer_for(
    model: "TextModel", backend: str, max_new_tokens: int, engines: dict[str, Any]
) -> Writer:
    """A writer with the adapter that is in the model now.

    Answers take at most half of the model's context, so that prompts keep the other half.

    Args:
        engines: vLLM's, by base model; a new one is put there.
    """
    room = model.answer_room(max_new_tokens)

    def encode(conversations: Sequence[Messages]) -> list[TokenArray]:
        segments = [[Segment(render(model, turns), False)] for turns in conversations]
        return [tokens for tokens, _ in tokenise(segments, model.adapted.tokenizer)]

    if backend == "torch":
        return ModelWriter(model.adapted, encode, room, model.max_length)
    if model.source not in engines:
        bos = model.adapted.tokenizer.bos_token_id
        engines[model.source] = VllmWriter(model.source, encode, room, model.max_length, bos)
    writer: VllmWriter = engines[model.source]
    writer.encode, writer.adapter = encode, model.adapter
    return writer
