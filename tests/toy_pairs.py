"""Random preference pairs for the toy model, and slow answers to what models make of pairs."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedllm_flwr.data.encode import Encoded, EncodeReport
from fedllm_flwr.tasks.dpo.pairs import EncodedPairs, PairReport
from toys import VOCABULARY

BOS, EOS = VOCABULARY - 3, VOCABULARY - 2
PRINTABLE = range(ord("a"), ord("z") + 1)


def random_pairs(count: int, seed: int = 0, longest: int = 40) -> EncodedPairs:
    """Pairs of random letters: <s> and a prompt, two answers of other lengths with </s>."""
    rng = np.random.default_rng(seed)
    letters = byte_ids()
    rows: list[NDArray[np.int32]] = []
    answers: list[int] = []
    for _ in range(count):
        prompt = rng.choice(letters, rng.integers(2, longest // 2))
        for _ in ("chosen", "rejected"):
            answer = rng.choice(letters, rng.integers(1, longest // 2 - 2))
            rows.append(np.concatenate([[BOS], prompt, answer, [EOS]]).astype(np.int32))
            answers.append(len(answer) + 1)
    return as_pairs(rows, answers)


def as_pairs(rows: list[NDArray[np.int32]], answers: list[int]) -> EncodedPairs:
    """Rows, chosen and rejected by turns, whose last so many tokens are the answer."""
    lengths = np.array([len(row) for row in rows])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    supervised = [
        np.arange(len(row)) >= len(row) - answer for row, answer in zip(rows, answers, strict=True)
    ]
    count, total = len(rows) // 2, int(lengths.sum())
    report = EncodeReport(len(rows), len(rows), 0, 0, total, sum(answers))
    source = np.arange(len(rows)) // 2
    encoded = Encoded(np.concatenate(rows), np.concatenate(supervised), offsets, source, report)
    return EncodedPairs(encoded, PairReport(count, count, 0, 0, 0, 0))


def byte_ids() -> NDArray[np.int32]:
    """Token ids of the lower-case letters in the toy tokenizer, which sorts its alphabet."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return np.array([alphabet.index(chr(letter)) for letter in PRINTABLE], np.int32)


@torch.no_grad()
def one_by_one(module: Any, pairs: EncodedPairs) -> NDArray[np.float64]:
    """log p of both answers, (pairs, 2): each row alone, without padding, all logits, float64."""
    module.eval()
    values = np.zeros((len(pairs), 2))
    for i in range(len(pairs)):
        for side, (tokens, supervised) in enumerate(pairs[i]):
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            scores = module(input_ids=ids).logits[0].double().log_softmax(-1)
            places = [t for t in range(1, len(tokens)) if supervised[t]]
            values[i, side] = sum(float(scores[t - 1, tokens[t]]) for t in places)
    return values


@torch.no_grad()
def greedy(module: Any, prompt: NDArray[np.int32], max_new_tokens: int, eos: int) -> list[int]:
    """The answer by argmax of the whole sequence anew for each token, until EOS."""
    module.eval()
    tokens = prompt.tolist()
    for _ in range(max_new_tokens):
        logits = module(input_ids=torch.tensor([tokens])).logits[0, -1]
        tokens.append(int(logits.argmax()))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]
