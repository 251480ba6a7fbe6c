"""The stream alone: the bits of its file, whatever is resident and in any order of events, and no endless wait."""

from __future__ import annotations

import gc
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runner.weights.stream
from runner.system import platform
from runner.weights.chunks import Chunk
from runner.weights.ring import Buffer
from runner.weights.stream import Stream
from tests.support.streaming import LONGEST, Shelf, make_shelf, promptly, readers_alive, ready, soon


@pytest.fixture(scope="module")
def lasting_shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("shelf") / "part.safetensors")


@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("buffers", [2, 3, 7, 40])
def test_passes_wrap_around(shelf: Shelf, buffers: int, readers: int) -> None:
    stream = shelf.stream(buffers=buffers, readers=readers)
    promptly(lambda: [shelf.check_pass(stream) for _ in range(6)])
    assert stream.traffic.bytes_streamed == 6 * shelf.nbytes
    assert stream.traffic.bytes_loaded == 0


CHUNKS = st.integers(0, 12)


EVENTS = st.one_of(
    st.tuples(st.just("take"), st.integers(1, 20)),
    st.tuples(st.just("jump"), CHUNKS),
    st.tuples(st.just("raise"), st.booleans()),
    st.tuples(st.just("lose"), st.booleans()),
    st.tuples(st.just("arrange"), st.frozensets(CHUNKS), st.integers(2, 6)),
    st.tuples(st.just("pause")),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(EVENTS, max_size=12), st.integers(1, 4))
def test_any_order_of_events_gives_the_bits_of_the_file(
    lasting_shelf: Shelf, events: list[tuple], readers: int
) -> None:
    shelf = lasting_shelf
    stream = Stream(shelf.chunks, readers)
    index = 0

    def act(kind: str, *how: object) -> None:
        nonlocal index
        if kind == "take":
            for _ in range(how[0]):
                shelf.check(stream, index)
                index = (index + 1) % len(shelf.chunks)
        elif kind == "jump":
            index = how[0]
        elif kind == "raise":
            with pytest.raises(KeyboardInterrupt), stream.chunk(index):
                raise KeyboardInterrupt
            index = index if how[0] else 0
        elif kind == "lose":  # an interruption between taking and releasing
            stream.take(index)
            index = index if how[0] else 0
        elif kind == "arrange":
            stream.arrange(*how)
        else:
            time.sleep(0.001)

    promptly(lambda: [act(*event) for event in [*events, ("take", 30)]])


