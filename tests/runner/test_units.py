"""Sizes as people write them, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from runner import BloomdeskError
from runner.units import duration, number, parse_size, percent, rate, size

MIB, GB = 2**20, 10**9


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12 * GB),
        ("12 GB", 12 * GB),
        ("12g", 12 * GB),
        ("  1.5 Gb ", 1_500_000_000),
        ("900MB", 900_000_000),
        ("900m", 900_000_000),
        ("64k", 64_000),
        ("2TB", 2 * 10**12),
        ("12GiB", 12 * 2**30),
        ("1.5 gi", 3 * 2**29),
        ("512MiB", 512 * MIB),
        ("1KiB", 1024),
        ("1TiB", 2**40),
        ("4096", 4096),
        ("4096 B", 4096),
        (".5GB", 500_000_000),
        ("3.GB", 3 * GB),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


HOSTILE = [
    "", " ", "GB", "0", "0GB", "-1GB", "+1GB", "1e9", "inf", "nan", "1,5GB", "1.2.3GB", "12 G B", "12XB", "12GBs",
    "12iB", "12 i", "0x10", "1_000", "٣GB", "１２GB", "9" * 400, "9" * 5000 + "TB", "2000000TB", "0.0000001",
    "12\x00GB", "12GB\n;", "\x1b[31m", ".", ".GB",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BloomdeskError, match="is not an amount of memory") as caught:
        parse_size(text)
    assert len(caught.value.message) < 300 and caught.value.message.isprintable()
    assert "12GB" in caught.value.hint


@given(st.text(alphabet=st.sampled_from("0123456789.,kKmMgGtTiIbB eE+-xX_\n\0é٣"), max_size=12) | st.text())
def test_any_text_is_a_size_or_a_clear_error(text: str) -> None:
    try:
        size = parse_size(text)
    except BloomdeskError:
        return
    assert isinstance(size, int) and 0 < size < 2**60


@given(
    st.integers(1, 10**9), st.sampled_from("kmgt"), st.booleans(), st.booleans(), st.sampled_from(["", " "])
)
def test_units_are_powers_of_1000_or_of_1024(
    number: int, unit: str, binary: bool, b: bool, space: str
) -> None:
    expected = number * (1024 if binary else 1000) ** (1 + "kmgt".index(unit))
    assume(expected < 2**60)
    text = f"{number}{space}{unit.upper()}{'i' * binary}{'B' * b}"
    assert parse_size(text) == int(float(number) * (expected // number))


@pytest.mark.parametrize(
    ("shown", "value", "text"),
    [
        (size, 0, "0 bytes"),
        (size, 17, "17 bytes"),
        (size, 58_279, "58.3 kB"),
        (size, 900_000_000, "900 MB"),
        (size, 999_600_000, "1 GB"),
        (size, 12_340_000_000, "12.3 GB"),
        (size, 352_490_000_000, "352 GB"),
        (size, 1_234_500_000_000, "1.23 TB"),
        (size, 2**60, "1,150,000 TB"),
        (rate, 0.0, "0 bytes/s"),
        (rate, 11_750_000.0, "11.8 MB/s"),
        (rate, 2.35e9, "2.35 GB/s"),
        (duration, 0.0, "0 s"),
        (duration, 0.0000123, "0.0123 ms"),
        (duration, 0.0278, "27.8 ms"),
        (duration, 0.9996, "1 s"),
        (duration, 7.834, "7.83 s"),
        (duration, 99.94, "99.9 s"),
        (duration, 99.96, "1 min 40 s"),
        (duration, 3599.6, "1 h 0 min"),
        (duration, 12_000, "3 h 20 min"),
        (percent, 0.0061, "0.61%"),
        (percent, 0.9734, "97.3%"),
        (percent, 1.0, "100%"),
        (number, 2350.0, "2,350"),
        (number, 1e-9, "0"),
    ],
)
def test_numbers_read_well_at_every_size(shown: Callable[[float], str], value: float, text: str) -> None:
    assert shown(value) == text


@given(st.integers(1, 10**15))
def test_what_is_shown_is_read_as_about_the_same(nbytes: int) -> None:
    text = size(nbytes)
    assert parse_size(text.replace(",", "").replace("bytes", "B")) == pytest.approx(nbytes, rel=0.006)
    assert "e" not in text.removesuffix("bytes") and len(text) <= 10
