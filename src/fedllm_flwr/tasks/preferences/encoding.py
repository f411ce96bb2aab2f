"""Tokens of a prompt and of an answer to it, and how both fit a length."""

import numpy as np

from fedllm_flwr.data.encode import cut_start
from fedllm_flwr.data.tokens import Mask, TokenArray

TokenRow = tuple[TokenArray, Mask]  # tokens and supervised, each (length,)


def split(tokens: TokenArray, supervised: Mask) -> tuple[TokenArray, TokenArray]:
    """Prompt and answer of a row that ends with its one supervised answer."""
    start = int(np.argmax(supervised))
    return tokens[:start], tokens[start:]


def cut_prompt(prompt: TokenArray, longest: int, max_length: int, bos: int | None) -> TokenArray:
    """The end of a prompt before an answer of at most `longest` tokens.

    It keeps half of ``max_length`` even where the answer needs more than the other half.
    """
    return cut_start(prompt, max(max_length - longest, max_length // 2, 1), bos)


def joined(prompt: TokenArray, answer: TokenArray) -> TokenRow:
    """A row whose answer is supervised."""
    supervised = np.arange(len(prompt) + len(answer)) >= len(prompt)
    return np.concatenate([prompt, answer]), supervised
