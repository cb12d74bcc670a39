"""Texts of strangers: JSON, patterns and sizes that would stop, fill or stall a reader."""

from pathlib import Path

import pytest

from m3jax.documents import TooDeepError, parse_json, pattern, read_bounded
from m3jax.errors import M3Error


@pytest.mark.parametrize("text", ["[" * 101 + "]" * 101, "[" * 10**6, '{"a":' * 10**5, '{"a":' * 101 + "1" + "}" * 101])
def test_what_is_too_deep_is_no_recursion(text: str) -> None:
    with pytest.raises(TooDeepError, match="without end"):
        parse_json(text)


def test_what_is_deep_is_read() -> None:
    assert parse_json("[" * 100 + "]" * 100)


def test_half_a_character_is_no_text_but_where_it_may_be() -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        parse_json('{"a": "\\ud800"}')
    assert parse_json('{"a": "\\ud800"}', halves=True) == {"a": "\ud800"}
    assert parse_json('"\\ud83d\\ude00"') == "😀"


def test_numbers_that_no_float_holds_are_not_meant() -> None:
    assert parse_json("1" + "0" * 299) == 10**299
    for text in ("9" * 301, f'{{"a": [-{"1" * 5000}]}}'):
        with pytest.raises(ValueError, match=r"it has a number of [\d,]+ digits"):
            parse_json(text)


def test_a_key_written_twice() -> None:
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="it names 'a' twice"):
        parse_json('{"a": 1, "a": 2}', unique=True)


def test_only_so_much_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bounded(tmp_path / "a", 5) == b"12345"
    for place in (tmp_path / "a", Path("/dev/zero")):
        with pytest.raises(ValueError, match="more than 4 bytes"):
            read_bounded(place, 4)


@pytest.mark.parametrize(
    "text",
    ["(", "a**", "a{9999999}", "a{999999999999999}", "(" * 5000 + ")" * 5000, "((a{1000}){1000}){1000}", "a" * 10_001],
)
def test_patterns_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        pattern(text)


def test_a_pattern_that_tries_without_end_is_given_up() -> None:
    with pytest.raises(M3Error, match=r"the pattern '\(a\|aa\)\+\$' tries without end on 'aaa.*repetition inside"):
        pattern("(a|aa)+$").search("a" * 50 + "!")


@pytest.mark.parametrize("text", [r"layers\.(\d{1,3})\.", "^model", ".*rotary.*", "(?i)NORM$", "a|b", r"(?<=\.)q"])
def test_patterns_find_what_pythons_find(text: str) -> None:
    import re

    for name in ("model.layers.12.q.weight", "x.rotary", "final.norm", "", "b"):
        ours, theirs = pattern(text).search(name), re.search(text, name)
        assert (ours and ours.span(), ours and ours.groups()) == (theirs and theirs.span(), theirs and theirs.groups())
