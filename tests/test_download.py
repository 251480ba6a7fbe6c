"""Downloads over HTTP from the local hub: whole, resumed, damaged, refused, full, offline."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from runner.errors import BloomdeskError
from scripts.local_hub import Fault, LocalHub, Repo
from tests.bloom_repos import (
    BIN_INDEX,
    NEEDED,
    SHARD,
    SHARDS,
    add_safetensors,
    sha256,
    write_bin_repo,
    write_pins,
)
from toolkit import hub, transfer, wire
from toolkit.download import download, plan_download
from toolkit.record import RECORD, load_record

NAME = "someone/bloom-small"
BLOOM = "bigscience/bloom"
COMMIT = "2a3d62e072b65c210f519263339144a9428db0f4"
VICTIM = SHARDS[1]


@pytest.fixture(scope="module", autouse=True)
def client():
    import huggingface_hub

    yield
    huggingface_hub.close_session()


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """No token, no offline mode, no waiting."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(wire, "WAITS", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return write_bin_repo(tmp_path_factory.mktemp("hub") / "repo")


@pytest.fixture
def local(repo, monkeypatch):
    """A hub with the repository under an ordinary name, and as a bigscience/bloom with pins of its own."""
    with LocalHub({NAME: repo, BLOOM: Repo(repo, commit=COMMIT)}) as started:
        monkeypatch.setenv("HF_ENDPOINT", started.endpoint)
        yield started


@pytest.fixture
def pins(repo, tmp_path, monkeypatch):
    write_pins(tmp_path / "pins", repo, BLOOM, COMMIT)
    monkeypatch.setattr(hub, "PINS", tmp_path / "pins")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


def assert_whole(target, repo, names=NEEDED):
    assert {path.name for path in target.iterdir()} == {*names, RECORD}
    record = load_record(target)
    assert record.missing_in(target) == ()
    for name in names:
        data = (target / name).read_bytes()
        assert data == (repo / name).read_bytes()
        assert record.files[name].sha256 == sha256(data)


def fetched(local):
    """The weights and small files whose bytes were asked for."""
    paths = {
        each.path for each in local.requests if each.method == "GET" and not each.path.startswith("/api")
    }
    return {path.rpartition("/")[2] for path in paths}


def ranges(local, name):
    return [each.headers.get("range") for each in local.asked("GET", name) if each.server == "cdn"]


@pytest.mark.parametrize("name", [NAME, BLOOM])
def test_all_that_is_needed_comes_and_nothing_else(local, repo, pins, target, name):
    told = []
    result = download(name, target, progress=lambda *each: told.append(each))
    assert_whole(target, repo)
    assert fetched(local) == set(NEEDED)
    assert result.fetched == NEEDED and result.kept == () and result.resumed == 0
    assert result.received == result.revision.total == sum((repo / each).stat().st_size for each in NEEDED)
    assert {(file, total, total) for file, _, total in told} <= set(told)
    assert load_record(target).commit == result.revision.commit
    assert result.revision.pinned == (name == BLOOM)


def test_the_pinned_list_is_believed_without_the_hub_s(local, pins, target):
    download(BLOOM, target)
    assert not [each for each in local.requests if each.path.startswith("/api")]


def test_a_second_run_fetches_and_hashes_nothing(local, repo, pins, target, monkeypatch):
    download(BLOOM, target)
    local.requests.clear()
    monkeypatch.setattr("toolkit.download.hash_file", None)
    result = download(BLOOM, target)
    assert (result.fetched, result.kept, result.received) == ((), NEEDED, 0)
    assert local.requests == []


def test_safetensors_and_single_files(tmp_path, target, monkeypatch):
    repo = write_bin_repo(tmp_path / "both")
    names = add_safetensors(repo)
    with LocalHub({NAME: repo}) as local:
        monkeypatch.setenv("HF_ENDPOINT", local.endpoint)
        download(NAME, target)
    assert_whole(target, repo, (*NEEDED[:4], "model.safetensors.index.json", *names))


