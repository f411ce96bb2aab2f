"""Mask streams of words from 32-byte seeds: AES-256 in counter mode."""

from typing import Any, Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Words = NDArray[np.unsignedinteger[Any]]  # uint32 or uint16, whose sums wrap around in the ring
_CHUNK = 2**18  # words at a time: 1 MB, which stays in the cache


def words_of(bits: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The dtype of the words of a ring."""
    return np.dtype(f"u{bits // 8}")


def add_mask(vector: Words, seed: bytes, sign: Literal[1, -1] = 1) -> None:
    """Add the stream of `seed` to `vector`, or subtract it, modulo the ring and in place.

    A seed is used for only one stream, so the counter starts at zero.
    """
    stream = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(vector.itemsize * min(_CHUNK, vector.size))
    buffer = bytearray(len(zeros) + 15)
    apply = np.add if sign > 0 else np.subtract
    for start in range(0, vector.size, _CHUNK):
        part = vector[start : start + _CHUNK]
        stream.update_into(memoryview(zeros)[: part.nbytes], buffer)
        words = np.frombuffer(buffer, f"<u{vector.itemsize}", part.size)
        apply(part, words, out=part)
