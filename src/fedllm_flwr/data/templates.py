"""Renders chat messages as text, in segments that are supervised or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from fedllm_flwr.data.records import Message
from fedllm_flwr.data.special import marked, marked_text
from fedllm_flwr.errors import DataError, ModelError
from fedllm_flwr.plugins import TEMPLATES


class Tokenizer(Protocol):
    """The part of transformers' fast-tokenizer interface that this package uses."""

    is_fast: Any
    chat_template: Any
    bos_token: Any
    bos_token_id: Any
    eos_token: Any
    eos_token_id: Any
    backend_tokenizer: Any

    def __call__(self, text: Any, **options: Any) -> Any:
        """Tokenise a text or a list of texts."""

    def get_vocab(self) -> dict[str, int]:
        """Ids by token."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render messages with the tokenizer's own template."""


class Segment(NamedTuple):
    """A span of rendered text; ``supervised`` text contributes to the loss."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class TextTemplate:
    """A plain-text template: a preamble, then a prompt and an answer per exchange."""

    preamble: str  # a system message replaces it
    first_prompt: str  # "{}" stands for the user's message
    next_prompt: str

    def prompt(self, content: str, first: bool) -> str:
        """One user turn, up to the start of the answer."""
        before, after = (self.first_prompt if first else self.next_prompt).split("{}")
        return before + content + after


# Texts of OpenFedLLM (arXiv 2402.06954); vicuna repeats turns as FastChat does.
ALPACA = TextTemplate(
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
    "\n\n### Instruction:\n{} \n\n### Response:",
    "\n\n### Instruction:\n{} \n\n### Response:",
)
VICUNA = TextTemplate(
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    " USER: {} ASSISTANT:",
    "USER: {} ASSISTANT:",
)
CHAT = None  # the tokenizer's own template


def render(messages: Sequence[Message], template: str, tokenizer: Tokenizer) -> list[Segment]:
    """The text of a conversation, in segments; every answer, with its EOS, is supervised.

    ``messages`` are [system,] user, assistant, ... and end with the assistant. A prompt never ends
    in a space: as in the tokenizers' tokens, the space belongs to the answer that follows it.
    Special tokens that are written out in a message are marked, see ``data.special``.
    Raises ConfigError for an unknown template, ModelError if the tokenizer cannot render.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError("a conversation to train on must end with an assistant turn")
    messages = marked(messages, tokenizer)
    _require_eos_text(tokenizer)
    if template == "chat":
        return _space_to_answers(_render_chat(messages, tokenizer))
    return _render_text(messages, _text_template(template), tokenizer.eos_token)


def render_answers(
    messages: Sequence[Message], answers: Sequence[str], template: str, tokenizer: Tokenizer
) -> list[list[Segment]]:
    """The text of each answer to one prompt: segments [prompt, answer with its EOS].

    The prompt is the same for all answers and is not supervised, even if it contains answers;
    ``messages`` end with the user. Raises as ``render``.
    """
    _require_eos_text(tokenizer)
    messages = marked(messages, tokenizer)
    answers = [marked_text(answer, tokenizer) for answer in answers]
    if template != "chat":
        prompt = render_prompt(messages, template, tokenizer)
        end = tokenizer.eos_token
        return [[Segment(prompt, False), Segment(f" {text}{end}", True)] for text in answers]
    prompt = _apply(tokenizer, messages, add_generation_prompt=True)
    rendered = []
    for text in answers:
        turn: Message = {"role": "assistant", "content": text}
        answer = _added_answer(tokenizer, [*messages, turn], prompt)
        ended = _end_answer(answer, tokenizer.eos_token, last=True)
        rendered.append(_space_to_answers([Segment(prompt, False), *ended]))
    return rendered


def render_prompt(messages: Sequence[Message], template: str, tokenizer: Tokenizer) -> str:
    """The text before the answer to the last user message, without trailing spaces.

    If an answer follows in a conversation, this is exactly the text before that answer in
    ``render``; generation starts from it. ``messages`` end with the user.
    """
    if not messages or messages[-1]["role"] != "user":
        raise DataError("a prompt must end with a user turn")
    messages = marked(messages, tokenizer)
    if template == "chat":
        return _apply(tokenizer, messages, add_generation_prompt=True).rstrip(" ")
    empty: Message = {"role": "assistant", "content": ""}
    segments = render([*messages, empty], template, tokenizer)
    return "".join(segment.text for segment in segments[:-1])