def test_files_of_an_earlier_download_without_record_are_hashed_and_kept(local, repo, target):
    download(NAME, target)
    (target / RECORD).unlink()
    (target / VICTIM).write_bytes(b"x" * SHARD)
    local.requests.clear()
    assert {each.state for each in plan_download(NAME, target).files} == {"unchecked"}
    assert download(NAME, target).fetched == (VICTIM,)
    assert fetched(local) == {VICTIM}
    assert_whole(target, repo)


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"x" * SHARD), lambda path: path.unlink()])
def test_a_file_that_changed_is_fetched_anew(local, repo, target, change):
    download(NAME, target)
    change(target / VICTIM)
    local.requests.clear()
    assert download(NAME, target).fetched == (VICTIM,)
    assert fetched(local) == {VICTIM}
    assert_whole(target, repo)


def test_a_touched_file_is_hashed_and_kept(local, repo, target):
    download(NAME, target)
    os.utime(target / VICTIM, ns=(1, 1))
    assert download(NAME, target).fetched == ()
    assert_whole(target, repo)


@pytest.mark.parametrize("name", [NAME, BLOOM])
@pytest.mark.parametrize("file", [VICTIM, "config.json"])
def test_a_corrupted_byte_is_found_and_only_that_file_comes_again(local, repo, pins, target, name, file):
    local.fail(file, Fault(flip=100, times=1))
    with pytest.raises(BloomdeskError) as caught:
        download(name, target)
    message, data = caught.value.message, (repo / file).read_bytes()
    expected = wire_hash = sha256(data)
    if name == NAME and file == "config.json":  # the Hub gives only the git blob sha1 of small files
        expected = wire_hash = hub.resolve(NAME).find(file).git_sha1
    assert f"{file} of {name}" in message and f"should be {expected} and is " in message
    assert wire_hash not in message.rpartition(" and is ")[2]
    assert "this file alone" in caught.value.hint
    assert not (target / file).exists() and not (target / f"{file}.incomplete").exists()
    present = {path.name for path in target.iterdir()} - {RECORD}
    local.requests.clear()
    download(name, target)
    assert fetched(local) == set(NEEDED) - present and file in fetched(local)
    assert_whole(target, repo)


def test_what_the_hub_announces_is_compared_before_anything_comes(local, pins, target):
    local.fail(VICTIM, Fault(method="HEAD", etag="ab" * 32))
    with pytest.raises(BloomdeskError, match=f"{VICTIM} of {BLOOM} .*sha256 should be .* says abab"):
        download(BLOOM, target)
    assert VICTIM not in fetched(local)


def test_a_hub_with_another_commit_under_the_pinned_one(local, repo, pins, target):
    local.repos[BLOOM] = Repo(repo, commit="f" * 40, branches=("main", COMMIT))
    with pytest.raises(BloomdeskError, match=f"commit should be {COMMIT}, .* says ffff"):
        download(BLOOM, target)


def test_wrong_sizes(local, repo, target):
    local.fail(VICTIM, Fault(method="HEAD", announce=SHARD + 1, times=1))
    with pytest.raises(BloomdeskError, match=f"size in bytes should be {SHARD}, .* says {SHARD + 1}"):
        download(NAME, target)
    local.fail(VICTIM, Fault(size=SHARD - 1000))
    with pytest.raises(BloomdeskError, match="answered 416"):
        download(NAME, target)
    local.faults.clear()
    local.fail(VICTIM, Fault(size=SHARD + 1000, times=1))
    with pytest.raises(BloomdeskError, match=f"more came for {VICTIM} than its {SHARD:,} bytes"):
        download(NAME, target)
    assert download(NAME, target).fetched == SHARDS[1:]
    assert_whole(target, repo)


CHILD = """
import sys
from pathlib import Path
from toolkit.download import download
download(sys.argv[1], Path(sys.argv[2]))
"""


