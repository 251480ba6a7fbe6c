"""The stream: the bits of the files whatever stays, is read ahead or goes wrong, and no wait without an end."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runner.budget
import runner.kernel
import runner.stream
from runner import BloomdeskError, pieces, system
from runner.model import Model
from runner.pieces import FileState, Piece
from runner.stream import Stream
from runner.weights import Weights

ROOT = Path(__file__).resolve().parents[1]
IDS = [5, 700, 31, 9, 1101, 64, 8]
SMALL_PIECE = 9000  # no multiple of a page, nor of a row
LONGEST = 60  # seconds; what takes longer hangs


def promptly(action: Callable[[], None]) -> None:
    """Do it; fails where it hangs."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LONGEST)
    assert not thread.is_alive(), "it hangs"
    if raised:
        raise raised[0]


def soon(condition: Callable[[], bool]) -> None:
    """Wait for what other threads will make true."""
    deadline = time.monotonic() + LONGEST
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


# One file of 13 odd-sized pieces, without a model around it.


@dataclass
class Shelf:
    path: Path
    data: bytes = field(repr=False)
    pieces: tuple[Piece, ...] = field(repr=False)

    def stream(self, resident: frozenset[int] = frozenset(), slots: int = 3, readers: int = 2) -> Stream:
        made = Stream(self.pieces, readers)
        made.arrange(resident, slots)
        return made

    def holds(self, index: int, weights: torch.Tensor) -> bool:
        piece = self.pieces[index]
        return weights.numpy().tobytes() == self.data[piece.start :][: piece.nbytes]

    def check(self, stream: Stream, index: int) -> None:
        with stream.piece(index) as weights:
            assert weights.shape == self.pieces[index].shape
            assert self.holds(index, weights)

    def check_pass(self, stream: Stream) -> None:
        for index in range(len(self.pieces)):
            self.check(stream, index)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def make_shelf(path: Path) -> Shelf:
    sizes = [1, 4095, 4096, 4097, 9000, 12288, 5000, 77, 8192, 20000, 3, 4096, 6001]
    skew = 777
    data = torch.randint(0, 256, (skew + sum(sizes),), dtype=torch.uint8).numpy().tobytes()
    path.write_bytes(data)
    state, found, at = FileState.of(path), [], skew
    for size in sizes:
        found.append(Piece(state, at, 0, 1, torch.uint8, (1, size)))
        at += size
    return Shelf(path, data, tuple(found))


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return make_shelf(tmp_path / "part.safetensors")


@pytest.fixture(scope="module")
def lasting_shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("shelf") / "part.safetensors")


@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("slots", [2, 3, 7, 40])
def test_passes_wrap_around(shelf: Shelf, slots: int, readers: int) -> None:
    stream = shelf.stream(slots=slots, readers=readers)
    promptly(lambda: [shelf.check_pass(stream) for _ in range(6)])
    assert stream.traffic.bytes_streamed == 6 * shelf.nbytes
    assert stream.traffic.bytes_loaded == 0


PIECES = st.integers(0, 12)
EVENTS = st.one_of(
    st.tuples(st.just("take"), st.integers(1, 20)),
    st.tuples(st.just("jump"), PIECES),
    st.tuples(st.just("raise"), st.booleans()),
    st.tuples(st.just("lose"), st.booleans()),
    st.tuples(st.just("arrange"), st.frozensets(PIECES), st.integers(2, 6)),
    st.tuples(st.just("pause")),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(EVENTS, max_size=12), st.integers(1, 4))