def text_layout(template: str) -> tuple[str, str] | None:
    """Prompt and answer of one exchange, as ``render`` formats ``{instruction}`` and ``{answer}``,
    without the EOS; None for the tokenizer's own template.
    """
    if template == "chat":
        return None
    turns = [
        {"role": "user", "content": "{instruction}"},
        {"role": "assistant", "content": "{answer}"},
    ]
    prompt, answer = _render_text(turns, _text_template(template), eos="")
    return prompt.text, answer.text


def _text_template(name: str) -> TextTemplate:
    template: TextTemplate = TEMPLATES.find(name)
    return template


def _render_text(messages: Sequence[Message], template: TextTemplate, eos: str) -> list[Segment]:
    segments: list[Segment] = []
    preamble = template.preamble
    for message in messages:
        content = message["content"]
        if message["role"] == "system":
            preamble = content
        elif message["role"] == "user":
            prompt = template.prompt(content, first=not segments)
            segments.append(Segment(prompt if segments else preamble + prompt, False))
        else:
            segments.append(Segment(f" {content}{eos}", True))
    return segments


def _render_chat(messages: Sequence[Message], tokenizer: Tokenizer) -> list[Segment]:
    """Segments from rendered prefixes: an answer is the text that its turn adds to the prompt."""
    segments: list[Segment] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply(tokenizer, messages[:i], add_generation_prompt=True)
        answer = _added_answer(tokenizer, messages[: i + 1], prompt)
        if not prompt.startswith(done):
            raise _not_extended(i + 1)
        segments.append(Segment(prompt[len(done) :], False))
        segments += _end_answer(answer, tokenizer.eos_token, last=i == len(messages) - 1)
        done = prompt + answer
    return segments


def _added_answer(tokenizer: Tokenizer, messages: Sequence[Message], prompt: str) -> str:
    """The text that the last message, an answer, adds to the prompt."""
    through = _apply(tokenizer, messages, add_generation_prompt=False)
    if not through.startswith(prompt):
        raise _not_extended(len(messages))
    return through[len(prompt) :]


def _not_extended(turn: int) -> ModelError:
    return ModelError(
        f"the tokenizer's chat template does not extend its own prompt (turn {turn}), so "
        f"answers cannot be told from prompts; set data.template=alpaca or vicuna"
    )


def _require_eos_text(tokenizer: Tokenizer) -> None:
    if tokenizer.eos_token is None:
        raise ModelError(
            "the tokenizer has no eos_token, so a model cannot learn where an answer ends; "
            "choose a model whose tokenizer defines one"
        )


def _end_answer(text: str, eos: str, last: bool) -> list[Segment]:
    """The answer up to its EOS; white space that a template adds after it is not supervised."""
    answer, found, after = text.rpartition(eos)
    if found and not after.strip():
        segments = [Segment(answer + eos, True)]
        return segments if last or not after else [*segments, Segment(after, False)]
    return [Segment(text + eos, True)] if last else [Segment(text, True)]


def _space_to_answers(segments: list[Segment]) -> list[Segment]:
    """Join adjacent prompt segments, and move trailing spaces of a prompt to its answer."""
    moved: list[Segment] = []
    for segment in segments:
        if moved and not segment.supervised and not moved[-1].supervised:
            moved[-1] = Segment(moved[-1].text + segment.text, False)
        elif moved and segment.supervised:
            prompt = moved[-1].text.rstrip(" ")
            spaces = moved[-1].text[len(prompt) :]
            moved[-1] = Segment(prompt, False)
            moved.append(Segment(spaces + segment.text, True))
        else:
            moved.append(segment)
    return moved


def _apply(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise ModelError(
            "data.template=chat, but the model's tokenizer has no chat template; "
            "set data.template=alpaca or vicuna"
        )
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the tokenizer's chat template refuses a conversation of {roles} ({error}); "
            f"set data.template=alpaca or vicuna"
        ) from None
    return text
