"""A file over several connections: the same bytes, each range on its own, bounded, and ended at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from runner.errors import BloomdeskError
from scripts.fakehub.server import Fault, RandomFaults
from tests.support.bloom_repos import FILE, NAME, RANGE, WINDOW, wait_for_bytes
from toolkit.hub import ranges, transfer
from toolkit.hub import revision as hub
from toolkit.io import writer
from toolkit.io.progress import silent

pytest_plugins = ("tests.support.network",)
pytestmark = pytest.mark.usefixtures("client", "surroundings", "small_ranges", "no_thread_is_left")

SIZE = 600_000


def fetch(directory, connections=4, progress=silent):
    directory.mkdir(exist_ok=True)
    revision = hub.resolve(NAME)
    return transfer.fetch(revision, revision.find(FILE), directory, progress, connections)


def asked_for(local):
    """(first, last + 1) of each range that was asked for, None for the whole."""
    headers = [each.headers.get("range") for each in local.asked("GET", FILE) if each.server == "cdn"]
    found = [re.fullmatch(r"bytes=(\d+)-(\d*)", header or "") for header in headers]
    return [(int(each[1]), int(each[2] or SIZE - 1) + 1) if each else None for each in found]


def assert_came(single, target):
    assert [path.name for path in target.iterdir()] == [FILE]
    assert (target / FILE).read_bytes() == (single / FILE).read_bytes()


@pytest.mark.parametrize("connections", [1, 2, 4, 8, 32])
def test_several_connections_bring_the_same_bytes_once(one, single, target, connections):
    told = []
    result = fetch(target, connections, lambda *each: told.append(each))
    assert_came(single, target)
    assert (result.received, result.resumed) == (SIZE, 0)
    assert len(one.asked("HEAD", FILE)) == 1
    assert told[-1] == (FILE, SIZE, SIZE) and told == sorted(told)
    if connections > 1:
        step = {2: RANGE, 4: RANGE, 8: 8192, 32: 4096}[connections]
        expected = [(start, min(SIZE, start + step)) for start in range(0, SIZE, step)]
        assert sorted(asked_for(one)) == expected


def test_the_real_window_is_64_mib(monkeypatch):
    monkeypatch.undo()
    assert ranges.WINDOW == 64 * 2**20
    for connections in range(2, ranges.MOST_CONNECTIONS + 1):
        assert ranges.range_size(connections) * connections <= ranges.WINDOW


@pytest.mark.parametrize("connections", [0, 33])
def test_a_number_of_connections_that_makes_no_sense(one, target, connections):
    with pytest.raises(BloomdeskError) as caught:
        fetch(target, connections)
    assert caught.value.hint == "choose from 1 to 32"
    assert not asked_for(one)


def test_the_connections_work_at_the_same_time_and_stay_open(one, single, target):
    one.rate = 200_000
    began = time.monotonic()
    fetch(target, 8)
    assert time.monotonic() - began < 0.7 * SIZE / one.rate
    assert_came(single, target)


@pytest.mark.parametrize("reset", [False, True])
def test_each_range_goes_on_after_a_drop(one, single, target, reset):
    one.fail(FILE, Fault(drop_after=1000, times=6, reset=reset))
    result = fetch(target)
    assert_came(single, target)
    if not reset:  # RST may take bytes with it that were on their way
        assert result.received == SIZE
        again = [start for start, _ in asked_for(one) if start % RANGE]
        assert len(again) == 6 and {start % RANGE % 1000 for start in again} == {0}
        assert len(one.asked("HEAD", FILE)) == 1  # the address was good


def test_connections_that_always_drop_get_there_as_long_as_something_comes(one, single, target):
    one.fail(FILE, Fault(drop_after=5000))
    assert fetch(target).received == SIZE
    assert_came(single, target)


@pytest.mark.slow
def test_a_stalled_range_is_dropped_and_gone_on_from(one, single, target, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.4)
    one.fail(FILE, Fault(drop_after=1000, stall=60.0, times=3), Fault(stall=60.0, since=200_000, times=1))
    fetch(target)
    assert_came(single, target)


@pytest.mark.slow
def test_a_pause_that_is_asked_for_is_made(one, single, target):
    one.fail(FILE, Fault(status=429, headers={"Retry-After": "1"}, since=100_000, times=1))
    began = time.monotonic()
    fetch(target)
    assert time.monotonic() - began > 1
    assert_came(single, target)


def test_an_address_that_runs_out_is_asked_for_again_by_one_for_all(one, single, target):
    one.fail(FILE, Fault(status=403, since=100_000, times=3))
    assert fetch(target).received == SIZE
    assert 2 <= len(one.asked("HEAD", FILE)) <= 4
    assert_came(single, target)


@pytest.mark.parametrize("since", [0, 200_000])
def test_a_server_that_ignores_ranges_sends_the_rest_over_one_connection(one, single, target, since):
    one.fail(FILE, Fault(ignore_range=True, since=since), Fault(ignore_range=True))
    fetch(target)
    assert_came(single, target)
    if not since:
        assert asked_for(one) == [(0, RANGE), None]


def test_a_store_that_sends_on_to_another_is_left_to_the_session(one, single, target):
    location = f"{one.store}/store/{NAME}/{one.shelf.commit(one.repos[NAME])}/{FILE}?signature=valid&other"
    one.fail(FILE, Fault(status=302, headers={"Location": location}, times=2))
    fetch(target)
    assert_came(single, target)
    assert len(asked_for(one)) == 3


def test_a_range_that_never_comes_ends_all_and_keeps_what_came(one, single, target):
    one.fail(FILE, Fault(drop_after=0, since=300_000), Fault(stall=60.0, since=290_000))
    began = time.monotonic()
    with pytest.raises(BloomdeskError, match=r"cannot be reached|does not give") as caught:
        fetch(target)
    assert time.monotonic() - began < 5
    assert "resumes where this one stopped" in caught.value.hint
    kept = (target / f"{FILE}.incomplete").stat().st_size
    assert 290_000 - WINDOW <= kept <= 300_000
    one.faults.clear()
    one.requests.clear()
    result = fetch(target)
    assert (result.resumed, result.received) == (kept, SIZE - kept)
    assert min(asked_for(one))[0] == kept
    assert_came(single, target)


@pytest.mark.slow
def test_a_slow_first_range_holds_the_others_at_the_window(one, single, target):
    one.fail(FILE, Fault(drop_after=1000, stall=1.0, times=1))
    ends = []

    def progress(file, done, total):
        if not ends and done > 1000:
            ends.extend(stop - done for _, stop in asked_for(one))

    fetch(target, progress=progress)
    assert max(ends) <= WINDOW + RANGE  # what was handed out a moment ago may be under way again
    assert_came(single, target)


def test_a_range_that_crawls_goes_on_over_a_new_connection(one, single, target, monkeypatch):
    monkeypatch.setattr(ranges, "SECONDS_OF_GRACE", 0.3)
    monkeypatch.setattr(ranges, "SECONDS_BETWEEN_BLOCKS", 0.1)
    one.fail(FILE, Fault(drop_after=1000, stall=60.0, times=1))
    began = time.monotonic()
    assert fetch(target).received == SIZE
    assert time.monotonic() - began < 5  # the client's own patience with silence is 10 s
    assert (1000, RANGE) in asked_for(one)
    assert_came(single, target)


CHILD = f"""
import sys
from pathlib import Path
from toolkit.hub import revision as hub, ranges, transfer
ranges.WINDOW, ranges.SMALLEST, ranges.LARGEST = {WINDOW}, 4096, {RANGE}
revision = hub.resolve({NAME!r})
transfer.fetch(revision, revision.find({FILE!r}), Path(sys.argv[1]), lambda *_: None, 4)
"""


@pytest.mark.slow
def test_a_killed_process_loses_no_more_than_the_window(one, single, target):
    one.rate = 100_000
    target.mkdir()
    command = [sys.executable, "-c", CHILD, str(target)]
    with subprocess.Popen(command) as child:
        wait_for_bytes(target / f"{FILE}.incomplete", 150_000, child)
        child.send_signal(signal.SIGKILL)
    kept = (target / f"{FILE}.incomplete").stat().st_size
    first_run = sum(stop - start for start, stop in asked_for(one))
    assert kept < SIZE and first_run <= kept + WINDOW + RANGE
    one.rate = None
    one.requests.clear()
    subprocess.run(command, check=True)
    second_run = asked_for(one)
    assert min(second_run)[0] == kept and sum(stop - start for start, stop in second_run) == SIZE - kept
    assert_came(single, target)


@pytest.mark.slow
@pytest.mark.parametrize("stalled", [{"drop_after": 1000}, {}])
def test_an_interrupted_process_ends_at_once_and_without_noise(one, target, stalled):
    one.fail(FILE, Fault(stall=60.0, since=100_000, **stalled))
    target.mkdir()
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", CHILD, str(target)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        wait_for_bytes(target / f"{FILE}.incomplete", 90_000, child)
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        began = time.monotonic()
        said = child.communicate(timeout=20)[1]
    assert time.monotonic() - began < 3
    assert said.count("Traceback") == 1 and said.rstrip().endswith("KeyboardInterrupt")
    assert "thread" not in said.lower().replace("threading.py", "")


def test_a_disk_that_fills_up_ends_all(one, single, target, monkeypatch):
    write, room = os.write, [200_000]

    def full(descriptor, data):
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            fetch(target)
    assert 200_000 - RANGE <= fetch(target).resumed <= 200_000
    assert_came(single, target)


def test_what_has_come_is_brought_onto_the_disk_again_and_again(one, single, target, monkeypatch):
    settled, settle = [], writer.sync_range
    monkeypatch.setattr(writer, "SYNC_BYTES", 50_000)
    monkeypatch.setattr(writer, "sync_range", lambda *each: settled.append(each[1:]) or settle(*each))
    fetch(target)
    assert_came(single, target)
    assert settled[0][0] == 0 and all(stop - start >= 50_000 for start, stop in settled)
    assert [start for start, _ in settled[1:]] == [stop for _, stop in settled[:-1]]


def test_a_disk_that_fails_in_the_background_is_noticed(one, target, monkeypatch):
    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(writer, "SYNC_BYTES", 50_000)
    monkeypatch.setattr(writer, "sync_range", failing)
    with pytest.raises(OSError, match="Input/output error"):
        fetch(target)
    assert not (target / FILE).exists()


@pytest.mark.parametrize("seed", range(3))
def test_random_faults_let_nothing_wrong_in(one, single, target, seed, monkeypatch):
    one.random_faults = RandomFaults(seed, share=0.2, longest_stall=0.05)
    monkeypatch.setattr("toolkit.hub.retry.BACKOFF", (0.0,) * 20)
    for _ in range(40):
        try:
            fetch(target)
            break
        except BloomdeskError as error:
            assert "came damaged" in error.message
    assert_came(single, target)


def test_a_proxy_that_ranges_cannot_pass_is_left_to_the_session(one, single, target, monkeypatch):
    monkeypatch.setattr("toolkit.hub.connection.getproxies", lambda: {"http": "socks5://127.0.0.1:9"})
    fetch(target)
    assert asked_for(one) == [None]
    assert_came(single, target)
