"""The updates of a round's clients, kept out of memory until the server step."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import IO

import numpy as np

from fedllm_flwr.params import Array

_IN_MEMORY = 2**26  # bytes


class Spool:
    """Writes tensors to a temporary file, which is deleted with the spool and its tensors.

    Up to 64 MiB stay in memory. The file is in the folder for temporary files, ``TMPDIR``.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] = SpooledTemporaryFile(_IN_MEMORY, prefix="fedllm-updates-")  # noqa: SIM115

    def keep(self, params: Mapping[str, Array]) -> Mapping[str, Array]:
        """Write tensors; the mapping that is returned reads each one on access.

        Raises:
            OSError: the file cannot be written.
        """
        places = {}
        offset = self._file.seek(0, 2)
        for name, value in params.items():
            places[name] = _Place(offset, value.shape, value.dtype)
            offset += self._file.write(np.ascontiguousarray(value).tobytes())
        return _Kept(self._file, places)


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class _Kept(Mapping[str, Array]):
    """Tensors in a file."""

    file: IO[bytes]
    places: Mapping[str, _Place]

    def __getitem__(self, name: str) -> Array:
        """The tensor, read from the file."""
        place = self.places[name]
        self.file.seek(place.offset)
        content = self.file.read(math.prod(place.shape) * place.dtype.itemsize)
        return np.frombuffer(content, place.dtype).reshape(place.shape)

    def __iter__(self) -> Iterator[str]:
        """The names of the tensors."""
        return iter(self.places)

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self.places)
