"""Sizes as people write them, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from runner import BloomdeskError
from runner.units import duration, number, parse_duration, parse_size, percent, rate, size

MIB, GB = 2**20, 10**9


READ = {
    "12GB": 12 * GB, "12 GB": 12 * GB, "12g": 12 * GB, "  1.5 Gb ": 1_500_000_000, "900MB": 900_000_000,
    "900m": 900_000_000, "64k": 64_000, "2TB": 2 * 10**12, "12GiB": 12 * 2**30, "1.5 gi": 3 * 2**29,
    "512MiB": 512 * MIB, "1KiB": 1024, "1TiB": 2**40, "4096": 4096, "4096 B": 4096, ".5GB": 500_000_000, "3.GB": 3 * GB,
}  # fmt: skip


@pytest.mark.parametrize("text", READ)
def test_sizes_are_read_as_people_write_them(text: str) -> None:
    assert parse_size(text) == READ[text]


HOSTILE = [
    "", " ", "GB", "0", "0GB", "-1GB", "+1GB", "1e9", "inf", "nan", "1,5GB", "1.2.3GB", "12 G B", "12XB", "12GBs",
    "12iB", "12 i", "0x10", "1_000", "٣GB", "１２GB", "9" * 400, "9" * 5000 + "TB", "2000000TB", "0.0000001",
    "12\x00GB", "12GB\n;", "\x1b[31m", ".", ".GB",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_other_texts_are_refused(text: str) -> None:
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


SHOWN = {
    size: {
        0: "0 bytes", 17: "17 bytes", 58_279: "58.3 kB", 900_000_000: "900 MB", 999_600_000: "1 GB",
        12_340_000_000: "12.3 GB", 352_490_000_000: "352 GB", 1_234_500_000_000: "1.23 TB", 2**60: "1,150,000 TB",
    },
    rate: {0.0: "0 bytes/s", 11_750_000.0: "11.8 MB/s", 2.35e9: "2.35 GB/s"},
    duration: {
        0.0: "0 s", 0.0000123: "0.0123 ms", 0.0278: "27.8 ms", 0.9996: "1 s", 7.834: "7.83 s", 99.94: "99.9 s",
        99.96: "1 min 40 s", 3599.6: "1 h 0 min", 12_000: "3 h 20 min",
    },
    percent: {0.0061: "0.61%", 0.9734: "97.3%", 1.0: "100%"},
    number: {2350.0: "2,350", 12.345: "12.3", 1e-9: "0"},
}  # fmt: skip


@pytest.mark.parametrize("show", SHOWN, ids=lambda show: show.__name__)
def test_numbers_read_well_at_every_size(show: Callable[[float], str]) -> None:
    assert [show(value) for value in SHOWN[show]] == [*SHOWN[show].values()]


@given(st.integers(1, 10**15))
def test_what_is_shown_is_read_as_about_the_same(nbytes: int) -> None:
    text = size(nbytes)
    assert parse_size(text.replace(",", "").replace("bytes", "B")) == pytest.approx(nbytes, rel=0.006)
    assert "e" not in text.removesuffix("bytes") and len(text) <= 10


def test_a_length_of_time_is_read() -> None:
    read = {
        "12h": 43200,
        "90 min": 5400,
        "45s": 45,
        "2 days": 172800,
        "1.5 H": 5400,
        "0": 0,
        "0s": 0,
        "10m": 600,
    }
    assert {text: parse_duration(text) for text in read} == read
    for text in ("", "h", "12", "-1h", "1e3s", "12 fortnights", "1h30", "9999999s", "inf", "nan"):
        with pytest.raises(BloomdeskError, match="not a length of time") as caught:
            parse_duration(text)
        assert "12h" in caught.value.hint
