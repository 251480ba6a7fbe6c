"""A Hub that goes away and comes back: waited out once something has come, with a word on why and until when."""

from __future__ import annotations

import random
import re
import threading
from email.utils import formatdate

import huggingface_hub
import pytest

from runner.errors import BloomdeskError
from scripts.fakehub.server import Fault
from tests.support.bloom_repos import FILE, NAME, WINDOW
from tests.support.clocks import FastClock
from toolkit.hub import retry, transfer
from toolkit.hub import revision as hub
from toolkit.hub.line import Line
from toolkit.io.progress import silent

pytest_plugins = ("tests.support.network",)
pytestmark = pytest.mark.usefixtures("client", "surroundings", "small_ranges", "no_thread_is_left")

SIZE = 3_000_000
HALF_A_DAY = 12 * 3600.0
TIME = r"\d\d:\d\d:\d\d"
PAUSES = retry.BACKOFF


@pytest.fixture
def one(one, monkeypatch):
    """A slow hub, of which everything is reported, with the real pauses."""
    monkeypatch.setattr(retry, "BACKOFF", PAUSES)
    monkeypatch.setattr("toolkit.io.progress.SECONDS_BETWEEN_REPORTS", 0.0)
    one.rate = 2_000_000
    return one


@pytest.fixture
def said():
    return []


@pytest.fixture
def line(said):
    return patient(said)


def patient(said, patience=HALF_A_DAY, factor=1000.0):
    return Line(patience=patience, say=said.append, clock=FastClock(factor))


def fetch(directory, line, connections=4, progress=silent):
    directory.mkdir(exist_ok=True)
    revision = hub.resolve(NAME)
    return transfer.fetch(revision, revision.find(FILE), directory, progress, connections, line)


def assert_came(single, target):
    assert [path.name for path in target.iterdir()] == [FILE]
    assert (target / FILE).read_bytes() == (single / FILE).read_bytes()


def outages(local, line, number, seconds, seed=0):
    """A progress: once something came, the hub goes away `number` times, for `seconds` of the line's clock each."""
    at_random, came, over = random.Random(seed), threading.Event(), threading.Event()

    def progress(file, done, total):
        if done > progress.done:
            came.set()
        progress.done = done

    def go_and_come() -> None:
        for _ in range(number):
            came.clear()
            came.wait(10)
            over.wait(at_random.random() * 0.02)
            local.go()
            end = line.clock.monotonic() + seconds
            while line.clock.monotonic() < end and not over.wait(0.005):
                pass
            local.come_back()
            progress.left -= 1
        local.rate = None

    progress.done, progress.left, progress.end = 0, number, over.set
    threading.Thread(target=go_and_come, daemon=True).start()
    return progress


@pytest.mark.slow
@pytest.mark.parametrize("connections", [1, 4])
def test_thirty_outages_of_ten_minutes(one, single, target, said, connections):
    line = patient(said, factor=5000.0)
    one.rate = 1_000_000 / connections
    progress = outages(one, line, 30, 600.0, seed=connections)
    result = fetch(target, line, connections, progress)
    assert_came(single, target)
    assert progress.left == 0
    assert SIZE <= result.received <= SIZE + WINDOW
    assert sum("something comes again" in text for text in said) >= 25


@pytest.mark.parametrize("connections", [1, 4])
def test_an_outage_is_said_with_why_and_until_when_and_its_end(one, single, target, said, connections):
    line = patient(said, factor=100.0)
    fetch(target, line, connections, outages(one, line, 1, 40.0))
    assert_came(single, target)
    gone, back = said[0], said[-1]
    assert re.search(
        rf"(cannot be reached for|does not give) {FILE} of {NAME}.+; nothing has come since {TIME}, ", gone
    )
    assert re.search(rf"trying again until ({TIME}|\d+-\d+-\d+ \d\d:\d\d)$", gone)
    assert re.fullmatch(r"something comes again, after (\d\d(\.\d)? s|\d min .*)", back)


def test_before_anything_has_come_it_ends_at_once(one, target, said, line):
    revision = hub.resolve(NAME)
    target.mkdir()
    one.go()
    with pytest.raises(BloomdeskError, match="cannot be reached"):
        transfer.fetch(revision, revision.find(FILE), target, silent, 4, line)
    assert line.clock.monotonic() < 3600
    # The longer ones of the few pauses.
    assert [re.search(rf"; trying again at {TIME}$", text) is not None for text in said] == [True, True]


