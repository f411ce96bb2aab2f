"""Tokenizers of three kinds: byte-level, sentence-piece, and those of real models."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SHARED = Path(os.environ.get("FEDLLM_DATA", Path(__file__).parents[2] / "shared/data")) / "models"
TINY = Path(__file__).parents[1] / "src/fedllm_flwr/assets/tiny"
DIRECTORIES = {
    "base7m": SHARED / "base7m",
    "stories260k": SHARED / "stories260k",
    "tiny": TINY,
}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN_BLANK_LINES = (
    "{% for m in messages %}{{ m.role }}:\n\n{{ m.content }}{{ eos_token if m.role == 'assistant' "
    "else '\n\n' }}{% endfor %}{% if add_generation_prompt %}assistant:\n\n{% endif %}"
)
TEXT = [
    "Below is an instruction.\n\n### Instruction:\nName it. \n\n### Response:",
    "USER: What is the sentiment? ASSISTANT: positive neutral negative Grüße 你好\n\n\n  code\n",
    "assistant:\n\n",
    "user:\n\n\n assistant:\n\n\n\n[INST] hello [/INST] system",
]


def byte_level(chat_template: str | None = CHATML, eos: str = "<|im_end|>") -> Any:
    """GPT-2's kind: byte-level BPE that looks ahead in white space, no BOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, chat_template=chat_template
    )


def sentence_piece(chat_template: str | None = LLAMA2) -> Any:
    """Llama 2's kind: spaces as a letter, prepended to every text, byte fallback, a BOS."""
    letters = sorted({letter for text in TEXT for letter in text.replace(" ", "▁")} - {"好"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("▁", "p"), ("▁p", "o"), ("▁", "n"), (":", "\n"), ("s", "e")]
    tokens += ["".join(merge) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


def from_directory(name: str) -> Callable[[], Any]:
    def load() -> Any:
        if not (DIRECTORIES[name] / "tokenizer.json").exists():
            pytest.skip(f"the model {name} is not here")
        return AutoTokenizer.from_pretrained(DIRECTORIES[name])

    return load


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "sentence_piece": sentence_piece,
    **{name: from_directory(name) for name in DIRECTORIES},
}
