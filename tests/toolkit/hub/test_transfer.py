"""A file over one connection: dropped, stalled, refused, damaged, of another size."""

from __future__ import annotations

import pytest

from runner.errors import BloomdeskError
from scripts.fakehub.server import Fault, Repo
from tests.support.bloom_repos import (
    BLOOM,
    NAME,
    NEEDED,
    SHARD,
    SHARDS,
    VICTIM,
    assert_whole,
    fetched,
    ranges,
    sha256,
)
from toolkit.commands.download import download, plan_download
from toolkit.hub import retry, transfer
from toolkit.hub import revision as hub
from toolkit.hub.record import RECORD, DownloadRecord, load_record, save_record

pytest_plugins = ("tests.support.network",)
pytestmark = pytest.mark.usefixtures("client", "surroundings", "no_thread_is_left")


@pytest.fixture(params=[1, 4])
def connections(request, small_ranges):
    return request.param


@pytest.mark.parametrize("name", [NAME, BLOOM])
@pytest.mark.parametrize("file", [VICTIM, "config.json"])
def test_a_corrupted_byte_is_found_and_only_that_file_comes_again(
    local, repo, pins, target, name, file, connections
):
    local.fail(file, Fault(flip=100, times=40))
    with pytest.raises(BloomdeskError) as caught:
        download(name, target, connections=connections)
    message, data = caught.value.message, (repo / file).read_bytes()
    expected = wire_hash = sha256(data)
    if name == NAME and file == "config.json":  # the Hub gives only the git blob sha1 of small files
        expected = wire_hash = hub.resolve(NAME).find(file).git_sha1
    assert f"{file} of {name}" in message and f"should be {expected} and is " in message
    assert wire_hash not in message.rpartition(" and is ")[2]
    assert "came damaged" in message and "this file alone" in caught.value.hint
    assert not list(target.glob(f"{file}*"))
    present = {path.name for path in target.iterdir()} - {RECORD}
    local.faults.clear()
    local.requests.clear()
    download(name, target, connections=connections)
    assert fetched(local) == set(NEEDED) - present and file in fetched(local)
    assert_whole(target, repo)


def test_what_the_hub_announces_is_compared_before_anything_comes(local, pins, target, connections):
    local.fail(VICTIM, Fault(method="HEAD", etag="ab" * 32))
    with pytest.raises(BloomdeskError, match=f"{VICTIM} of {BLOOM} .*sha256 should be .* says abab"):
        download(BLOOM, target, connections=connections)
    assert VICTIM not in fetched(local)


def test_wrong_sizes(local, repo, target):
    local.fail(VICTIM, Fault(method="HEAD", announce=SHARD + 1, times=1))
    with pytest.raises(BloomdeskError, match=f"size in bytes should be {SHARD}, .* says {SHARD + 1}"):
        download(NAME, target)
    for size in (SHARD - 1000, SHARD + 1000, 635):
        local.faults.clear()
        local.fail(VICTIM, Fault(size=size))
        with pytest.raises(BloomdeskError, match=f"127.0.0.1 sent {size:,} bytes of .* the file's {SHARD:,}"):
            download(NAME, target)
        assert (target / f"{VICTIM}.incomplete").stat().st_size == 0
    local.faults.clear()
    assert download(NAME, target).fetched == SHARDS[1:]
    assert_whole(target, repo)


@pytest.mark.parametrize("reset", [False, True])
def test_a_dropped_connection_is_gone_on_from(local, repo, target, reset):
    local.fail(VICTIM, Fault(drop_after=100_000, times=2, reset=reset))
    result = download(NAME, target)
    assert len(ranges(local, VICTIM)) == 3 and ranges(local, VICTIM)[0] is None
    if not reset:  # RST may take bytes with it that were on their way
        assert ranges(local, VICTIM)[1:] == ["bytes=100000-", "bytes=200000-"]
        assert result.received == result.revision.total
    assert_whole(target, repo)


def test_a_connection_that_always_drops_gets_there_as_long_as_something_comes(local, repo, target):
    local.fail(VICTIM, Fault(drop_after=25_000))
    download(NAME, target)
    assert len(ranges(local, VICTIM)) == 12
    assert_whole(target, repo)


def test_a_connection_that_brings_nothing_is_given_up_and_gone_on_from_later(local, repo, target):
    local.fail(VICTIM, Fault(drop_after=1000, times=1), Fault(drop_after=0))
    with pytest.raises(BloomdeskError, match=r"cannot be reached|does not give") as caught:
        download(NAME, target)
    assert "resumes where this one stopped" in caught.value.hint
    assert (target / f"{VICTIM}.incomplete").stat().st_size == 1000
    local.faults.clear()
    local.requests.clear()
    assert download(NAME, target).resumed == 1000
    assert ranges(local, VICTIM) == ["bytes=1000-"]
    assert_whole(target, repo)