def test_any_order_of_events_gives_the_bits_of_the_file(
    lasting_shelf: Shelf, events: list[tuple], readers: int
) -> None:
    shelf = lasting_shelf
    stream = Stream(shelf.pieces, readers)
    index = 0

    def act(kind: str, *how: object) -> None:
        nonlocal index
        if kind == "take":
            for _ in range(how[0]):
                shelf.check(stream, index)
                index = (index + 1) % len(shelf.pieces)
        elif kind == "jump":
            index = how[0]
        elif kind == "raise":
            with pytest.raises(KeyboardInterrupt), stream.piece(index):
                raise KeyboardInterrupt
            index = index if how[0] else 0
        elif kind == "lose":  # an interruption between taking and releasing
            stream._take(index)
            index = index if how[0] else 0
        elif kind == "arrange":
            stream.arrange(*how)
        else:
            time.sleep(0.001)

    promptly(lambda: [act(*event) for event in [*events, ("take", 30)]])


def test_a_slot_in_use_is_not_read_into(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class CountedSlot(runner.stream.Slot):
        def __init__(self, nbytes: int) -> None:
            made.append(nbytes)
            super().__init__(nbytes)

    monkeypatch.setattr(runner.stream, "Slot", CountedSlot)
    stream = shelf.stream(slots=3)
    for _ in range(2):
        for index in range(len(shelf.pieces)):
            with stream.piece(index) as weights:
                soon(lambda: len(stream._shared.ready) == 2)  # both others are full, so the readers rest
                assert shelf.holds(index, weights)
    assert len(made) == 3
    assert all(nbytes >= 20000 and nbytes % system.PAGE == 0 for nbytes in made)


def test_the_next_pass_is_read_while_this_one_ends(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    fetch = runner.stream._fetch
    monkeypatch.setattr(
        runner.stream,
        "_fetch",
        lambda piece, slot, stays: (fetched.append(piece), fetch(piece, slot, stays=stays))[1],
    )
    stream = shelf.stream(slots=4)
    promptly(lambda: shelf.check_pass(stream))
    soon(lambda: len(fetched) == len(shelf.pieces) + 4)
    assert set(fetched[-4:]) == set(shelf.pieces[:4])
    promptly(lambda: [shelf.check(stream, index) for index in range(4)])
    assert [fetched.count(piece) for piece in shelf.pieces[:4]] == [2] * 4


def test_what_is_resident_is_read_once(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    fetch = runner.stream._fetch
    monkeypatch.setattr(
        runner.stream,
        "_fetch",
        lambda piece, slot, stays: (fetched.append((piece.start, stays)), fetch(piece, slot, stays=stays))[1],
    )
    resident = frozenset({0, 3, 4, 9, 12})
    stream = shelf.stream(resident, slots=2)
    promptly(lambda: [shelf.check_pass(stream) for _ in range(4)])
    kept = sum(shelf.pieces[index].nbytes for index in resident)
    assert stream.traffic.bytes_loaded == kept
    assert stream.traffic.bytes_streamed == 4 * (shelf.nbytes - kept)
    assert stream.streamed_bytes == shelf.nbytes - kept
    assert stream.traffic.bytes_read == kept + 4 * (shelf.nbytes - kept)
    assert sorted(start for start, stays in fetched if stays) == sorted(
        shelf.pieces[index].start for index in resident
    )


def test_everything_is_resident_until_arranged_otherwise(shelf: Shelf) -> None:
    stream = Stream(shelf.pieces)
    promptly(lambda: [shelf.check_pass(stream) for _ in range(3)])
    assert (stream.traffic.bytes_loaded, stream.traffic.bytes_streamed) == (shelf.nbytes, 0)
    assert stream.streamed_bytes == 0
    assert not stream._shared.slots
    assert stream._shared.at_rest  # and pieces are handed out in any order, with nothing to wait for
    promptly(lambda: [shelf.check(stream, index) for index in (5, 2, 2, 12, 0)])
    assert stream._take(3)[1] is None
    stream.arrange(frozenset({1}), 2)
    promptly(lambda: [shelf.check_pass(stream) for _ in range(2)])
    assert stream.traffic.bytes_streamed == 2 * (shelf.nbytes - shelf.pieces[1].nbytes)


def test_what_stays_resident_through_an_arrangement_is_not_read_again(shelf: Shelf) -> None:
    stream = shelf.stream(frozenset({1, 4, 9}))
    promptly(lambda: shelf.check_pass(stream))
    before = stream.traffic.bytes_loaded
    stream.arrange(frozenset({4, 5}), 2)
    promptly(lambda: shelf.check_pass(stream))
    assert stream.traffic.bytes_loaded - before == shelf.pieces[5].nbytes
    stream.arrange(frozenset({1, 4}), 2)  # 1 was let go in between
    before = stream.traffic.bytes_loaded
    promptly(lambda: shelf.check_pass(stream))
    assert stream.traffic.bytes_loaded - before == shelf.pieces[1].nbytes


def test_the_same_arrangement_again_keeps_what_was_read_ahead(shelf: Shelf) -> None:
    stream = shelf.stream(slots=4)
    promptly(lambda: shelf.check_pass(stream))
    soon(lambda: len(stream._shared.ready) == 4)
    slots = set(stream._shared.ready.values())
    stream.arrange(frozenset(), 4)
    assert set(stream._shared.ready.values()) == slots


@pytest.mark.parametrize("slots", [0, 1])
def test_too_few_slots_are_refused(shelf: Shelf, slots: int) -> None:
    with pytest.raises(ValueError, match="slots cannot hold"):
        Stream(shelf.pieces).arrange(frozenset({1}), slots)
    Stream(shelf.pieces).arrange(
        frozenset(range(len(shelf.pieces))), slots
    )  # with nothing to stream it is fine


@pytest.mark.parametrize("place", [0, 1, 6, 12])
@pytest.mark.parametrize("resident", [frozenset(), frozenset({0, 1, 6}), frozenset(range(13))])
@pytest.mark.parametrize("how", ["inside", "between", "lost"])
def test_after_an_interruption_a_pass_begins_anew(
    shelf: Shelf, place: int, resident: frozenset[int], how: str
) -> None:
    stream = shelf.stream(resident, slots=2)

    def interrupted() -> None:
        for index in range(place):
            shelf.check(stream, index)
        if how == "inside":
            with pytest.raises(KeyboardInterrupt), stream.piece(place):
                raise KeyboardInterrupt
        elif how == "lost":  # it came between taking the piece and releasing it
            stream._take(place)

    for _ in range(4):
        promptly(interrupted)
    promptly(lambda: [shelf.check_pass(stream) for _ in range(2)])


def test_an_interruption_while_waiting_is_no_loss(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = shelf.stream(slots=2)
    waits = stream._shared.changed.wait

    def interrupted(timeout: float | None = None) -> bool:
        if timeout is not None:  # the pass, and not a reader
            raise KeyboardInterrupt
        return waits(timeout)

    monkeypatch.setattr(stream._shared.changed, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(1000):
            shelf.check_pass(stream)
    monkeypatch.undo()
    promptly(lambda: [shelf.check_pass(stream) for _ in range(2)])


def readers_alive() -> list[threading.Thread]:
    return [
        thread
        for thread in threading.enumerate()
        if getattr(thread, "_target", None) is runner.stream._read_ahead
    ]


def test_readers_end_with_their_stream(shelf: Shelf) -> None:
    before = set(readers_alive())
    stream = shelf.stream(slots=3, readers=4)
    promptly(lambda: shelf.check_pass(stream))
    mine = set(readers_alive()) - before
    assert len(mine) == 4
    stream = None
    gc.collect()
    soon(lambda: not mine & set(readers_alive()))


def test_a_stream_may_end_on_one_of_its_readers(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage is collected on whatever thread it is."""
    before = set(readers_alive())
    problems: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", problems.append)
    monkeypatch.setattr(threading, "excepthook", problems.append)
    holder = [shelf.stream(slots=3, readers=2)]
    promptly(lambda: shelf.check_pass(holder[0]))
    mine = set(readers_alive()) - before
    soon(lambda: len(holder[0]._shared.ready) == 3)
    fetch = runner.stream._fetch
    last: list[threading.Thread] = []

    def fetch_and_drop(piece: Piece, slot: runner.stream.Slot, stays: bool) -> None:
        soon(lambda: bool(dropped))
        holder.clear()
        last.append(threading.current_thread())
        fetch(piece, slot, stays=stays)

    monkeypatch.setattr(runner.stream, "_fetch", fetch_and_drop)
    dropped: list[bool] = []
    shelf.check(holder[0], 0)  # frees a slot, which a reader then fills
    dropped.append(True)
    soon(lambda: not mine & set(readers_alive()))
    assert last and last[0] in mine
    assert not problems


# Whole passes of models whose matrices are cut into many small pieces.


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def opened(directory: Path, *, readers: int = 2, threads: int = 1) -> Model:
    model = runner.load(directory)
    with computing_with(threads):
        return replace(model, weights=Weights.open(directory, readers=readers))


def arrangement(weights: Weights, name: str) -> tuple[frozenset[int], int]:
    count = len(weights.stream.pieces)
    return {
        "resident": (frozenset(range(count)), 0),
        "half": (frozenset(range(0, count, 2)), 3),
        "first": (frozenset(range(count // 3)), 5),
        "nothing": (frozenset(), 2),
    }[name]


def logits_of(model: Model, resident: frozenset[int], slots: int) -> torch.Tensor:
    """A prompt and three cached steps, all rows of them."""
    cache = model.cache(len(IDS) + 3)
    model.weights.stream.arrange(resident, slots)
    steps = [model.forward(IDS, cache, all_rows=True)]
    steps += [model.forward([token], cache) for token in (12, 1100, 77)]
    return torch.cat(steps)


@pytest.fixture(scope="module")
def expected(prepared) -> Callable[[Path], torch.Tensor]:
    """Logits with everything resident and matrices in one piece each."""
    known: dict[Path, torch.Tensor] = {}

    def of(directory: Path) -> torch.Tensor:
        if directory not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pieces, "LARGEST_PIECE", 2**40)
                model = opened(directory)
            known[directory] = logits_of(model, *arrangement(model.weights, "resident"))
            assert known[directory].isfinite().all()
        return known[directory]

    return of


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("readers", "threads", "largest"),
    [(1, 2, SMALL_PIECE), (2, 1, 4096 * 3), (4, 3, SMALL_PIECE), (2, 3, 32 * 2**20)],
)
def test_logits_have_the_same_bits_for_every_budget(
    prepared, expected, monkeypatch: pytest.MonkeyPatch, dtype: str, readers: int, threads: int, largest: int
) -> None:
    directory = prepared(dtype=dtype)[1]
    wanted = expected(directory)
    monkeypatch.setattr(pieces, "LARGEST_PIECE", largest)
    monkeypatch.setattr(runner.kernel, "WORTH_SHARING", 0)
    model = opened(directory, readers=readers, threads=threads)
    if largest == SMALL_PIECE:
        assert any(piece.start % system.PAGE for piece in model.weights.stream.pieces)
    for name in ("nothing", "half", "resident", "first"):  # one after another, so they are also re-arranged
        found: list[torch.Tensor] = []
        shares = arrangement(model.weights, name)
        promptly(lambda found=found, shares=shares: found.append(logits_of(model, *shares)))
        assert torch.equal(found[0], wanted), name


def streaming_ram(model: Model, capacity: int, share: float) -> int:
    """RAM in which `share` of the matrices stay resident."""
    plenty = replace(model, ram=2**50).budget(capacity, len(IDS))
    weights = [piece.nbytes for piece in model.weights.stream.pieces]
    ahead = runner.budget.FEWEST_SLOTS * max(map(runner.stream.slot_bytes, weights))
    return plenty.process + plenty.cache + plenty.activations + ahead + int(share * sum(weights))


@pytest.mark.parametrize("share", [0.02, 0.4, 0.9])
def test_generations_in_a_row_stream_under_a_budget(
    prepared, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    directory = prepared()[1]
    wanted = [list(runner.load(directory).generate(IDS, max_new_tokens=new)) for new in (5, 9, 5)]
    monkeypatch.setattr(pieces, "LARGEST_PIECE", SMALL_PIECE)
    monkeypatch.setattr(runner.budget, "MARGIN", 0)
    model = runner.load(directory)
    model = replace(model, ram=streaming_ram(model, len(IDS) + 9, share))
    weights = sum(piece.nbytes for piece in model.weights.stream.pieces)

    def generate() -> None:
        for new, ids in zip((5, 9, 5), wanted, strict=True):
            generation = model.generate(IDS, max_new_tokens=new, speculate="off")
            streamed = generation.streamed_bytes_per_pass
            assert 0 < streamed < weights
            assert list(generation) == ids
            assert new * streamed <= generation.bytes_read <= new * streamed + weights - streamed

    promptly(generate)


def test_fifty_models_leave_no_threads_and_no_files(prepared) -> None:
    directory = prepared()[1]

    def use() -> None:
        model = opened(directory)
        model.weights.stream.arrange(frozenset({0, 3}), 2)
        cache = model.cache(4)
        model.weights.stream.arrange(frozenset({0, 3}), 2)
        model.forward([5], cache)

    def count() -> tuple[int, int, int]:
        gc.collect()
        maps = Path("/proc/self/maps")
        mapped = maps.read_text().count(str(directory)) if maps.exists() else 0
        files = Path("/proc/self/fd")
        return len(readers_alive()), mapped, len(list(files.iterdir())) if files.exists() else 0

    promptly(use)
    before = count()
    for _ in range(50):
        promptly(use)
    soon(lambda: count() <= before)


# What goes wrong.


@pytest.fixture
def directory(prepared, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared()[1], tmp_path / "bloom"))


PARTS = ["block_00.safetensors", "block_01.safetensors", "embedding.safetensors"]
BUDGETS = ["nothing", "half", "resident"]


@contextmanager
def damaged(path: Path, kind: str) -> Iterator[None]:
    """The file spoiled, and then as it was."""
    found, kept = path.stat(), path.with_suffix(".kept")
    if kind == "touched":
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000_000))
        yield
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
        return
    path.rename(kept)
    if kind == "replaced":
        shutil.copyfile(kept, path)
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000_000))
    yield
    path.unlink(missing_ok=True)
    kept.rename(path)


@pytest.mark.parametrize("kind", ["touched", "replaced", "deleted"])
@pytest.mark.parametrize(
    ("part", "used"), [(PARTS[0], False), (PARTS[1], True), (PARTS[2], False), (PARTS[2], True)]
)
def test_a_file_that_changes_is_named_and_works_again_as_it_was(
    directory: Path, expected, prepared, monkeypatch: pytest.MonkeyPatch, kind: str, part: str, used: bool
) -> None:
    wanted = expected(prepared()[1])
    monkeypatch.setattr(pieces, "LARGEST_PIECE", SMALL_PIECE)
    for budget in BUDGETS:
        model = opened(directory)
        shares = arrangement(model.weights, budget)

        def use(model: Model = model, shares: tuple[frozenset[int], int] = shares) -> torch.Tensor:
            found: list[torch.Tensor] = []
            promptly(lambda: found.append(logits_of(model, *shares)))
            return found[0]

        if used:
            use()
        with damaged(directory / part, kind):
            for _ in range(2):
                with pytest.raises(BloomdeskError) as caught:
                    use()
                assert str(directory / part) in caught.value.message
                assert f"bloomdesk verify {directory}" in caught.value.hint
        assert torch.equal(use(), wanted)


# Part, the size it is cut to, budget, and whether a pass went before.
TRUNCATIONS = [
    ("block_01.safetensors", 8000, "nothing", True),
    ("block_01.safetensors", 0, "half", True),
    ("block_00.safetensors", 0, "resident", True),
    ("block_00.safetensors", 5000, "resident", False),
    ("embedding.safetensors", 40_000, "half", False),
    ("embedding.safetensors", 0, "resident", True),
]
TRUNCATE = """
import faulthandler, json, os, sys
from pathlib import Path
import runner
from runner import BloomdeskError, pieces
faulthandler.dump_traceback_later({longest}, exit=True)
pieces.LARGEST_PIECE = 9000
directory = Path(sys.argv[1])
for part, size, budget, used in json.loads(sys.argv[2]):
    print(part, size, budget, used, flush=True)
    path = directory / part
    model = runner.load(directory)
    count = len(model.weights.stream.pieces)
    shares = {{"resident": (range(count), 0), "half": (range(0, count, 2), 3), "nothing": ((), 2)}}[budget]
    def use():
        cache = model.cache(8)
        model.weights.stream.arrange(frozenset(shares[0]), shares[1])
        return model.forward([5, 700, 31], cache).tolist()
    expected = runner.load(directory)
    expected = expected.forward([5, 700, 31], expected.cache(8)).tolist()
    if used:
        assert use() == expected
    data, found = path.read_bytes(), path.stat()
    os.truncate(path, size)
    for _ in range(2):
        try: use()
        except BloomdeskError as error:
            assert str(path) in error.message and "bloomdesk verify" in error.hint, error.worded()
        else: raise SystemExit("it was not noticed")
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert use() == expected
print("through")
"""


def test_a_truncated_file_is_no_bus_error(directory: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", TRUNCATE.format(longest=LONGEST), str(directory), json.dumps(TRUNCATIONS)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=2 * LONGEST,
    )
    assert run.returncode == 0, (run.returncode, run.stdout, run.stderr)  # a bus error is -7
    assert run.stdout.endswith("through\n")


class Failing(io.FileIO):
    """A file on a disk with a fault."""

    code = errno.EIO

    def readinto(self, buffer: object) -> int:
        raise OSError(self.code, os.strerror(self.code))


def failing_reads(
    monkeypatch: pytest.MonkeyPatch, part: str, times: float, code: int = errno.EIO
) -> list[Path]:
    """The next `times` reads of that part fail, however they are made; what has failed so far."""
    failed: list[Path] = []

    def faulty(path: Path) -> bool:
        if path.name == part and len(failed) < times:
            failed.append(path)
            return True
        return False

    open_for_streaming = system.open_for_streaming

    def open_faulty(path: Path, *, past_the_cache: bool) -> io.FileIO:
        if faulty(path):
            return Failing(path, "r")
        return open_for_streaming(path, past_the_cache=past_the_cache)

    monkeypatch.setattr(Failing, "code", code)
    monkeypatch.setattr(system, "open_for_streaming", open_faulty)
    monkeypatch.setattr(system, "read_cached", lambda *_: 0)  # or there would be no read to fail
    return failed


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("part", PARTS)
def test_a_faulty_disk_is_named_and_works_again_when_it_does(
    directory: Path, expected, prepared, monkeypatch: pytest.MonkeyPatch, budget: str, part: str
) -> None:
    wanted = expected(prepared()[1])
    monkeypatch.setattr(pieces, "LARGEST_PIECE", SMALL_PIECE)
    readers = 1 if part == PARTS[0] else 4
    model = opened(directory, readers=readers)
    shares = arrangement(model.weights, budget)
    with monkeypatch.context() as patch:
        failed = failing_reads(patch, part, times=float("inf"))
        for _ in range(3):
            with pytest.raises(BloomdeskError, match="cannot be read at bytes") as caught:
                promptly(lambda: logits_of(model, *shares))
            assert str(directory / part) in caught.value.message
            assert os.strerror(errno.EIO) in caught.value.message
            assert caught.value.hint == f"see what is damaged: bloomdesk verify {directory}"
        quiet = len(failed)
        time.sleep(0.05)
        assert len(failed) <= quiet + readers  # a broken disk is not read over and over
    found: list[torch.Tensor] = []
    promptly(lambda: found.append(logits_of(model, *shares)))
    assert torch.equal(found[0], wanted)


def test_a_fault_that_is_over_when_the_piece_is_needed_is_forgotten(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = shelf.stream(slots=3)
    with monkeypatch.context() as patch:
        with stream.piece(0):
            soon(lambda: len(stream._shared.ready) == 2)
            failed = failing_reads(patch, shelf.path.name, times=1)
        soon(lambda: bool(failed))
    promptly(lambda: [shelf.check(stream, index) for index in range(1, len(shelf.pieces))])
    promptly(lambda: shelf.check_pass(stream))


def test_a_failed_first_piece_is_read_again_in_the_next_pass(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = shelf.stream(slots=3)
    with monkeypatch.context() as patch:
        failing_reads(patch, shelf.path.name, times=float("inf"))
        with pytest.raises(BloomdeskError):
            promptly(lambda: shelf.check(stream, 0))
    time.sleep(0.01)
    promptly(lambda: shelf.check_pass(stream))


def test_rows_that_cannot_be_read_are_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runner.load(directory)
    with monkeypatch.context() as patch:
        patch.setattr(system, "open_for_rows", lambda path: Failing(path, "r"))
        with pytest.raises(BloomdeskError, match=r"embedding\.safetensors cannot be read") as caught:
            model.forward([5], model.cache(1))
        assert "bloomdesk verify" in caught.value.hint
    model.forward([5], model.cache(1))


# File systems and systems that can do less.


class Refusing(io.FileIO):
    """A file that opens for reads past the page cache and then cannot do them."""

    def readinto(self, buffer: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


class Halting(io.FileIO):
    """A file that gives less than was asked for."""

    def readinto(self, buffer: memoryview) -> int:
        return super().readinto(buffer[: max(1, len(buffer) // 3)])


@pytest.mark.parametrize("how", ["opening", "reading", "short reads"])
def test_without_reads_past_the_page_cache_the_bits_are_the_same(
    prepared, expected, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    directory = prepared()[1]
    wanted = expected(directory)
    monkeypatch.setattr(pieces, "LARGEST_PIECE", SMALL_PIECE)
    plain = []

    def open_for_streaming(path: Path, *, past_the_cache: bool) -> io.FileIO:
        if past_the_cache and how == "opening":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        if past_the_cache and how == "reading":
            return Refusing(path, "r")
        plain.append(path)
        return (Halting if how == "short reads" else io.FileIO)(path, "r")

    monkeypatch.setattr(system, "open_for_streaming", open_for_streaming)
    model = opened(directory)
    for name in ("nothing", "half"):
        shares = arrangement(model.weights, name)
        found: list[torch.Tensor] = []
        promptly(lambda found=found, shares=shares: found.append(logits_of(model, *shares)))
        assert torch.equal(found[0], wanted)
    assert plain


def test_a_file_that_ends_too_early_is_an_error_and_no_endless_loop(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ending(io.FileIO):
        def readinto(self, buffer: object) -> int:
            return 0

    monkeypatch.setattr(system, "open_for_streaming", lambda path, past_the_cache: Ending(path, "r"))
    with pytest.raises(BloomdeskError, match="the file ends too early"):
        promptly(lambda: shelf.check_pass(shelf.stream()))


def test_without_the_linux_calls_the_bits_are_the_same(
    prepared, expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = prepared()[1]
    wanted = expected(directory)
    monkeypatch.setattr(pieces, "LARGEST_PIECE", SMALL_PIECE)
    monkeypatch.setattr(system, "LINUX_CALLS", False)
    model = opened(directory)
    for name in ("nothing", "half", "resident"):
        shares = arrangement(model.weights, name)
        found: list[torch.Tensor] = []
        promptly(lambda found=found, shares=shares: found.append(logits_of(model, *shares)))
        assert torch.equal(found[0], wanted)
