"""Numbers as people read them."""

import pytest

from fedllm_flwr.reporting.text import (
    fixed,
    format_bytes,
    format_count,
    format_seconds,
    one_line,
    shorten,
    shorten_middle,
    whole_parts,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (82_944, "82.9 kB"),
        (331_776, "332 kB"),
        (999_700, "1 MB"),
        (1_660_000, "1.66 MB"),
        (13_500_000_000, "13.5 GB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(41_472, "41,472"), (1_912_345, "1.91 M"), (134_515_008, "135 M"), (8_030_261_248, "8.03 B")],
)
def test_counts(count: int, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1.0, "0.0 s"),
        (0.42, "0.4 s"),
        (57.6, "58 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3600 + 125, "1 h 02 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_missing_and_non_finite_numbers() -> None:
    assert [fixed(value, 3) for value in (None, float("nan"), 0.43161)] == ["-", "nan", "0.432"]


def test_rounded_parts_add_up_to_the_total() -> None:
    parts = {"training": 33.4, "start-up": 9.4, "evaluation": 8.4, "federation": 4.4, "rest": 2.4}

    whole = whole_parts(parts, 58)
    assert sum(whole.values()) == 58
    assert all(abs(whole[name] - value) < 1 for name, value in parts.items())
    assert list(whole.values()) == sorted(whole.values(), reverse=True)
    assert "short" not in whole_parts({"long": 5.0, "short": 0.1}, 5)


def test_cut_texts_have_the_width_asked_for() -> None:
    assert shorten("abcdefghij", 7) == "abcd..."
    assert shorten_middle("st-marys-hospital-17", 11) == "st-m...l-17"
    assert shorten_middle("short", 11) == "short"


def test_one_line_has_no_control_characters() -> None:
    assert one_line("a\n b\x1b[31m\tc\r") == "a b [31m c"
