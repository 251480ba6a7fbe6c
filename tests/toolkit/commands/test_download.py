"""Downloads over HTTP from the local hub: whole, gone on with, refused, full, offline."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from runner.errors import BloomdeskError
from runner.system.lock import sole_writer
from scripts.fakehub.server import Fault, LocalHub, Repo
from tests.support.bloom_repos import (
    BIN_INDEX,
    BLOOM,
    COMMIT,
    NAME,
    NEEDED,
    SHARD,
    SHARDS,
    VICTIM,
    add_safetensors,
    assert_whole,
    fetched,
    ranges,
    wait_for_bytes,
    write_bin_repo,
)
from toolkit.commands.download import carry_out, download, plan_download
from toolkit.hub import revision as hub
from toolkit.hub.record import RECORD, load_record

pytest_plugins = ("tests.support.network",)
pytestmark = pytest.mark.usefixtures("client", "surroundings")


@pytest.mark.parametrize("name", [NAME, BLOOM])
def test_exactly_the_needed_files_are_fetched(local, repo, pins, target, name):
    told = []
    result = download(name, target, progress=lambda *each: told.append(each))
    assert_whole(target, repo)
    assert fetched(local) == set(NEEDED)
    assert result.fetched == NEEDED and result.kept == () and result.resumed == 0
    assert result.received == result.revision.total == sum((repo / each).stat().st_size for each in NEEDED)
    assert {(file, total, total) for file, _, total in told} <= set(told)
    assert load_record(target).commit == result.revision.commit
    assert result.revision.pinned == (name == BLOOM)


def test_the_pinned_list_is_used_without_asking_the_hub(local, pins, target):
    download(BLOOM, target)
    assert not [each for each in local.requests if each.path.startswith("/api")]


def test_a_second_run_fetches_and_hashes_nothing(local, repo, pins, target, monkeypatch):
    download(BLOOM, target)
    local.requests.clear()
    monkeypatch.setattr(hub.HubFile, "check", None)
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
    (target / VICTIM).unlink()
    local.requests.clear()
    states = {each.file.path: each.state for each in plan_download(NAME, target).files}
    assert states.pop(VICTIM) == "absent" and set(states.values()) == {"unchecked"}
    done = download(NAME, target)
    assert (done.fetched, len(done.hashed)) == ((VICTIM,), len(NEEDED) - 1)
    assert fetched(local) == {VICTIM}
    assert_whole(target, repo)


def test_a_file_that_vanished_is_fetched_anew(local, repo, target):
    download(NAME, target)
    (target / VICTIM).unlink()
    local.requests.clear()
    assert download(NAME, target).fetched == (VICTIM,)
    assert fetched(local) == {VICTIM}
    assert_whole(target, repo)


def test_a_touched_file_is_hashed_and_kept(local, repo, target):
    download(NAME, target)
    os.utime(target / VICTIM, ns=(1, 1))
    assert download(NAME, target).fetched == ()
    assert_whole(target, repo)


def test_a_hub_with_another_commit_under_the_pinned_one(local, repo, pins, target):
    local.repos[BLOOM] = Repo(repo, commit="f" * 40, branches=("main", COMMIT))
    with pytest.raises(BloomdeskError, match=f"commit should be {COMMIT}, .* says ffff"):
        download(BLOOM, target)


CHILD = """
import sys
from pathlib import Path
from toolkit.commands.download import download
download(sys.argv[1], Path(sys.argv[2]))
"""


@pytest.fixture
def stalled(local, target):
    """A download in a process that has 200,000 bytes of the victim and waits for more; killed afterwards."""
    local.fail(VICTIM, Fault(drop_after=200_000, stall=60.0, times=1))
    with subprocess.Popen([sys.executable, "-c", CHILD, NAME, str(target)]) as child:
        wait_for_bytes(target / f"{VICTIM}.incomplete", 200_000, child)
        yield child
        child.kill()


@pytest.mark.slow
def test_a_new_process_resumes_after_a_kill(local, repo, target, stalled):
    stalled.kill()
    stalled.wait()
    assert not (target / VICTIM).exists()
    planned = {each.file.path: each for each in plan_download(NAME, target).files}
    assert (planned[VICTIM].state, planned[VICTIM].to_fetch) == ("partial", SHARD - 200_000)
    local.requests.clear()
    subprocess.run(stalled.args, check=True)
    assert ranges(local, VICTIM) == ["bytes=200000-"]
    assert fetched(local) == {*SHARDS[1:]}
    assert_whole(target, repo)


@pytest.mark.slow
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


def test_a_plan_is_carried_out_without_asking_for_the_list_again(local, repo, target):
    plan = plan_download(NAME, target)
    local.requests.clear()
    assert carry_out(plan, connections=2).revision == plan.revision
    assert not [each for each in local.requests if each.path.startswith("/api")]
    assert_whole(target, repo)
    local.requests.clear()
    assert carry_out(plan).kept == NEEDED  # what is there now counts, not what the plan saw
    assert local.requests == []


def test_a_plan_does_not_go_into_a_directory_that_another_download_has_taken_since(local, target, pins):
    plan = plan_download(NAME, target)
    download(BLOOM, target)
    with pytest.raises(BloomdeskError, match=f"holds a download of {BLOOM} at .*, not of {NAME}"):
        carry_out(plan)


@pytest.mark.slow
def test_a_second_writer_is_refused(repo, target, stalled):
    with pytest.raises(BloomdeskError, match="another bloomdesk is writing there"):
        download(NAME, target)
    stalled.kill()
    stalled.wait()
    download(NAME, target)
    assert_whole(target, repo)
    with sole_writer(target):
        pass


def test_a_hostile_index_writes_nothing(local, repo, target, tmp_path):
    hostile = tmp_path / "hostile"
    shutil.copytree(repo, hostile)
    (hostile / BIN_INDEX).write_text('{"weight_map": {"a": "../outside.bin"}}')
    local.repos[NAME] = Repo(hostile)
    with pytest.raises(
        BloomdeskError, match=r"'\.\./outside\.bin' is not the name of a shard beside it, which ends in \.bin"
    ):
        download(NAME, target)
    assert not target.exists()


def test_a_plan_gives_the_figures_and_writes_nothing(local, repo, target, tmp_path):
    target, total = target / "deep" / "down", sum((repo / name).stat().st_size for name in NEEDED)
    plan = plan_download(NAME, target)
    assert [each.file.path for each in plan.files] == list(NEEDED)
    assert (plan.revision.total, plan.to_fetch, plan.fits) == (total, total, True)
    assert abs(plan.free - shutil.disk_usage(tmp_path).free) < 2**30
    assert not target.parent.exists()
    download(NAME, target)
    (target / VICTIM).unlink()
    (target / f"{VICTIM}.incomplete").write_bytes(b"x" * 1000)
    plan = plan_download(NAME, target)
    assert (plan.revision.total, plan.to_fetch, plan.work) == (total, SHARD - 1000, SHARD)
    assert [file.path for file in plan.unfinished] == [VICTIM]


def test_the_plan_for_the_real_bloom_needs_no_network(target, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan = plan_download(BLOOM, target)
    assert len(plan.unfinished) == 77 and plan.to_fetch == plan.revision.total == 352_509_349_350
    assert plan.fits == (plan.free >= plan.revision.total)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(local, repo, target, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    total = plan_download(NAME, target).revision.total
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
        patch.setattr(os, "write", full)
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


def test_an_interruption_keeps_what_was_hashed(local, repo, target, monkeypatch):
    """Files that came otherwise are read from the first only once."""
    shutil.copytree(repo, target)
    monkeypatch.setattr("toolkit.commands.download.SECONDS_OF_HASHING", 0.0)

    def stop(file, done, total):
        if file == SHARDS[2]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(NAME, target, progress=stop)
    read = []
    done = download(NAME, target, progress=lambda file, *_: read.append(file))
    assert set(read) == {SHARDS[2]} and done.hashed == (SHARDS[2],)
    assert load_record(target).missing_in(target) == ()
