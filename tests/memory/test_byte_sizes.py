"""Sizes in bytes: what users write, and what they read."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_lora.facts.numbers import format_bytes, parse_bytes

UNITS = {"B": 1}
UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)}


@given(
    st.integers(1, 1000),
    st.sampled_from(sorted(UNITS)),
    st.sampled_from([str, str.lower, str.upper]),
    st.sampled_from(["", " "]),
)
def test_a_string_is_its_number_times_its_unit(number: int, unit: str, case: type[str], space: str) -> None:
    assert parse_bytes(f"{number}{space}{case(unit)}", "budget") == number * UNITS[unit]


@given(st.integers(1, 2**50))
def test_whole_bytes_are_what_they_are(size: int) -> None:
    assert parse_bytes(size, "budget") == parse_bytes(f"{size} B", "budget") == size


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "at least 1 byte"), (-1, "at least 1 byte"), (2**50 + 1, "at most a thousand TiB")],
)
def test_sizes_are_a_byte_to_a_thousand_tebibytes(size: int, words: str) -> None:
    assert (parse_bytes(1, "budget"), parse_bytes("1024TiB", "budget")) == (1, 1_125_899_906_842_624)
    with pytest.raises(ValueError, match=f"budget must be {words}"):
        parse_bytes(size, "budget")


@given(st.decimals("0.001", 1000, places=3), st.sampled_from(sorted(set(UNITS) - {"B"})))
def test_fractions_are_exact_to_the_byte(number: object, unit: str) -> None:
    thousandths = int(str(number).replace(".", ""))
    assert parse_bytes(f"{number}{unit}", "budget") == thousandths * UNITS[unit] // 1000


@given(st.integers(1, 2**50))
def test_what_is_written_reads_as_the_same_size_to_one_decimal(size: int) -> None:
    text = format_bytes(size)
    number, unit = text.split()
    assert abs(parse_bytes(text, "budget") - size) <= 0.051 * UNITS[unit]
    assert unit == "TiB" or float(number) < 1024


@given(st.integers(1, 2**50), st.integers(1, 2**50))
def test_more_never_reads_as_less(one: int, other: int) -> None:
    less, more = sorted([one, other])
    assert parse_bytes(format_bytes(less), "budget") <= parse_bytes(format_bytes(more), "budget")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (-1536, "-1.5 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (24 * 10**9, "22.4 GiB"),
        (25_769_803_776, "24.0 GiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_sizes_as_they_are_written(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("24", 'budget must carry a unit: "24GiB" (or "24GB"), got "24"'),
        ("1.5", 'budget must carry a unit: "1.5GiB" (or "1.5GB"), got "1.5"'),
        ("24g", 'budget must carry a unit: "24GiB" (or "24GB"), got "24g"'),
        ("512 M", 'budget must carry a unit: "512MiB" (or "512MB"), got "512 M"'),
        ("24Gi", 'budget must carry a unit: "24GiB" (or "24GB"), got "24Gi"'),
        (
            "24 gigs",
            'budget has the unknown unit "gigs": write B, KiB, MiB, GiB or TiB (or KB, MB, GB, TB), got "24 gigs"',
        ),
        ("", 'budget must be a size such as "24GiB" (or "24GB"), got ""'),
        ("-1GiB", 'budget must be a size such as "24GiB" (or "24GB"), got "-1GiB"'),
        ("1e3GiB", 'budget must be a size such as "24GiB" (or "24GB"), got "1e3GiB"'),
        ("1,5GiB", 'budget must be a size such as "24GiB" (or "24GB"), got "1,5GiB"'),
        ("0GiB", 'budget must be at least 1 byte, got "0GiB"'),
        ("0.1B", 'budget must be at least 1 byte, got "0.1B"'),
        (0, "budget must be at least 1 byte, got 0"),
        (-5, "budget must be at least 1 byte, got -5"),
    ],
)
def test_wrong_sizes_say_what_to_write(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_bytes(value, "budget")


@pytest.mark.parametrize("value", [24.0, None, True, b"24GiB"])
def test_other_types_are_refused(value: object) -> None:
    message = f'budget must be a size such as "24GiB" (or "24GB") or whole bytes, not {value}'
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        parse_bytes(value, "budget")
