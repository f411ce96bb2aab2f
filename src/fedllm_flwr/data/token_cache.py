"""Encoded examples on disk, so that a site tokenises its data once."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedllm_flwr.data.encode import Encoded, EncodeReport
from fedllm_flwr.data.templates import Tokenizer

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

Examples = TypeVar("Examples")
Records = Sequence[tuple[Any, ...]]  # values of a codec's columns

FORMAT_VERSION = 3  # raise it whenever the same inputs give other tokens or other arrays


@dataclass(frozen=True)
class Codec(Generic[Examples]):
    """How records of one kind become examples, and examples a file."""

    name: str
    columns: tuple[str, ...]  # of the data set: all that the tokens depend on
    encode: Callable[[Records, Tokenizer, str, int, str], Examples]
    # The rows that a file holds, and what else there is to know of them, as JSON.
    pack: Callable[[Examples], tuple[Encoded, dict[str, int]]]
    unpack: Callable[[Encoded, dict[str, int]], Examples]


def encode_cached(
    codec: Codec[Examples],
    dataset: "datasets.Dataset",
    tokenizer: Tokenizer,
    template: str,
    max_length: int,
    truncation: str = "right",
    cache_dir: Path | None = None,
    most_files: int | None = None,
) -> Examples:
    """``codec.encode`` of a data set, from ``cache_dir`` where the same was encoded before.

    A broken cache file is made anew and a directory that cannot be written is done without;
    both are logged.

    Args:
        most_files: how many files ``cache_dir`` keeps, the newest ones; None: all.
    """
    records = list(zip(*(dataset[column][:] for column in codec.columns), strict=True))
    if cache_dir is None:
        return codec.encode(records, tokenizer, template, max_length, truncation)
    options: dict[str, str | int] = {
        "kind": codec.name,
        "template": template,
        "max_length": max_length,
        "truncation": truncation,
    }
    path = cache_dir / f"{_key(records, tokenizer, options)}.safetensors"
    cached = _load_or_none(codec, path)
    if cached is not None:
        return cached
    encoded = codec.encode(records, tokenizer, template, max_length, truncation)
    try:
        save_encoded(codec, encoded, path)
        if most_files is not None:
            _keep_newest(cache_dir, most_files)
    except OSError as error:
        logger.warning("encoded examples are not cached: %s", error)
    return encoded


def _keep_newest(folder: Path, count: int) -> None:
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    for file in files[:-count]:
        file.unlink(missing_ok=True)


def save_encoded(codec: Codec[Examples], encoded: Examples, path: Path) -> None:
    """Write one safetensors file, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, more = codec.pack(encoded)
    arrays = {name: np.ascontiguousarray(getattr(rows, name)) for name in _ARRAYS}
    reports = {"report": json.dumps(asdict(rows.report)), "more": json.dumps(more)}
    metadata = {"format": str(FORMAT_VERSION), **reports}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    os.close(handle)
    try:
        save_file(arrays, temporary, metadata)
        Path(temporary).replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def load_encoded(codec: Codec[Examples], path: Path) -> Examples:
    """Read what ``save_encoded`` wrote. Raises ValueError or OSError for anything else."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None
    if metadata.get("format") != str(FORMAT_VERSION):
        raise ValueError(f"{path}: format {metadata.get('format')}, not {FORMAT_VERSION}")
    report = EncodeReport(**json.loads(metadata["report"]))
    rows = Encoded(**arrays, report=report)
    _check_shapes(rows, path)
    return codec.unpack(rows, json.loads(metadata["more"]))


_ARRAYS = {"tokens": np.int32, "supervised": np.bool_, "offsets": np.int64, "source": np.int64}


def _check_shapes(encoded: Encoded, path: Path) -> None:
    report = encoded.report
    shapes = {
        "tokens": report.num_tokens,
        "supervised": report.num_tokens,
        "offsets": report.num_examples + 1,
        "source": report.num_examples,
    }
    for name, size in shapes.items():
        array = getattr(encoded, name)
        if array.shape != (size,) or array.dtype != _ARRAYS[name]:
            raise ValueError(f"{path}: {name} is {array.dtype}{array.shape}, not ({size},)")


def _load_or_none(codec: Codec[Examples], path: Path) -> Examples | None:
    if not path.exists():
        return None
    try:
        return load_encoded(codec, path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("encoded examples are made anew: %s", error)
        return None


def _key(records: Records, tokenizer: Tokenizer, options: dict[str, str | int]) -> str:
    """sha256 over everything that the tokens depend on."""
    settings = {"format": FORMAT_VERSION, "tokenizer": _fingerprint(tokenizer), **options}
    everything = json.dumps([settings, records], sort_keys=True)
    return hashlib.sha256(everything.encode()).hexdigest()


def _fingerprint(tokenizer: Tokenizer) -> str:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # The last call's settings, not properties of the tokenizer.
    backend.update(truncation=None, padding=None)
    own = [backend, tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id]
    own.append(getattr(tokenizer, "special_tokens_as_text", True))
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
