"""Formatting of numbers, sizes, durations and names."""

import math
from collections.abc import Mapping, Sequence


def fixed(value: float | None, decimals: int) -> str:
    """`value` with `decimals` decimals; a dash for None."""
    return "-" if value is None else f"{value:.{decimals}f}"


def format_bytes(count: int) -> str:
    """Bytes in decimal units with three significant digits: 81 kB, 1.66 MB."""
    return _scaled(count, (" B", " kB", " MB", " GB", " TB"))


def format_count(count: int) -> str:
    """A count as 1.9 M, 135 M or 8.03 B; below a million, all digits."""
    return f"{count:,}" if count < 1_000_000 else _scaled(count, ("", " k", " M", " B", " T"))


def format_seconds(seconds: float) -> str:
    """A duration as 0.4 s, 58 s, 3 min 20 s or 2 h 05 min."""
    if seconds < 1:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def whole_parts(parts: Mapping[str, float], total: int) -> dict[str, int]:
    """Parts rounded to integers that sum to `total`, in descending order, without zeros.

    The largest remainders are rounded up (Hamilton's method).
    """
    floors = {name: math.floor(value) for name, value in parts.items()}
    by_remainder = sorted(parts, key=lambda name: floors[name] - parts[name])
    for name in by_remainder[: max(0, total - sum(floors.values()))]:
        floors[name] += 1
    ordered = sorted(floors.items(), key=lambda item: -item[1])
    return {name: value for name, value in ordered if value}


def shorten(text: str, width: int) -> str:
    """`text` truncated to `width` characters, ending in dots."""
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


def shorten_middle(text: str, width: int) -> str:
    """`text` truncated in the middle to `width` characters (at least 5)."""
    if len(text) <= width:
        return text
    tail = (width - 3) // 2
    return f"{text[: width - 3 - tail]}...{text[-tail:]}"


def one_line(text: str) -> str:
    """`text` on one line, without control characters: safe to print on a terminal."""
    return "".join(char if char.isprintable() else " " for char in " ".join(text.split()))


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, header first; all columns except the first are right-aligned."""
    names, *body = lines
    rule = ["---", *["---:"] * (len(names) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (names, rule, *body))


def text_table(table: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns for a terminal."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = []
    for line in table:
        name, *values = line
        padded = [f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True)]
        lines.append("   ".join([f"{name:<{widths[0]}}", *padded]).rstrip())
    return "\n".join(lines)


def _scaled(count: int, units: tuple[str, ...]) -> str:
    value, index = float(count), 0
    while value >= 999.5 and index < len(units) - 1:
        value, index = value / 1000, index + 1
    decimals = 0 if index == 0 or value >= 100 else 1 if value >= 10 else 2
    number = f"{value:.{decimals}f}"
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return number + units[index]
