"""Compression of client updates with error feedback. NumPy only.

A tensor is sent as bytes: integers and a scale per block (`Int8`, `Int4`), or its largest values
and their indices (`TopK`). The compression error of ``delta`` is kept at the client
and added to its next update (error feedback; Karimireddy et al. 2019, "Error Feedback Fixes
SignSGD", https://arxiv.org/abs/1901.09847, Algorithm 2). It is client memory: after a lost reply,
the client starts again from the version of the last acknowledged round.

A rule's further groups are compressed without error feedback: each is the change of a client memory
that advances only by what has arrived (`client.local_round`), so that the next change includes the
compression error.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, cast

import numpy as np

from fedllm_flwr.errors import FederationError, NotFiniteError
from fedllm_flwr.federation.updates.transform import Passage, Stage, UpdateTransform
from fedllm_flwr.params import Array, Groups, Params, derive_seed, subtract

BLOCK = 128
"""Number of values that share a scale, which costs a quarter of a bit per value."""
RESIDUAL = "residual"
"""Kind of client memory: the accumulated compression error of the client's updates."""


class Compression(UpdateTransform):
    """Base of compressors, which encode a tensor as bytes and decode it."""

    stage = Stage.COMPRESS

    @abstractmethod
    def compressed(self, values: Array, seed: int | None) -> Array:
        """The bytes, as uint8 of shape ``(num_bytes(values.size),)``, of flat float32 `values`.

        Args:
            seed: of the random draws of the rounding; None: round to the nearest.
        """

    @abstractmethod
    def restored(self, encoded: Array, size: int) -> Array:
        """float32 values, `size` of them, from bytes of the right number.

        Raises:
            FederationError: `compressed` cannot have produced these bytes.
        """

    @abstractmethod
    def num_bytes(self, size: int) -> int:
        """Bytes of a tensor of `size` values."""

    def client_end(self, groups: Groups, passage: Passage) -> Groups:
        """Every tensor as bytes, with the earlier rounds' compression error added to ``delta``.

        Raises:
            NotFiniteError: a value is NaN or infinite.
        """
        groups = {**groups, "delta": _corrected(groups["delta"], passage.memory)}
        found: dict[str, Params] = {}
        for group, params in groups.items():
            found[group] = {}
            for name, values in params.items():
                flat = np.asarray(values, np.float32).ravel()
                if not np.isfinite(flat).all():
                    raise NotFiniteError(f"{name!r} holds NaN or Inf")
                parts = (passage.seed, "compression", passage.client, passage.round, group, name)
                found[group][name] = self.compressed(flat, derive_seed(*parts))
        return found

    def server_end(self, groups: Groups, like: Groups, passage: Passage) -> Groups:
        """The decoded tensors, in their original shapes."""
        return {
            group: self.decoded(params, like.get(group, {})) for group, params in groups.items()
        }

    def decoded(self, params: Params, like: Mapping[str, Array]) -> Params:
        """float32 tensors of the shapes of `like` from their bytes.

        Raises:
            FederationError: `compressed` cannot have produced them.
        """
        return {name: self._read(name, value, like) for name, value in params.items()}

    def remembered(self, before: Groups, after: Groups, passage: Passage) -> Groups:
        """The accumulated compression error, including tensors not sent in this round."""
        delta = _corrected(before["delta"], passage.memory)
        arrived = self.server_end({"delta": after["delta"]}, before, passage)["delta"]
        left = passage.memory.get(RESIDUAL, {})
        return {RESIDUAL: {**left, **subtract(delta, arrived)}}

    def expected(self, groups: Groups) -> Groups:
        """One vector of bytes per tensor."""
        return {
            group: {
                name: np.broadcast_to(np.uint8(0), (self.num_bytes(value.size),))
                for name, value in params.items()
            }
            for group, params in groups.items()
        }

    def _read(self, name: str, encoded: Array, like: Mapping[str, Array]) -> Array:
        if name not in like:
            raise FederationError(f"{name[:100]!r} is not a tensor of this adapter")
        shape, size = like[name].shape, like[name].size
        if encoded.dtype != np.uint8 or encoded.shape != (self.num_bytes(size),):
            raise FederationError(
                f"{name!r} has {encoded.size} values of {encoded.dtype}, expected "
                f"{self.num_bytes(size)} bytes"
            )
        return self.restored(encoded, size).reshape(shape)