@pytest.mark.parametrize("connections", [1, 4])
def test_patience_that_is_used_up_ends_it_and_keeps_what_came(one, single, target, said, connections):
    line = patient(said, patience=300.0)
    gone = outages(one, line, 1, HALF_A_DAY)
    with pytest.raises(BloomdeskError, match=r"cannot be reached|does not give") as caught:
        fetch(target, line, connections, gone)
    assert "resumes where this one stopped" in caught.value.hint
    assert 300 <= line.clock.monotonic() < HALF_A_DAY / 2
    kept = (target / f"{FILE}.incomplete").stat().st_size
    assert kept > 0
    gone.end()
    one.come_back()
    result = fetch(target, line, connections)
    assert (result.resumed, result.received) == (kept, SIZE - kept)
    assert_came(single, target)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, "", "does not accept"),
        (403, "GatedRepo", "is gated"),
        (404, "RevisionNotFound", "has no revision"),
        (404, "EntryNotFound", "has no model.safetensors"),
    ],
)
@pytest.mark.parametrize("connections", [1, 4])
def test_what_time_does_not_mend_ends_it_at_once(
    one, single, target, said, line, status, code, expected, connections
):
    one.fail(FILE, Fault(method="HEAD", times=1), Fault(method="HEAD", status=status, code=code))
    one.fail(FILE, Fault(drop_after=0, since=1))  # so that the Hub is asked again
    one.fail(FILE, Fault(drop_after=SIZE // 2))
    with pytest.raises(BloomdeskError, match=expected) as caught:
        fetch(target, line, connections)
    assert "--revision" not in caught.value.worded()
    # Each connection may ask before it hears of the first answer.
    assert 2 <= len(one.asked("HEAD", FILE)) <= 1 + connections
    one.faults.clear()
    assert fetch(target, line, connections).resumed > 0
    assert_came(single, target)


@pytest.mark.parametrize("connections", [1, 4])
def test_what_is_wrong_in_the_calling_thread_ends_a_wait(one, target, said, line, connections):
    """As when the thread that makes parts has failed."""

    def progress(file, done, total):
        gone(file, done, total)
        if any("nothing has come since" in text for text in said):
            raise RuntimeError("the disk is full")

    gone = outages(one, line, 1, HALF_A_DAY)
    with pytest.raises(RuntimeError, match="the disk is full"):
        fetch(target, line, connections, progress)
    gone.end()
    assert line.clock.monotonic() < HALF_A_DAY


def test_a_pause_that_is_asked_for_is_said_and_made(one, single, target, said, line):
    one.fail(FILE, Fault(status=503, headers={"Retry-After": "240"}, since=SIZE // 2, times=1))
    fetch(target, line)
    assert_came(single, target)
    assert line.clock.monotonic() > 240
    store = one.store.removeprefix("http://")
    (text,) = said
    assert re.fullmatch(rf"{store} answered 503 for {FILE} of {NAME}; waiting until {TIME}, as asked", text)


@pytest.mark.parametrize("ahead", [250.0, -50.0])
def test_a_pause_until_a_date_is_made(one, line, ahead):
    date = int(line.clock.time() + ahead)
    headers = {"Retry-After": formatdate(date, usegmt=True)}
    one.fail(f"/api/models/{NAME}/revision/main", Fault(status=429, headers=headers, times=1))
    hub.resolve(NAME, None, line)
    assert line.clock.time() >= date


def test_a_pause_of_an_hour_is_made_once_something_has_come(one, single, target, said):
    line = patient(said, factor=20_000.0)
    one.fail(FILE, Fault(status=429, headers={"Retry-After": "3600"}, since=SIZE // 2, times=1))
    fetch(target, line)
    assert_came(single, target)
    assert line.clock.monotonic() >= 3600
    assert any("answered 429" in text and text.endswith(", as asked") for text in said)


def test_after_a_failure_the_connection_is_made_anew(one, monkeypatch):
    """A proxy that has gone, and settings that name it no more."""
    monkeypatch.setattr(retry, "BACKOFF", ())
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    huggingface_hub.close_session()
    with pytest.raises(BloomdeskError, match="cannot be reached"):
        hub.resolve(NAME)
    monkeypatch.delenv("HTTP_PROXY")
    assert hub.resolve(NAME).find(FILE)


def test_a_store_at_a_new_address_is_found(one, single, target, said, line):
    """As after a restart: the address that was known leads nowhere any more."""
    nowhere = "http://127.0.0.1:9/file"
    one.fail(FILE, Fault(method="HEAD", location=nowhere, times=3))
    line.came()
    fetch(target, line)
    assert_came(single, target)
    assert len(one.asked("HEAD", FILE)) == 4
    assert any("127.0.0.1:9, where the Hub" in text for text in said)
