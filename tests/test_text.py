"""Sizes, times, shares, names and tables as people see them."""

import pytest

from m3jax.text import safe_text, share_text, size_text, table, time_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (2.2e9, "2.2 GB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (2.94, "2.9 s"),
        (3, "3 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (90000, "25 h 00 min"),
    ],
)
def test_times(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_shares_are_whole_only_where_exact() -> None:
    assert share_text(10**9 - 1, 10**9) == "99.99 %"
    assert share_text(1, 10**9) == "0.01 %"
    assert share_text(0, 5) == "0 %"
    assert share_text(5, 5) == "100 %"
    assert share_text(0, 0) == "–"


def test_control_characters_are_escaped() -> None:
    assert safe_text("a\x1b[31m\nb") == "a\\x1b[31m\\nb"
    assert safe_text("größe.weight") == "größe.weight"


# --- Tables ----------------------------------------------------------------------------------------------

HEAD, ROWS = ["tensor", "entries", "bytes"], [["embed", "12", "24 B"], ["layers.0.weight", "1,000", "2.0 kB"]]


def test_table_aligns() -> None:
    assert list(table(HEAD, ROWS)) == [
        "tensor           entries   bytes",
        "embed                 12    24 B",
        "layers.0.weight    1,000  2.0 kB",
    ]


def test_table_leaves_out_a_spare_column_first() -> None:
    assert list(table(HEAD, ROWS, width=31, spare=1)) == [
        "tensor            bytes",
        "embed              24 B",
        "layers.0.weight  2.0 kB",
    ]


def test_table_gives_names_lines_of_their_own() -> None:
    lines = list(table(HEAD, ROWS, width=22, spare=1))
    assert lines == ["tensor", "     bytes", "embed", "      24 B", "layers.0.weight", "    2.0 kB"]
    assert max(map(len, table(HEAD, ROWS, width=31))) <= 31


def test_table_without_rows() -> None:
    assert list(table(HEAD, [])) == ["tensor  entries  bytes"]