def test_a_killed_process_is_gone_on_from_in_a_new_one(local, repo, target):
    local.fail(VICTIM, Fault(drop_after=200_000, stall=60.0, times=1))
    command = [sys.executable, "-c", CHILD, NAME, str(target)]
    with subprocess.Popen(command) as child:
        incomplete = target / f"{VICTIM}.incomplete"
        deadline = time.monotonic() + 30
        while not incomplete.exists() or incomplete.stat().st_size < 200_000:
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    assert not (target / VICTIM).exists()
    planned = {each.file.path: each for each in plan_download(NAME, target).files}
    assert (planned[VICTIM].state, planned[VICTIM].to_fetch) == ("partial", SHARD - 200_000)
    local.requests.clear()
    subprocess.run(command, check=True)
    assert ranges(local, VICTIM) == ["bytes=200000-"]
    assert fetched(local) == {*SHARDS[1:]}
    assert_whole(target, repo)


def test_the_client_makes_no_request_and_prints_nothing_of_its_own(local, repo, target, tmp_path):
    local.fail(VICTIM, Fault(drop_after=1000, times=1))
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    surroundings |= {"HF_ENDPOINT": local.endpoint, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", CHILD, NAME, str(target)]
    result = subprocess.run(command, check=True, env=surroundings, capture_output=True)
    assert (result.stdout, result.stderr) == (b"", b"")
    assert not local.asked("GET", "/api/agent-harnesses")
    assert not (tmp_path / "home").exists()
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
    assert "goes on where this one stopped" in caught.value.hint
    assert (target / f"{VICTIM}.incomplete").stat().st_size == 1000
    local.faults.clear()
    local.requests.clear()
    assert download(NAME, target).resumed == 1000
    assert ranges(local, VICTIM) == ["bytes=1000-"]
    assert_whole(target, repo)


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
    assert len(ranges(local, VICTIM)) == 1 + len(wire.WAITS)


@pytest.mark.parametrize("status", [500, 503, 429, 408])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_passing_weakness_of_the_hub_or_its_store(local, repo, target, status, method):
    local.fail(VICTIM, Fault(method=method, status=status, headers={"Retry-After": "0"}, times=3))
    download(NAME, target)
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
def test_refusals_are_not_tried_again(local, target, status, code, expected):
    local.fail(VICTIM, Fault(method="HEAD", status=status, code=code))
    with pytest.raises(BloomdeskError, match=expected) as caught:
        download(NAME, target)
    assert caught.value.hint
    assert len(local.asked("HEAD", VICTIM)) == 1
    assert load_record(target).missing_in(target) == SHARDS[1:]


def test_a_gated_repository(local, repo, target, monkeypatch):
    local.repos[NAME] = Repo(repo, token="hf_right", gated=True)
    with pytest.raises(BloomdeskError, match="is gated, and no token was sent") as caught:
        download(NAME, target)
    assert f"{local.endpoint}/{NAME}" in caught.value.hint and "HF_TOKEN" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(BloomdeskError, match="gated, and the token in HF_TOKEN has not been given access"):
        download(NAME, target)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    download(NAME, target)
    assert_whole(target, repo)


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


def test_a_directory_of_another_commit_is_refused(local, repo, target, tmp_path):
    first = download(NAME, target).revision.commit
    changed = tmp_path / "changed"
    shutil.copytree(repo, changed)
    (changed / "config.json").write_text("{}")
    local.repos[NAME] = Repo(changed)
    local.requests.clear()
    second = hub.resolve(NAME).commit
    for attempt in (download, plan_download):
        with pytest.raises(BloomdeskError) as caught:
            attempt(NAME, target)
        assert f"{NAME} at {first[:12]}, not of {NAME} at {second[:12]}" in caught.value.message
        assert f"--revision {first}" in caught.value.hint
    assert fetched(local) == set()


def test_a_directory_of_another_repository_is_refused(local, target, pins):
    download(NAME, target)
    local.requests.clear()
    with pytest.raises(BloomdeskError, match=f"holds a download of {NAME} at .*, not of {BLOOM}"):
        download(BLOOM, target)
    assert local.requests == []


def test_a_hostile_index_writes_nothing(local, repo, target, tmp_path):
    hostile = tmp_path / "hostile"
    shutil.copytree(repo, hostile)
    (hostile / BIN_INDEX).write_text('{"weight_map": {"a": "../outside.bin"}}')
    local.repos[NAME] = Repo(hostile)
    with pytest.raises(BloomdeskError, match=r"names '\.\./outside\.bin'"):
        download(NAME, target)
    assert not target.exists()


def test_a_plan_gives_the_figures_and_writes_nothing(local, repo, target, tmp_path):
    target, total = target / "deep" / "down", sum((repo / name).stat().st_size for name in NEEDED)
    plan = plan_download(NAME, target)
    assert [each.file.path for each in plan.files] == list(NEEDED)
    assert (plan.total, plan.to_fetch, plan.fits) == (total, total, True)
    assert abs(plan.free - shutil.disk_usage(tmp_path).free) < 2**30
    assert not target.parent.exists()
    download(NAME, target)
    (target / VICTIM).unlink()
    (target / f"{VICTIM}.incomplete").write_bytes(b"x" * 1000)
    plan = plan_download(NAME, target)
    assert (plan.total, plan.to_fetch, plan.work) == (total, SHARD - 1000, SHARD)
    assert [file.path for file in plan.unfinished] == [VICTIM]


def test_the_plan_for_the_real_bloom_needs_no_network(target, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan = plan_download(BLOOM, target)
    assert len(plan.unfinished) == 77 and plan.to_fetch == plan.total == 352_509_349_350
    assert plan.fits == (plan.free >= plan.total)


def test_a_disk_that_is_too_small_is_refused_before_anything_comes(local, repo, target, monkeypatch):
    monkeypatch.setattr("toolkit.download.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    total = plan_download(NAME, target).total
    with pytest.raises(BloomdeskError, match=f"{total:,} bytes are still to come, the disk has 1,000 free"):
        download(NAME, target)
    assert not plan_download(NAME, target).fits
    assert fetched(local) <= {BIN_INDEX} and not target.exists()


def test_a_disk_that_fills_up(local, repo, target, monkeypatch):
    write = os.write

    def full(descriptor, data):
        if len(data) > 5000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(transfer.os, "write", full)
        with pytest.raises(BloomdeskError, match=r"the disk is full: .* bytes are free"):
            download(NAME, target)
    assert load_record(target).missing_in(target)
    download(NAME, target)
    assert_whole(target, repo)


def test_a_directory_that_cannot_be_one(local, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(BloomdeskError, match="file"):
        download(NAME, tmp_path / "file")


@pytest.mark.parametrize("name", [NAME, BLOOM])
def test_offline_with_everything_in_place(local, pins, target, monkeypatch, name):
    commit = download(name, target).revision.commit
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    local.requests.clear()
    for revision in (None, commit):
        assert download(name, target, revision).kept == NEEDED
    assert local.requests == []
    if name == NAME:
        with pytest.raises(BloomdeskError, match="offline mode is on"):
            download(name, target, "main")


@pytest.mark.parametrize("name", [NAME, BLOOM])
def test_offline_with_something_missing(local, pins, target, monkeypatch, name):
    download(name, target)
    (target / VICTIM).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        BloomdeskError, match=rf"1 of 8 files .* missing \({VICTIM} first\): offline mode is on"
    ):
        download(name, target)


def test_a_part_of_other_bytes_or_of_too_many_never_gets_in(local, repo, target):
    target.mkdir()
    (target / f"{SHARDS[0]}.incomplete").write_bytes(b"x" * (SHARD + 1))
    (target / f"{VICTIM}.incomplete").write_bytes(b"x" * 1000)
    with pytest.raises(BloomdeskError, match=f"{VICTIM} .* came damaged"):
        download(NAME, target)
    download(NAME, target)
    assert_whole(target, repo)
