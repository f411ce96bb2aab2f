"""Maps the columns of a data source to roles; errors for missing columns."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from fedllm_flwr.config.schema import ColumnsConfig
from fedllm_flwr.data.record_files import Record
from fedllm_flwr.errors import DataError

CHAT_COLUMNS = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class AttributeColumn:
    """A label or client column, and the configuration key that names it."""

    name: str
    key: str
    required: bool


@dataclass(frozen=True)
class Mapping:
    """The columns of a source by role."""

    source: str  # file or hub data set, as shown in messages
    columns: ColumnsConfig
    columns_key: str = "data.columns"
    label: AttributeColumn | None = None
    client: AttributeColumn | None = None
    labels: list[str] = field(default_factory=list)


class Columns(set[str]):
    """The union of the columns of several records."""

    def __init__(self, rows: Iterable[Record | None] = ()) -> None:
        super().__init__()
        self.values: dict[str, dict[type, Any]] = {}
        """First non-empty value per column and Python type."""
        for row in rows:
            self.include(row)

    def include(self, row: Record | None) -> None:
        """Add the columns of one more record."""
        for name, value in (row or {}).items():
            self.add(name)
            if value and type(value) not in self.values.setdefault(name, {}):
                self.values[name][type(value)] = value


def unused_columns(present: Columns, mapping: Mapping, roles: Iterable[str]) -> list[str]:
    """Columns of the source without a role, sorted."""
    used = {getattr(mapping.columns, role) for role in roles}
    used |= {column.name for column in (mapping.label, mapping.client) if column}
    return sorted(present - used)


def used_columns(present: Columns, mapping: Mapping, roles: Iterable[str]) -> list[str]:
    """``role=column`` for every role whose column exists in the source."""
    names = mapped_columns(replace(mapping, client=None), roles)
    return [f"{role}={name}" for role, name in names.items() if name in present]


def mapped_columns(mapping: Mapping, roles: Iterable[str]) -> dict[str, str]:
    """Column names by role; a column of chat turns replaces the separate text columns."""
    columns = mapping.columns
    is_chat = "messages" in roles and columns.messages is not None
    names = {role: getattr(columns, role) for role in (("messages",) if is_chat else roles)}
    names["label"] = mapping.label and mapping.label.name
    names["client"] = mapping.client and mapping.client.name
    return {role: name for role, name in names.items() if name is not None}


def resolve_attributes(mapping: Mapping, present: Collection[str]) -> Mapping:
    """Drop optional label and client columns that are missing; reject missing required ones."""

    def resolve(column: AttributeColumn | None) -> AttributeColumn | None:
        if column is None or column.name in present:
            return column
        if column.required:
            raise missing_column(mapping.source, column.key, column.name, present)
        return None

    return replace(mapping, label=resolve(mapping.label), client=resolve(mapping.client))


def missing_column(source: str, key: str, name: str, present: Iterable[str]) -> DataError:
    """The error for a configured column that the source does not have."""
    columns = sorted(present)
    close = get_close_matches(name, columns, n=1)
    hint = f"did you mean {key}={close[0]}?" if close else f"set {key} to one of them"
    return DataError(
        f"{source}: {key}={name}, but there is no such column; {hint} "
        f"(columns: {', '.join(columns)})",
        f"its data file lacks the column for {key}",
    )


def wrong_kind(source: str, found: str, wanted: str, task: str, present: set[str]) -> DataError:
    """The error for a source whose columns are those of another task."""
    return DataError(
        f"{source}: holds {found}, not {wanted}; use task={task}, or give a file of {wanted} "
        f"(columns: {', '.join(sorted(present))})",
        f"its data file holds {found}, not {wanted}",
    )
