"""Unusable records, and the reasons why they are left out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from fedllm_flwr.data.columns import AttributeColumn, Mapping
from fedllm_flwr.data.preprocessing import Preprocessed
from fedllm_flwr.data.record_files import Record
from fedllm_flwr.errors import DataError

NAMED_IN_ERRORS = 5
Made = TypeVar("Made")


class UnusableRecord(Exception):  # noqa: N818 - a verdict on one record, always caught here
    """Why a record is unusable; ``fault`` is the field of `Faults` to which it belongs."""

    def __init__(self, reason: str, fault: str = "bad") -> None:
        super().__init__(reason)
        self.fault = fault


@dataclass
class Faults:
    """Unusable records by kind of fault: (1-based record number, reason)."""

    empty: list[tuple[int, str]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    equal: list[tuple[int, str]] = field(default_factory=list)  # both answers are the same

    def extend(self, other: "Faults", offset: int) -> None:
        """Append faults whose record numbers start after `offset`."""
        for name in ("empty", "bad", "equal"):
            found = [(offset + number, reason) for number, reason in getattr(other, name)]
            getattr(self, name).extend(found)


def make_usable(rows: Preprocessed, make: Callable[[Record], Made]) -> tuple[list[Made], Faults]:
    """Apply ``make`` to each record; return the results, and the faults of unusable records."""
    made: list[Made] = []
    faults = Faults()
    for number, row in enumerate(rows, start=1):
        if row is None:
            continue
        try:
            made.append(make(row))
        except UnusableRecord as fault:
            getattr(faults, fault.fault).append((number, str(fault)))
    return made, faults


def refuse_faults(
    source: str, num_records: int, faults: Faults, refused: Iterable[str] = ("empty", "bad")
) -> None:
    """Raise a DataError that names the first records with a fault of a refused kind, if any."""
    found = sorted(fault for kind in refused for fault in getattr(faults, kind))
    if not found:
        return
    named = "; ".join(f"record {number}: {reason}" for number, reason in found[:NAMED_IN_ERRORS])
    more = f"; and {len(found) - NAMED_IN_ERRORS} more" if len(found) > NAMED_IN_ERRORS else ""
    if len(found) == num_records:  # leaving them out would leave nothing
        raise DataError(
            f"{source}: none of its {num_records} records can be used ({named}{more}). Look at "
            "which columns data.columns names, and at the file itself",
            "none of its records is usable",
        )
    raise DataError(
        f"{source}: {len(found)} of {num_records} records cannot be used ({named}{more}). "
        f"Fix them, or leave them out with data.on_bad_record=skip",
        f"{len(found)} of its records cannot be used",
    )


def text_of(row: Record, column: str) -> str:
    """The text of a column."""
    value = row.get(column)
    if value is None:
        raise UnusableRecord(f"column {column!r} is missing", "empty")
    if not isinstance(value, str):
        raise UnusableRecord(f"column {column!r} is {type(value).__name__}, not text")
    if not value.strip():
        raise UnusableRecord(f"column {column!r} is empty", "empty")
    return value


def attribute_of(row: Record, column: AttributeColumn | None) -> str:
    """The value of a column as text; "" if there is no column."""
    value = row.get(column.name) if column else None
    text = "" if value is None else str(value)
    require_unicode(text)
    return text


def client_of(row: Record, mapping: Mapping) -> str:
    """The client of a record; "" if there is no client column."""
    client = attribute_of(row, mapping.client)
    if mapping.client and mapping.client.required and not client:
        raise UnusableRecord(f"no value in column {mapping.client.name!r} ({mapping.client.key})")
    return client


def require_unicode(text: str) -> None:
    """Reject lone surrogates, which JSON can escape but UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnusableRecord("half of a surrogate pair, such as \\ud83d, in its text") from None
