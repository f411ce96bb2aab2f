"""Splitting, truncation and joining of the tokens of a prompt and its answer."""

import numpy as np

from fedllm_flwr.data.encode import cut_start
from fedllm_flwr.data.tokens import Mask, TokenArray

TokenRow = tuple[TokenArray, Mask]  # tokens and supervised, each (length,)


def split(tokens: TokenArray, supervised: Mask) -> tuple[TokenArray, TokenArray]:
    """Split a row into prompt and answer; the supervised answer is at its end."""
    start = int(np.argmax(supervised))
    return tokens[:start], tokens[start:]


def cut_prompt(prompt: TokenArray, longest: int, max_length: int, bos: int | None) -> TokenArray:
    """Cut the start of a prompt to leave room for an answer of at most `longest` tokens.

    The prompt keeps half of ``max_length`` even if the answer needs more than the other half.
    """
    return cut_start(prompt, max(max_length - longest, max_length // 2, 1), bos)


def joined(prompt: TokenArray, answer: TokenArray) -> TokenRow:
    """A row of prompt and supervised answer."""
    supervised = np.arange(len(prompt) + len(answer)) >= len(prompt)
    return np.concatenate([prompt, answer]), supervised
