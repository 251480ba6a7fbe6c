"""Bytes of RAM: as people write them, shared out, and kept to."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from runner import BloomdeskError
from runner.generation.memory_plan import (
    FEWEST_BUFFERS,
    MARGIN,
    MOST_BUFFERS,
    Budget,
    parse_size,
    share_out,
    shown_size,
    spread,
)
from scripts.fakehub import checkpoint as make_checkpoint
from toolkit.commands.convert import convert

ROOT = Path(__file__).resolve().parents[3]
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
    with pytest.raises(BloomdeskError, match="is no amount of memory") as caught:
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
    ("size", "text"),
    [
        (0, "0 MB"),
        (900_000_000, "900 MB"),
        (994_400_000, "994 MB"),
        (995_000_000, "1.0 GB"),
        (12_340_000_000, "12.3 GB"),
        (352_000_000_000, "352.0 GB"),
        (1_234_500_000_000, "1,234.5 GB"),
    ],
)
def test_sizes_are_shown_short(size: int, text: str) -> None:
    assert shown_size(size) == text


@given(st.integers(10**6, 10**13))
def test_what_is_shown_is_read_as_about_the_same(size: int) -> None:
    assert abs(parse_size(shown_size(size).replace(",", "")) - size) <= max(0.5e6, size * 0.051)


# Sharing out.

SIZES = st.lists(st.integers(1, 40 * MIB), min_size=1, max_size=120)
PARTS = st.integers(0, 2**32)


def shared(total: int, sizes: list[int], process: int = 0, cache: int = 0, activations: int = 0) -> Budget:
    return share_out(total, process, cache, activations, sizes, max(sizes) + 4096)


@given(SIZES, PARTS, PARTS, PARTS, st.integers(0, 2**34))
@example([10], 0, 0, 0, MARGIN + 9)
def test_nothing_is_promised_twice(
    sizes: list[int], process: int, cache: int, activations: int, total: int
) -> None:
    try:
        budget = shared(total, sizes, process, cache, activations)
    except BloomdeskError:
        return
    assert process + cache + activations + MARGIN + budget.resident_bytes + budget.read_ahead <= total
    assert (budget.total, budget.process, budget.cache, budget.activations) == (
        total,
        process,
        cache,
        activations,
    )
    assert budget.resident_bytes == sum(sizes[index] for index in budget.resident)
    assert budget.resident_bytes + budget.streamed_bytes == sum(sizes)
    if budget.streamed_bytes:
        assert FEWEST_BUFFERS <= budget.buffers <= MOST_BUFFERS
        assert budget.buffer_nbytes >= max(sizes)


@given(SIZES, PARTS, PARTS, PARTS)
def test_what_fits_stays(sizes: list[int], process: int, cache: int, activations: int) -> None:
    needed = sum(sizes) + process + cache + activations + MARGIN
    budget = shared(needed, sizes, process, cache, activations)
    assert budget.resident == frozenset(range(len(sizes)))
    assert (budget.buffers, budget.read_ahead, budget.streamed_bytes) == (0, 0, 0)


@given(SIZES, PARTS, PARTS, PARTS, st.integers(0, 2**34))
def test_an_amount_that_is_too_little_names_one_that_is_enough(
    sizes: list[int], process: int, cache: int, activations: int, total: int
) -> None:
    try:
        shared(total, sizes, process, cache, activations)
    except BloomdeskError as error:
        refused = error
    else:
        return
    assert refused.message.startswith(f"{shown_size(total)} of RAM are too little")
    for part in (process + MARGIN, cache, activations):
        assert shown_size(part) in refused.message
    enough = parse_size(re.search(r"--ram (\S+GB)", refused.hint)[1])
    assert enough > total
    shared(enough, sizes, process, cache, activations)
    least = min(FEWEST_BUFFERS * (max(sizes) + 4096), sum(sizes)) + process + cache + activations + MARGIN
    assert f"{shown_size(least)} are needed" in refused.message
    shared(least, sizes, process, cache, activations)
    with pytest.raises(BloomdeskError):
        shared(least - 1, sizes, process, cache, activations)


@given(SIZES, st.integers(0, 2**32))
def test_no_room_is_left_in_which_a_streamed_chunk_would_fit(sizes: list[int], room: int) -> None:
    chosen = spread(sizes, room)
    left = room - sum(sizes[index] for index in chosen)
    assert left >= 0
    assert all(sizes[index] > left for index in range(len(sizes)) if index not in chosen)


@given(SIZES, st.floats(0, 1))
def test_every_segment_of_a_pass_has_its_share_of_what_stays(sizes: list[int], part: float) -> None:
    """So the disk is never idle for more than a few chunks, wherever the pass is."""
    room = int(sum(sizes) * part)
    chosen = spread(sizes, room)
    here = passed = 0
    for index, size in enumerate(sizes):
        passed += size
        here += size if index in chosen else 0
        assert abs(here - passed * part) <= 2 * max(sizes) + 1


@given(st.integers(2, 400), st.data())
def test_chunks_of_one_size_alternate_as_evenly_as_can_be(count: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, count - 1))
    chosen = spread([7] * count, 7 * kept + 3)
    assert len(chosen) == kept
    runs = "".join("r" if index in chosen else "s" for index in range(count))
    longest = max(map(len, runs.split("s")))
    assert longest <= 2 * -(-kept // (count - kept)) + 1


@given(SIZES, st.floats(0, 1), st.integers(0, 2**32))
def test_more_room_moves_nothing_that_stays(sizes: list[int], part: float, more: int) -> None:
    room = int(sum(sizes) * part)
    before = spread(sizes, room)
    after = spread(sizes, room + more, before)
    assert before <= after
    left = room + more - sum(sizes[index] for index in after)
    assert left >= 0 and all(sizes[index] > left for index in range(len(sizes)) if index not in after)
    less = sum(sizes[index] for index in before) - 1
    assert spread(sizes, less, before) == spread(sizes, less)


@pytest.mark.parametrize("room", [-5, 0])
def test_without_room_nothing_stays(room: int) -> None:
    assert spread([3, 4, 5], room) == frozenset()


def test_more_ram_never_streams_more_than_a_chunk_more() -> None:
    sizes = [30 * MIB] * 12 + [17 * MIB] * 5 + [31 * MIB] * 20
    streamed = [shared(MARGIN + 100 * MIB + step * 10 * MIB, sizes).streamed_bytes for step in range(110)]
    assert streamed[0] > streamed[-1] == 0
    assert all(after <= before + 2 * max(sizes) for before, after in pairwise(streamed))


# And kept to.

IN_LITTLE_RAM = r"""
import ctypes, faulthandler, mmap, os, re, sys
from dataclasses import replace
from pathlib import Path
faulthandler.dump_traceback_later(100, exit=True)
import torch
torch.set_num_threads(1)
import runner, runner.system as system
from runner.generation.memory_plan import MARGIN
model = runner.load(sys.argv[1])
chunks = model.weights.stream.chunks
for path in {chunk.file.path for chunk in chunks}:  # what writing them left there
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
def cached(chunk):
    with chunk.file.path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    size, first = mmap.PAGESIZE, -(-chunk.start // mmap.PAGESIZE)  # pages at the ends may be a neighbour's
    count = (chunk.start + chunk.nbytes) // size - first
    pages, address = (ctypes.c_ubyte * count)(), ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address + first * size), ctypes.c_size_t(count * size), pages) == 0
    return sum(page & 1 for page in pages) * size