def test_a_buffer_in_use_is_not_read_into(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class CountedBuffer(Buffer):
        def __init__(self, nbytes: int) -> None:
            made.append(nbytes)
            super().__init__(nbytes)

    monkeypatch.setattr(runner.weights.stream, "Buffer", CountedBuffer)
    stream = shelf.stream(buffers=3)
    for _ in range(2):
        for index in range(len(shelf.chunks)):
            with stream.chunk(index) as weights:
                soon(lambda: len(ready(stream)) == 2)  # both others are full, so the readers rest
                assert shelf.holds(index, weights)
    assert len(made) == 3
    assert all(nbytes >= 20000 and nbytes % platform.PAGE == 0 for nbytes in made)


def test_the_next_pass_is_read_while_this_one_ends(shelf: Shelf) -> None:
    fetched = []

    def read(chunk: Chunk, view: memoryview | None) -> None:
        fetched.append(chunk)
        chunk.read(view)

    stream = shelf.stream(buffers=4, read=read)
    promptly(lambda: shelf.check_pass(stream))
    soon(lambda: len(fetched) == len(shelf.chunks) + 4)
    assert set(fetched[-4:]) == set(shelf.chunks[:4])
    promptly(lambda: [shelf.check(stream, index) for index in range(4)])
    assert [fetched.count(chunk) for chunk in shelf.chunks[:4]] == [2] * 4


def test_resident_chunks_are_read_once(shelf: Shelf) -> None:
    fetched = []

    def read(chunk: Chunk, view: memoryview | None) -> None:
        fetched.append((chunk.start, view is None))
        chunk.read(view)

    resident = frozenset({0, 3, 4, 9, 12})
    stream = shelf.stream(resident, buffers=2, read=read)
    promptly(lambda: [shelf.check_pass(stream) for _ in range(4)])
    kept = sum(shelf.chunks[index].nbytes for index in resident)
    assert stream.traffic.bytes_loaded == kept
    assert stream.traffic.bytes_streamed == 4 * (shelf.nbytes - kept)
    assert stream.streamed_bytes == shelf.nbytes - kept
    assert stream.traffic.bytes_read == kept + 4 * (shelf.nbytes - kept)
    assert sorted(start for start, stays in fetched if stays) == sorted(
        shelf.chunks[index].start for index in resident
    )


def test_all_chunks_are_resident_until_arranged_otherwise(shelf: Shelf) -> None:
    stream = Stream(shelf.chunks)
    promptly(lambda: [shelf.check_pass(stream) for _ in range(3)])
    assert (stream.traffic.bytes_loaded, stream.traffic.bytes_streamed) == (shelf.nbytes, 0)
    assert stream.streamed_bytes == 0
    assert not stream.buffers
    # Chunks are handed out in any order then, also while another is in use.
    with stream.chunk(3) as weights:
        promptly(lambda: [shelf.check(stream, index) for index in (5, 2, 2, 12, 0)])
        assert shelf.holds(3, weights)
    assert stream.traffic.bytes_read == shelf.nbytes
    stream.arrange(frozenset({1}), 2)
    promptly(lambda: [shelf.check_pass(stream) for _ in range(2)])
    assert stream.traffic.bytes_streamed == 2 * (shelf.nbytes - shelf.chunks[1].nbytes)


def test_chunks_that_stay_resident_are_not_read_again(shelf: Shelf) -> None:
    stream = shelf.stream(frozenset({1, 4, 9}))
    promptly(lambda: shelf.check_pass(stream))
    before = stream.traffic.bytes_loaded
    stream.arrange(frozenset({4, 5}), 2)
    promptly(lambda: shelf.check_pass(stream))
    assert stream.traffic.bytes_loaded - before == shelf.chunks[5].nbytes
    stream.arrange(frozenset({1, 4}), 2)  # 1 was let go in between
    before = stream.traffic.bytes_loaded
    promptly(lambda: shelf.check_pass(stream))
    assert stream.traffic.bytes_loaded - before == shelf.chunks[1].nbytes


def test_the_same_arrangement_again_keeps_what_was_read_ahead(shelf: Shelf) -> None:
    stream = shelf.stream(buffers=4)
    promptly(lambda: shelf.check_pass(stream))
    soon(lambda: len(ready(stream)) == 4)
    buffers = ready(stream)
    stream.arrange(frozenset(), 4)
    assert ready(stream) == buffers


@pytest.mark.parametrize("buffers", [0, 1])
def test_too_few_buffers_are_refused(shelf: Shelf, buffers: int) -> None:
    with pytest.raises(ValueError, match="buffers cannot hold"):
        Stream(shelf.chunks).arrange(frozenset({1}), buffers)
    Stream(shelf.chunks).arrange(
        frozenset(range(len(shelf.chunks))), buffers
    )  # with nothing to stream it is fine


@pytest.mark.parametrize("place", [0, 1, 6, 12])
@pytest.mark.parametrize("resident", [frozenset(), frozenset({0, 1, 6}), frozenset(range(13))])
@pytest.mark.parametrize("how", ["inside", "between", "lost"])
def test_after_an_interruption_a_pass_starts_again(
    shelf: Shelf, place: int, resident: frozenset[int], how: str
) -> None:
    stream = shelf.stream(resident, buffers=2)

    def interrupted() -> None:
        for index in range(place):
            shelf.check(stream, index)
        if how == "inside":
            with pytest.raises(KeyboardInterrupt), stream.chunk(place):
                raise KeyboardInterrupt
        elif how == "lost":  # it came between taking the chunk and releasing it
            stream.take(place)

    for _ in range(4):
        promptly(interrupted)
    promptly(lambda: [shelf.check_pass(stream) for _ in range(2)])


def test_an_interruption_while_waiting_does_no_harm(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = shelf.stream(buffers=2)
    waits = threading.Event.wait

    def interrupted(event: threading.Event, timeout: float | None = None) -> bool:
        # The pass waits with a time limit; the start of a thread does not.
        if timeout is not None:
            raise KeyboardInterrupt
        return waits(event)

    monkeypatch.setattr(threading.Event, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(1000):
            shelf.check_pass(stream)
    monkeypatch.undo()
    promptly(lambda: [shelf.check_pass(stream) for _ in range(2)])


def test_readers_end_with_their_stream(shelf: Shelf) -> None:
    before = set(readers_alive())
    stream = shelf.stream(buffers=3, readers=4)
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
    dropping, last = threading.Event(), []

    def read(chunk: Chunk, view: memoryview | None) -> None:
        if not last and dropping.wait(LONGEST if started.is_set() else 0):
            holder.clear()
            last.append(threading.current_thread())
        chunk.read(view)

    started = threading.Event()
    holder = [shelf.stream(buffers=3, readers=2, read=read)]
    promptly(lambda: shelf.check_pass(holder[0]))
    mine = set(readers_alive()) - before
    soon(lambda: len(ready(holder[0])) == 3)
    started.set()
    # This frees a buffer, which a reader then fills.
    shelf.check(holder[0], 0)
    dropping.set()
    soon(lambda: not mine & set(readers_alive()))
    assert last and last[0] in mine
    assert not problems