@pytest.mark.slow
def test_a_stalled_connection_is_dropped_and_gone_on_from(local, repo, target, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    local.fail(VICTIM, Fault(drop_after=1000, stall=60.0, times=1))
    download(NAME, target)
    assert ranges(local, VICTIM) == [None, "bytes=1000-"]
    assert_whole(target, repo)


def test_a_server_that_ignores_ranges(local, repo, target):
    local.fail(VICTIM, Fault(drop_after=1000, times=1), Fault(ignore_range=True))
    result = download(NAME, target)
    assert ranges(local, VICTIM) == [None, "bytes=1000-"]
    assert result.received == result.revision.total + 1000
    assert_whole(target, repo)


def test_a_server_that_ignores_ranges_and_always_drops_is_given_up(local, target):
    local.fail(VICTIM, Fault(drop_after=1000, ignore_range=True))
    with pytest.raises(BloomdeskError):
        download(NAME, target)
    assert len(ranges(local, VICTIM)) == 1 + len(retry.BACKOFF)


@pytest.mark.parametrize("status", [500, 503, 429, 408])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_passing_weakness_of_the_hub_or_its_store(local, repo, target, status, method, connections):
    local.fail(VICTIM, Fault(method=method, status=status, headers={"Retry-After": "0"}, times=3))
    download(NAME, target, connections=connections)
    assert_whole(target, repo)


def test_an_address_that_ran_out_is_asked_for_again(local, repo, target):
    local.fail(VICTIM, Fault(drop_after=1000, times=1), Fault(status=403, times=1))
    download(NAME, target)
    assert len(local.asked("HEAD", VICTIM)) == 3
    assert_whole(target, repo)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, "RepoNotFound", "no repository someone/bloom-small, or it is private"),
        (403, "GatedRepo", "is gated, and no token was sent"),
        (404, "EntryNotFound", f"has no {VICTIM} at revision"),
        (404, "RevisionNotFound", "has no revision"),
        (403, "", "refuses access"),
    ],
)
def test_refusals_are_not_tried_again(local, target, status, code, expected, connections):
    local.fail(VICTIM, Fault(method="HEAD", status=status, code=code))
    with pytest.raises(BloomdeskError, match=expected) as caught:
        download(NAME, target, connections=connections)
    assert caught.value.hint
    assert len(local.asked("HEAD", VICTIM)) == 1
    assert load_record(target).missing_in(target) == SHARDS[1:]


def test_the_token_goes_to_the_hub_and_not_to_its_store(local, repo, target, monkeypatch):
    local.repos[NAME] = Repo(repo, token="hf_right")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    local.fail(VICTIM, Fault(drop_after=1000, times=1))
    download(NAME, target)
    sent = {(each.server, each.headers.get("authorization")) for each in local.requests}
    assert sent == {("hub", "Bearer hf_right"), ("cdn", None)}
    assert {each.headers["user-agent"] for each in local.requests} == {"bloomdesk"}
    assert {each.headers["accept-encoding"] for each in local.requests} == {"identity"}


def test_a_hub_that_goes_down_in_the_middle(local, target):
    def stop(file, done, total):
        if file == VICTIM:
            local.close()

    with pytest.raises(BloomdeskError, match="cannot be reached"):
        download(NAME, target, progress=stop)
    assert load_record(target).missing_in(target)


def test_a_part_of_other_bytes_or_of_too_many_never_gets_in(local, repo, target):
    target.mkdir()
    save_record(target, DownloadRecord.of(plan_download(NAME, target).revision, None))
    (target / f"{SHARDS[0]}.incomplete").write_bytes(b"x" * (SHARD + 1))
    (target / f"{VICTIM}.incomplete").write_bytes(b"x" * 1000)
    with pytest.raises(BloomdeskError, match=f"{VICTIM} .* came damaged"):
        download(NAME, target)
    download(NAME, target)
    assert_whole(target, repo)


@pytest.mark.parametrize(
    "place", ["http://127.0.0.1:port/x", "http://[bad/x", "http://127.0.0.1:99999/x", "ftp://x/y"]
)
def test_an_address_that_is_none_is_a_clear_error(local, target, place, connections):
    local.fail(VICTIM, Fault(method="HEAD", location=place))
    with pytest.raises(BloomdeskError, match=f"sends {VICTIM} of {NAME} to an invalid address") as caught:
        download(NAME, target, connections=connections)
    assert "HF_ENDPOINT" in caught.value.hint
    assert len(local.asked("HEAD", VICTIM)) == 1


@pytest.mark.parametrize("fault", [Fault(), Fault(drop_after=100), Fault(ignore_range=True)])
@pytest.mark.parametrize(("start", "nbytes"), [(0, 8), (0, 5000), (1234, 4000), (7, 0)])
def test_a_range_of_a_file_has_its_bytes(local, repo, fault, start, nbytes):
    local.fail(VICTIM, fault)
    revision = hub.resolve(NAME)
    found = transfer.read_range(revision, revision.find(VICTIM), start, nbytes)
    assert found == (repo / VICTIM).read_bytes()[start : start + nbytes]


def test_a_range_beyond_the_end_of_a_file_is_refused(local):
    revision = hub.resolve(NAME)
    file = revision.find(VICTIM)
    with pytest.raises(BloomdeskError, match=f"has {file.size:,} bytes"):
        transfer.read_range(revision, file, file.size - 1, 2)
    assert not local.asked("GET", VICTIM)


def test_a_range_of_a_file_of_another_size_is_refused(local):
    local.fail(VICTIM, Fault(size=SHARD + 1000))
    revision = hub.resolve(NAME)
    with pytest.raises(BloomdeskError, match=f"asked for bytes of {SHARD:,}"):
        transfer.read_range(revision, revision.find(VICTIM), 0, 8)
