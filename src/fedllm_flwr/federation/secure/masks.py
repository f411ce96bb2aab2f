"""Mask streams of 32-bit words from 32-byte seeds: AES-256 in counter mode."""

from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Words = NDArray[np.uint32]
_CHUNK = 2**18  # words at a time: 1 MB, which stays in the cache


def add_mask(vector: Words, seed: bytes, sign: Literal[1, -1] = 1) -> None:
    """Add the stream of `seed` to `vector`, or subtract it, modulo 2^32 and in place.

    A seed is used for only one stream, so the counter starts at zero.
    """
    stream = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(4 * min(_CHUNK, vector.size))
    buffer = bytearray(len(zeros) + 15)
    apply = np.add if sign > 0 else np.subtract
    for start in range(0, vector.size, _CHUNK):
        part = vector[start : start + _CHUNK]
        stream.update_into(memoryview(zeros)[: 4 * part.size], buffer)
        words = np.frombuffer(buffer, "<u4", part.size)
        apply(part, words, out=part)
