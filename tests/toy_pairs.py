"""Random preference pairs for the toy model, with lengths spread like real ones."""

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.data.encode import Encoded, EncodeReport
from fedllm_flwr.data.pairs import EncodedPairs, PairReport
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
