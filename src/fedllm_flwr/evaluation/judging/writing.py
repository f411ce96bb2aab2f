"""Models that write answers: the one in this process, or the same base and adapter in vLLM."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedllm_flwr.data.records import Messages
from fedllm_flwr.data.tokens import TokenArray
from fedllm_flwr.errors import ConfigError

if TYPE_CHECKING:
    from fedllm_flwr.models.adapted_model import AdaptedModel


@dataclass(frozen=True)
class Request:
    """A conversation to answer, which ends with the user."""

    messages: Messages
    temperature: float
    seed: int


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""

    text: str
    num_tokens: int
    ended: bool  # by itself, not by the limit of new tokens
    prompt_cut: int  # tokens of the conversation's start that did not fit


class Encode(Protocol):
    """Conversations to tokens, in the prompt that the model was tuned with."""

    def __call__(self, conversations: Sequence[Messages]) -> list[TokenArray]:
        """One array of shape (length,) per conversation, whatever its length."""


class Writer(Protocol):
    """Something that answers conversations, several at a time."""

    @property
    def max_new_tokens(self) -> int:
        """Of one answer."""

    def write(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request."""


@dataclass(frozen=True)
class ModelWriter:
    """The model of this process, as it is: with its adapter, or with that disabled."""

    model: "AdaptedModel"
    encode: Encode
    max_new_tokens: int
    context: int  # tokens of prompt and answer together

    def write(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers to all requests in one batch."""
        from fedllm_flwr.data.encode import cut_start
        from fedllm_flwr.models.generation import Decoding, as_text, generate

        whole = self.encode([request.messages for request in requests])
        bos = self.model.tokenizer.bos_token_id
        prompts = [cut_start(p, self.context - self.max_new_tokens, bos) for p in whole]
        found = generate(
            self.model,
            prompts,
            Decoding(self.max_new_tokens),
            temperatures=[request.temperature for request in requests],
            seeds=[request.seed for request in requests],
        )
        eos = self.model.tokenizer.eos_token_id
        return [
            Answer(
                text=as_text(self.model, tokens),
                num_tokens=len(tokens),
                ended=bool(len(tokens) and tokens[-1] == eos),
                prompt_cut=len(before) - len(after),
            )
            for tokens, before, after in zip(found, whole, prompts, strict=True)
        ]


@dataclass
class VllmWriter:
    """vLLM's engine (extra ``vllm``) with the base model and, if given, a LoRA adapter directory.

    One engine serves all adapters of one base; `adapter` may be set anew between calls.
    """

    model_path: str
    encode: Encode
    max_new_tokens: int
    context: int
    bos: int | None
    max_lora_rank: int = 64
    adapter: Path | None = None
    _engine: Any = None
    _adapter_ids: dict[Path, int] = field(default_factory=dict)

    def write(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers to all requests; vLLM batches them by itself."""
        engine = self._started()
        from vllm import SamplingParams

        from fedllm_flwr.data.encode import cut_start

        whole = self.encode([request.messages for request in requests])
        prompts = [cut_start(p, self.context - self.max_new_tokens, self.bos) for p in whole]
        settings = [
            SamplingParams(
                temperature=request.temperature,
                seed=request.seed % 2**31,
                max_tokens=self.max_new_tokens,
            )
            for request in requests
        ]
        tokens = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        outputs = engine.generate(
            tokens, settings, lora_request=self._lora_request(), use_tqdm=False
        )
        found = [output.outputs[0] for output in outputs]
        return [
            Answer(
                text=str(answer.text).strip(),
                num_tokens=len(answer.token_ids),
                ended=answer.finish_reason == "stop",
                prompt_cut=len(before) - len(after),
            )
            for answer, before, after in zip(found, whole, prompts, strict=True)
        ]

    def _started(self) -> Any:
        require_vllm()
        if self._engine is None:
            from vllm import LLM

            self._engine = LLM(
                model=self.model_path,
                enable_lora=True,
                max_lora_rank=self.max_lora_rank,
                max_model_len=self.context,
                generation_config="vllm",  # sampling as asked for, not as the model's authors would
            )
        return self._engine

    def _lora_request(self) -> Any:
        if self.adapter is None:
            return None
        if not self.adapter.is_dir():
            raise ConfigError(
                f"--backend vllm: {self.adapter} is a checkpoint, and vLLM loads directories of "
                "PEFT's; leave the option out, or evaluate RUN/adapter or RUN/adapter-best."
            )
        from vllm.lora.request import LoRARequest

        number = self._adapter_ids.setdefault(self.adapter, len(self._adapter_ids) + 1)
        return LoRARequest(f"adapter-{number}", number, str(self.adapter))


def require_vllm() -> None:
    """Raise ConfigError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "--backend vllm: vLLM is not installed; pip install 'fedllm-flwr[vllm]' (Linux with a "
            "GPU), or leave the option out."
        )
