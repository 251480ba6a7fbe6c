"""The memory plan: how bytes of RAM are divided, and that a run keeps to them."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runner import BloomdeskError, units
from runner.generation.memory_plan import (
    FEWEST_BUFFERS,
    MARGIN,
    MOST_BUFFERS,
    MemoryPlan,
    MemoryRequest,
    memory_plan,
    spread,
)
from runner.units import parse_size
from runner.weights.chunks import buffer_bytes
from scripts.fakehub import checkpoint as make_checkpoint
from toolkit.commands.convert import convert

ROOT = Path(__file__).resolve().parents[3]
MIB, GB = 2**20, 10**9


SIZES = st.lists(st.integers(1, 40 * MIB), min_size=1, max_size=120)
PARTS = st.integers(0, 2**32)


@dataclass(frozen=True)
class Sizes(MemoryRequest):
    """A request whose caches and activations are given in bytes."""

    cache: int = 0
    activations: int = 0


def planned(
    total: int, sizes: list[int], process: int = 0, cache: int = 0, activations: int = 0
) -> MemoryPlan:
    return memory_plan(Sizes(None, tuple(sizes), total, process, (), 0, cache=cache, activations=activations))


@pytest.mark.slow
@given(SIZES, PARTS, PARTS, PARTS, st.integers(0, 2**34))
@example([10], 0, 0, 0, MARGIN + 9)
def test_a_plan_never_exceeds_its_total(
    sizes: list[int], process: int, cache: int, activations: int, total: int
) -> None:
    try:
        plan = planned(total, sizes, process, cache, activations)
    except BloomdeskError:
        return
    assert process + cache + activations + MARGIN + plan.resident_bytes + plan.read_ahead <= total
    assert plan.resident_bytes == sum(sizes[index] for index in plan.resident)
    assert plan.resident_bytes + plan.streamed_bytes == sum(sizes)
    if plan.streamed_bytes:
        assert FEWEST_BUFFERS <= plan.buffers <= MOST_BUFFERS
        assert plan.request.buffer_nbytes >= max(sizes)


@given(SIZES, PARTS, PARTS, PARTS)
def test_everything_is_resident_if_it_fits(
    sizes: list[int], process: int, cache: int, activations: int
) -> None:
    needed = sum(sizes) + process + cache + activations + MARGIN
    plan = planned(needed, sizes, process, cache, activations)
    assert plan.resident == frozenset(range(len(sizes)))
    assert (plan.buffers, plan.read_ahead, plan.streamed_bytes) == (0, 0, 0)


@given(SIZES, PARTS, PARTS, PARTS, st.integers(0, 2**34))
def test_an_error_names_an_amount_of_ram_that_is_enough(
    sizes: list[int], process: int, cache: int, activations: int, total: int
) -> None:
    try:
        planned(total, sizes, process, cache, activations)
    except BloomdeskError as error:
        refused = error
    else:
        return
    assert refused.message.startswith(f"{units.size(total)} of RAM are too little")
    for part in (process + MARGIN, cache, activations):
        assert units.size(part) in refused.message
    enough = parse_size(re.search(r"--ram (\S+GB)", refused.hint)[1])
    assert enough > total
    planned(enough, sizes, process, cache, activations)
    least = (
        min(FEWEST_BUFFERS * buffer_bytes(max(sizes)), sum(sizes)) + process + cache + activations + MARGIN
    )
    assert f"{units.size(least)} are needed" in refused.message
    planned(least, sizes, process, cache, activations)
    with pytest.raises(BloomdeskError):
        planned(least - 1, sizes, process, cache, activations)


@given(SIZES, st.integers(0, 2**32))
def test_no_streamed_chunk_fits_into_the_rest(sizes: list[int], room: int) -> None:
    chosen = spread(sizes, room)
    left = room - sum(sizes[index] for index in chosen)
    assert left >= 0
    assert all(sizes[index] > left for index in range(len(sizes)) if index not in chosen)


@given(SIZES, st.floats(0, 1))
def test_resident_chunks_are_spread_evenly_over_the_pass(sizes: list[int], part: float) -> None:
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
def test_resident_chunks_stay_resident_with_more_room(sizes: list[int], part: float, more: int) -> None:
    room = int(sum(sizes) * part)
    before = spread(sizes, room)
    after = spread(sizes, room + more, before)
    assert before <= after
    left = room + more - sum(sizes[index] for index in after)
    assert left >= 0 and all(sizes[index] > left for index in range(len(sizes)) if index not in after)
    less = sum(sizes[index] for index in before) - 1
    fewer = spread(sizes, less, before)
    assert fewer <= before and sum(sizes[index] for index in fewer) <= max(0, less)


@pytest.mark.parametrize("room", [-5, 0])
def test_without_room_nothing_is_resident(room: int) -> None:
    assert spread([3, 4, 5], room) == frozenset()


def test_more_ram_never_streams_more_than_a_chunk_more() -> None:
    sizes = [30 * MIB] * 12 + [17 * MIB] * 5 + [31 * MIB] * 20
    streamed = [planned(MARGIN + 100 * MIB + step * 10 * MIB, sizes).streamed_bytes for step in range(110)]
    assert streamed[0] > streamed[-1] == 0
    assert all(after <= before + 2 * max(sizes) for before, after in pairwise(streamed))


# Runs keep to the plan.

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
least = replace(model, ram=2**50).memory_plan(24, 16).request
ram = least.process + least.cache + least.activations + MARGIN + 3 * 34 * 2**20 + 40 * 2**20
model = replace(model, ram=ram)
generation = model.generate(list(range(5, 21)), max_new_tokens=3)
tokens = list(generation)
plan = generation.plan
assert plan.resident_bytes > 20e6 and plan.streamed_bytes > 60e6, plan
peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
streamed = [chunk for index, chunk in enumerate(chunks) if index not in plan.resident]
print(ram, peak, sum(map(cached, streamed)), *tokens)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at memory as Linux shows it")
def test_a_run_stays_within_its_ram_and_leaves_the_page_cache_alone(tmp_path: Path) -> None:
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
