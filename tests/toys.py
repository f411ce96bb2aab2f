"""A small random model with a byte-level tokenizer, and examples from arrays."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.data.encode import Encoded, EncodeReport

VOCABULARY = 256 + 3  # bytes and three special tokens


def write_toy_model(directory: Path, **sizes: int | bool) -> Path:
    """A random Llama of two layers (22 k parameters) with a byte-level tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2} | sizes
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        initializer_range=0.1,  # larger than usual, so that gradients and scores are no noise
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def byte_tokenizer() -> Any:
    """One token per byte, then <s>, </s> and <pad>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "<s>", "</s>", "<pad>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def as_encoded(
    tokens: NDArray[np.int32], supervised: NDArray[np.bool_], lengths: NDArray[np.int64]
) -> Encoded:
    """Flat arrays as examples, one per record."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    count, total = len(lengths), int(lengths.sum())
    report = EncodeReport(count, count, 0, 0, total, int(supervised.sum()))
    return Encoded(tokens, supervised, offsets, np.arange(count), report)