if sum(map(cached, chunks)) > 1e6:
    sys.exit("the file system keeps its pages")
least = replace(model, ram=2**50).budget(24, 16)
ram = least.process + least.cache + least.activations + MARGIN + 3 * 34 * 2**20 + 40 * 2**20
model = replace(model, ram=ram)
generation = model.generate(list(range(5, 21)), max_new_tokens=3)
tokens = list(generation)
shares = generation.batch.capacity.shares
assert shares.resident_bytes > 20e6 and shares.streamed_bytes > 60e6, shares
peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(ram, peak, sum(map(cached, chunks)), *tokens)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at memory as Linux shows it")
def test_a_run_keeps_to_its_ram_and_leaves_the_page_cache_alone(tmp_path: Path) -> None:
    make_checkpoint.synthetic(tmp_path / "source", hidden_size=1024, heads=16, blocks=4, vocab_size=60_000)
    convert(tmp_path / "source", tmp_path / "bloom")  # 220 MB
    run = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_RAM, str(tmp_path / "bloom")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    if "keeps its pages" in run.stderr:
        pytest.skip(run.stderr)
    assert run.returncode == 0, run.stderr
    ram, peak, left_in_cache, *tokens = map(int, run.stdout.split())
    assert len(tokens) == 3
    assert peak <= ram
    assert left_in_cache < 3e6  # rows of the embedding
