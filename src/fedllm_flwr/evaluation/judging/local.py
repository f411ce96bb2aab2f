"""A judge in this process: a chat model from a local directory."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedllm_flwr.data.encode import encode_prompts
from fedllm_flwr.data.records import Messages
from fedllm_flwr.data.tokens import TokenArray
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.evaluation.judging.judge import (
    DECLINED,
    MAX_TOKENS,
    Ask,
    Record,
    Reply,
    temperature,
)
from fedllm_flwr.evaluation.judging.writing import ModelWriter, Request
from fedllm_flwr.params import derive_seed

if TYPE_CHECKING:
    from fedllm_flwr.models.adapted_model import AdaptedModel


@dataclass
class LocalJudge:
    """A chat model by its directory, asked in its own chat template.

    It is loaded beside the model under evaluation; both must fit into memory.
    """

    directory: Path
    batch_size: int = 8
    max_tokens: int = MAX_TOKENS
    _loaded: "AdaptedModel | None" = None

    @property
    def name(self) -> str:
        """Its directory."""
        return f"local:{self.directory}"

    def check(self) -> None:
        """See that it is a model with a chat template, without loading its weights."""
        from fedllm_flwr.config.schema import ModelConfig
        from fedllm_flwr.models.tokenizer import load_tokenizer

        if not (self.directory / "config.json").is_file():
            raise ConfigError(
                f"--judge-model {self.directory}: no config.json in this directory; give that of a "
                "Hugging Face chat model."
            )
        tokenizer = load_tokenizer(ModelConfig(name="judge", path=str(self.directory)))
        if not tokenizer.chat_template:
            raise ConfigError(
                f"--judge-model {self.directory}: its tokenizer has no chat template, so it is no "
                "chat model; give one that is."
            )

    def ask(self, asks: Sequence[Ask], record: Record) -> None:
        """Ask batch by batch; a question that leaves no room for a reply is declined."""
        model = self._model()
        context = int(getattr(model.peft.get_base_model().config, "max_position_embeddings", 4096))
        room = min(self.max_tokens, context // 2)
        lengths: dict[str, int] = {}
        for ask in asks:
            lengths[ask.key] = self._num_tokens(model, ask.messages)
            if lengths[ask.key] > context - room:
                text = f"{lengths[ask.key]} tokens, {context - room} fit"
                record(ask, Reply(text, DECLINED))
        able = [ask for ask in asks if lengths[ask.key] <= context - room]
        able.sort(key=lambda ask: -lengths[ask.key])
        writer = ModelWriter(model, partial(_encode, model), room, context)
        for start in range(0, len(able), self.batch_size):
            batch = able[start : start + self.batch_size]
            with model.peft.disable_adapter():
                replies = writer.write([_request(ask) for ask in batch])
            for ask, reply in zip(batch, replies, strict=True):
                reason = "stop" if reply.ended else "length"
                record(ask, Reply(reply.text, reason, lengths[ask.key], reply.num_tokens))

    def _num_tokens(self, model: "AdaptedModel", messages: Messages) -> int:
        [tokens] = _encode(model, [messages])
        return len(tokens)

    def _model(self) -> "AdaptedModel":
        from fedllm_flwr.config import Config
        from fedllm_flwr.config.schema import ModelConfig
        from fedllm_flwr.models.adapted_model import load_beside

        if self._loaded is None:
            model = ModelConfig(name="judge", path=str(self.directory))
            self._loaded = load_beside(Config(model=model))
        return self._loaded


def _encode(model: "AdaptedModel", conversations: Sequence[Messages]) -> list[TokenArray]:
    return encode_prompts(conversations, model.tokenizer, "chat")


def _request(ask: Ask) -> Request:
    seed = derive_seed("judge", ask.key, ask.attempt)
    return Request(ask.messages, temperature(ask.attempt), seed)
