"""Numbers and quantities as people read them."""

import math
from collections.abc import Mapping

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
_COUNT_UNITS = ("", " k", " M", " B", " T")


def fixed(value: float | None, decimals: int) -> str:
    """`value` with so many decimals; a dash where there is none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.{decimals}f}"


def format_bytes(count: int) -> str:
    """Decimal units, three significant digits: 81 kB, 1.66 MB."""
    return _scaled(count, 1000, _BYTE_UNITS, " ")


def format_count(count: int) -> str:
    """1.9 M, 135 M, 8.03 B; digits in groups below a million."""
    return f"{count:,}" if count < 1_000_000 else _scaled(count, 1000, _COUNT_UNITS, "")


def format_seconds(seconds: float) -> str:
    """0.4 s, 58 s, 3 min 20 s, 2 h 05 min."""
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
    """Parts rounded to whole numbers that add up to `total`, largest first, zeros left out.

    Largest remainders are rounded up, so no part is off by one or more.
    """
    floors = {name: math.floor(value) for name, value in parts.items()}
    by_remainder = sorted(parts, key=lambda name: floors[name] - parts[name])
    for name in by_remainder[: max(0, total - sum(floors.values()))]:
        floors[name] += 1
    ordered = sorted(floors.items(), key=lambda item: -item[1])
    return {name: value for name, value in ordered if value}


def shorten(text: str, width: int) -> str:
    """`text` cut to `width` characters, its loss shown by dots."""
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


def shorten_middle(text: str, width: int) -> str:
    """`text` cut to `width` characters (at least 5); names often differ in their last ones."""
    if len(text) <= width:
        return text
    tail = (width - 3) // 2
    return f"{text[: width - 3 - tail]}...{text[-tail:]}"


def one_line(text: str) -> str:
    """`text` with line breaks and control characters replaced, safe to print on a terminal."""
    return "".join(char if char.isprintable() else " " for char in " ".join(text.split()))


def _scaled(count: int, step: int, units: tuple[str, ...], gap: str) -> str:
    value, index = float(count), 0
    while value >= step - 0.5 and index < len(units) - 1:
        value, index = value / step, index + 1
    decimals = 0 if index == 0 or value >= 100 else 1 if value >= 10 else 2
    number = f"{value:.{decimals}f}"
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{number}{gap}{units[index]}"
