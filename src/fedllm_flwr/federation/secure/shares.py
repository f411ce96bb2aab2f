"""Shamir's secret sharing of 32-byte seeds (Shamir 1979), over a prime field."""

import secrets
from collections.abc import Iterable, Mapping

from fedllm_flwr.errors import FederationError

PRIME = 2**256 + 297  # the smallest above 2^256
SHARE_BYTES = 33
SEED_BYTES = 32


def split(secret: bytes, threshold: int, holders: Iterable[int]) -> dict[int, bytes]:
    """A share of `secret` for each of `holders` (points from 1); `threshold` shares recover it.

    Fewer shares reveal nothing, because the polynomial's other coefficients are uniform.
    """
    if len(secret) != SEED_BYTES or threshold < 1:
        raise ValueError(f"cannot share {len(secret)} bytes with threshold {threshold}")
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    shares = {}
    for point in holders:
        if not 0 < point < PRIME:
            raise ValueError(f"no point of a holder: {point}")
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % PRIME
        shares[point] = value.to_bytes(SHARE_BYTES, "big")
    return shares


def join(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret from at least `threshold` shares, by point; the lowest points are used.

    Raises:
        FederationError: there are too few shares, or they are inconsistent.
    """
    if len(shares) < threshold:
        raise FederationError(f"{len(shares)} shares of a seed, and {threshold} are needed")
    points = sorted(shares)[:threshold]
    total = 0
    for point in points:
        numerator = denominator = 1
        for other in points:
            if other != point:
                numerator = numerator * -other % PRIME
                denominator = denominator * (point - other) % PRIME
        value = int.from_bytes(shares[point], "big")
        total += value * numerator * pow(denominator, -1, PRIME)
    if (secret := total % PRIME) >> (8 * SEED_BYTES):
        raise FederationError("the shares of a seed do not belong together")
    return secret.to_bytes(SEED_BYTES, "big")