def _corrected(delta: Params, memory: Groups) -> Params:
    left = memory.get(RESIDUAL, {})
    return {
        name: value + left[name] if name in left and left[name].shape == value.shape else value
        for name, value in delta.items()
    }


class Int8(Compression):
    """Integers in -127..127 and a float32 scale per `BLOCK` values: 8.25 bits per value.

    Stochastic rounding makes the result unbiased (QSGD; Alistarh et al. 2017,
    https://arxiv.org/abs/1610.02132), with the largest magnitude of the block as norm.
    """

    levels: ClassVar[int] = 127

    def num_bytes(self, size: int) -> int:
        return self.code_bytes(size) + 4 * _num_blocks(size)

    def compressed(self, values: Array, seed: int | None) -> Array:
        blocks = np.zeros((_num_blocks(values.size), BLOCK), np.float32)
        blocks.ravel()[: values.size] = values
        scales = np.abs(blocks).max(axis=1) / np.float32(self.levels)
        half = np.broadcast_to(np.float32(0.5), blocks.shape)
        draws = half if seed is None else np.random.default_rng(seed).random(half.shape, np.float32)
        steps = np.divide(
            blocks, scales[:, None], out=np.zeros_like(blocks), where=scales[:, None] > 0
        )
        codes = np.clip(np.floor(steps + draws), -self.levels, self.levels).astype(np.int8)
        packed = self.pack(codes.ravel()[: values.size])
        return np.concatenate([packed, scales.astype("<f4").view(np.uint8)])

    def restored(self, encoded: Array, size: int) -> Array:
        end = self.code_bytes(size)
        scales = np.frombuffer(encoded[end:].tobytes(), "<f4")
        codes = self.unpack(encoded[:end])[:size].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # refused by name where it is checked
            return cast(Array, codes * np.repeat(scales, BLOCK)[:size])

    def code_bytes(self, size: int) -> int:
        """Number of bytes of the integers."""
        return size

    def pack(self, codes: Array) -> Array:
        """int8 codes as bytes."""
        return codes.view(np.uint8)

    def unpack(self, packed: Array) -> Array:
        """Codes from bytes, possibly with one extra code at the end."""
        return packed.view(np.int8)


class Int4(Int8):
    """As `Int8`, but in -7..7 and two per byte: 4.25 bits per value."""

    levels = 7

    def code_bytes(self, size: int) -> int:
        return (size + 1) // 2

    def pack(self, codes: Array) -> Array:
        nibbles = np.zeros(2 * self.code_bytes(codes.size), np.uint8)
        nibbles[: codes.size] = codes + np.int8(8)
        return cast(Array, nibbles[::2] | nibbles[1::2] << np.uint8(4))

    def unpack(self, packed: Array) -> Array:
        nibbles = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=1).ravel()
        return nibbles.astype(np.int8) - np.int8(8)


class TopK(Compression):
    """The fraction ``communication.top_k`` of a tensor's values with the largest magnitude.

    Each takes four bytes as float32 and four as its index; indices ascend. Stich et al. 2018,
    "Sparsified SGD with Memory", https://arxiv.org/abs/1809.07599.
    """

    def kept(self, size: int) -> int:
        """Number of values to send of a tensor with `size` values; at least one."""
        return min(size, max(1, round(self.config.communication.top_k * size)))

    def num_bytes(self, size: int) -> int:
        return 8 * self.kept(size)

    def compressed(self, values: Array, seed: int | None) -> Array:
        kept = self.kept(values.size)
        places = np.sort(np.argsort(-np.abs(values), kind="stable")[:kept])
        largest = values[places].astype("<f4").view(np.uint8)
        return np.concatenate([places.astype("<u4").view(np.uint8), largest])

    def restored(self, encoded: Array, size: int) -> Array:
        half = encoded.size // 2
        places = np.frombuffer(encoded[:half].tobytes(), "<u4")
        if places.size and (
            int(places[-1]) >= size or (np.diff(places.astype(np.int64)) < 1).any()
        ):
            raise FederationError(
                "the places of its values are not ascending, or not in the tensor"
            )
        values = np.zeros(size, np.float32)
        values[places] = np.frombuffer(encoded[half:].tobytes(), "<f4")
        return values


def _num_blocks(size: int) -> int:
    return -(-size // BLOCK)
