"""Token cache on disk: examples are encoded once, and every training process memory-maps them."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fedllm_flwr.data.encode import Encoded, EncodeReport
from fedllm_flwr.data.remembered import code_digest
from fedllm_flwr.data.templates import Tokenizer
from fedllm_flwr.plugins import TEMPLATES

logger = logging.getLogger(__name__)

ExamplesT = TypeVar("ExamplesT")
ColumnValues = Sequence[tuple[Any, ...]]  # values of a codec's columns

FORMAT_VERSION = 4  # increase whenever the same inputs give other tokens or other arrays
_RECORDS = 2000  # encoded at a time
_HEADER_BYTES = 4096  # of a cache file; the tokens follow
_ABANDONED_S = 86400.0  # age at which an unfinished file is removed


@dataclass(frozen=True)
class Codec(Generic[ExamplesT]):
    """Codec of one kind of records: encodes records, and converts examples to files and back."""

    name: str
    columns: tuple[str, ...]  # fields of a record that the tokens depend on
    encode: Callable[[ColumnValues, Tokenizer, str, int, str], ExamplesT]
    # The token sequences to store, and the report's counts by name.
    pack: Callable[[ExamplesT], tuple[Encoded, dict[str, int]]]
    unpack: Callable[[Encoded, dict[str, int]], ExamplesT]


def encode_cached(
    codec: Codec[ExamplesT],
    identity: str,
    records: Callable[[], Iterable[Any]],
    tokenizer: Tokenizer,
    template: str,
    max_length: int,
    truncation: str = "right",
    folder: Path | None = None,
    most_files: int | None = None,
) -> ExamplesT:
    """``codec.encode`` of records, read from `folder` if they were encoded before.

    A broken cache file is replaced, and an unwritable folder is ignored; both are logged.

    Args:
        identity: digest of the records; equal identities mean equal records.
        records: opens the records; called only if they are not in the cache.
        folder: None: no cache.
        most_files: number of newest files that `folder` keeps; None: all.
    """

    def chunks() -> Iterator[tuple[Encoded, dict[str, int]]]:
        ahead, start = iter(records()), 0
        while (chosen := list(islice(ahead, _RECORDS))) or not start:
            rows = [tuple(getattr(record, name) for name in codec.columns) for record in chosen]
            examples = codec.encode(rows, tokenizer, template, max_length, truncation)
            encoded, counts = codec.pack(examples)
            yield replace(encoded, source=encoded.source + start), counts
            if len(chosen) < _RECORDS:
                return
            start += _RECORDS

    if folder is None:
        return codec.unpack(*_joined(list(chunks())))
    made_by = [FORMAT_VERSION, codec.name, code_digest(codec.encode), _fingerprint(tokenizer)]
    made_by += [template, repr(TEMPLATES.find(template))]
    key = json.dumps([identity, *made_by, max_length, truncation])
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    try:
        return load_encoded(codec, path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("examples are encoded again: %s", error)
    try:
        save_chunks(chunks(), path)
        if most_files is not None:
            files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
            for file in files[:-most_files]:
                file.unlink(missing_ok=True)
        return load_encoded(codec, path)
    except OSError as error:
        logger.warning("encoded examples are not cached: %s", error)
        return codec.unpack(*_joined(list(chunks())))


def save_chunks(chunks: Iterable[tuple[Encoded, dict[str, int]]], path: Path) -> None:
    """Write the examples of consecutive records atomically to one safetensors file.

    Only one chunk's tokens are in memory at a time. The header is padded to a fixed size, so that
    the tokens can be written before their number is known.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob("*.tmp"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _ABANDONED_S:
                old.unlink()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file, tempfile.TemporaryFile(dir=path.parent) as marks:
            file.write(bytes(_HEADER_BYTES))
            seen: list[tuple[Encoded, dict[str, int]]] = []
            counts = np.zeros(0, np.int64)
            for rows, more in chunks:
                file.write(rows.tokens.tobytes())
                marks.write(rows.supervised.tobytes())
                counts, before = rows.token_counts.copy(), counts
                counts.resize(max(len(counts), len(before)))
                counts[: len(before)] += before
                nothing = rows.tokens[:0], rows.supervised[:0]
                seen.append((Encoded(*nothing, rows.offsets, rows.source, rows.report), more))
            joined, more = _joined(seen)
            marks.seek(0)
            shutil.copyfileobj(marks, file, 2**24)
            small = {"offsets": joined.offsets, "source": joined.source, "counts": counts}
            for array in small.values():
                file.write(array.tobytes())
            num_tokens = joined.report.num_tokens
            sizes = {"tokens": ("I32", num_tokens, 4), "supervised": ("BOOL", num_tokens, 1)}
            sizes |= {name: ("I64", len(array), 8) for name, array in small.items()}
            header: dict[str, Any] = {
                "__metadata__": {
                    "format": str(FORMAT_VERSION),
                    "report": json.dumps(asdict(joined.report)),
                    "more": json.dumps(more),
                }
            }
            end = 0
            for name, (dtype, length, width) in sizes.items():
                start, end = end, end + length * width
                header[name] = {"dtype": dtype, "shape": [length], "data_offsets": [start, end]}
            text = json.dumps(header).encode().ljust(_HEADER_BYTES - 8)
            file.seek(0)
            file.write(len(text).to_bytes(8, "little") + text)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load_encoded(codec: Codec[ExamplesT], path: Path) -> ExamplesT:
    """Memory-map a file of `save_chunks`, read-only.

    Raises:
        OSError: the file cannot be read; FileNotFoundError: it does not exist.
        ValueError: it has another format, or is incomplete.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != str(FORMAT_VERSION):
                raise ValueError(f"{path}: format {metadata.get('format')}, not {FORMAT_VERSION}")
            small = {name: file.get_tensor(name) for name in ("offsets", "source", "counts")}
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None
    report = EncodeReport(**json.loads(metadata["report"]))
    lengths = len(small["offsets"]) - 1, len(small["source"]), int(small["offsets"][-1])
    if lengths != (report.num_examples, report.num_examples, report.num_tokens):
        raise ValueError(f"{path}: holds {lengths} examples and tokens, not those of its report")
    tokens = _mapped(path, np.int32, _HEADER_BYTES, report.num_tokens)
    marks_start = _HEADER_BYTES + tokens.nbytes
    supervised = _mapped(path, np.bool_, marks_start, report.num_tokens)
    rows = Encoded(tokens, supervised, small["offsets"], small["source"], report)
    vars(rows)["token_counts"] = small["counts"]  # a cached property
    return codec.unpack(rows, json.loads(metadata["more"]))


def _mapped(path: Path, dtype: type, start: int, length: int) -> NDArray[Any]:
    if not length:  # cannot be mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r", start, (length,)))


def _joined(chunks: Sequence[tuple[Encoded, dict[str, int]]]) -> tuple[Encoded, dict[str, int]]:
    """Concatenate the examples of consecutive chunks."""
    reports = [asdict(rows.report) for rows, _ in chunks]
    names = EncodeReport.__dataclass_fields__
    report = EncodeReport(**{name: sum(one[name] for one in reports) for name in names})
    more: dict[str, int] = {}
    offsets, source = [np.zeros(1, np.int64)], [np.zeros(0, np.int64)]
    for rows, counts in chunks:
        offsets.append(offsets[-1][-1] + rows.offsets[1:])
        source.append(rows.source)
        more = {name: more.get(name, 0) + count for name, count in counts.items()}
    tokens = [np.zeros(0, np.int32), *(rows.tokens for rows, _ in chunks)]
    supervised = [np.zeros(0, np.bool_), *(rows.supervised for rows, _ in chunks)]
    flat = np.concatenate(tokens), np.concatenate(supervised)
    return Encoded(*flat, np.concatenate(offsets), np.concatenate(source), report), more


def _fingerprint(tokenizer: Tokenizer) -> str:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # These are settings of the last call, not properties of the tokenizer.
    backend.update(truncation=None, padding=None)
    own = [backend, tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id]
    own.append(getattr(tokenizer, "special_tokens_as_text", True))
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
