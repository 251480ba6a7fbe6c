"""Revisions, pins, and the choice of what is needed, over HTTP against the local hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.errors import BloomdeskError
from scripts.fakehub.server import Fault, LocalHub, Repo
from tests.support.bloom_repos import (
    BIN_INDEX,
    BLOOM,
    COMMIT,
    NAME,
    NEEDED,
    SMALL,
    add_safetensors,
    write_bin_repo,
)
from tests.support.clocks import FastClock
from toolkit.hub import retry
from toolkit.hub import revision as hub
from toolkit.hub.line import Line
from toolkit.source.index import parse_index

SHARED = Path(__file__).parents[4] / "shared" / "hub"
REFERENCE = SHARED / "bigscience-bloom-2a3d62e"
with_reference = pytest.mark.skipif(not SHARED.is_dir(), reason="the reference data is not here")

pytest_plugins = ("tests.support.network",)
pytestmark = pytest.mark.usefixtures("client", "surroundings")


@pytest.fixture
def repo(tmp_path):
    return write_bin_repo(tmp_path / "repo")


@pytest.fixture
def serve(monkeypatch):
    """Start a local hub for the test and point HF_ENDPOINT at it."""
    started = []

    def start(repos, **options):
        started.append(LocalHub(repos, **options).__enter__())
        monkeypatch.setenv("HF_ENDPOINT", started[-1].endpoint)
        return started[-1]

    yield start
    for each in started:
        each.close()


def read_from(directory):
    return lambda file: (directory / file.path).read_bytes()


def chosen(directory, revision=None):
    return [file.path for file in hub.needed(hub.resolve(NAME, revision), read_from(directory)).files]


def test_the_pins_hold_exactly_the_needed_files():
    revision = hub.pinned(BLOOM)
    assert revision.commit == COMMIT
    assert len(revision.files) == 77
    shards = [file for file in revision.files if file.path.endswith(".bin")]
    assert [file.path for file in shards] == [f"pytorch_model_{n:05d}-of-00072.bin" for n in range(1, 73)]
    assert sum(file.size for file in shards) == 352_494_784_336
    assert revision.total == 352_494_784_336 + 14_565_014
    assert {file.path for file in revision.files if file not in shards} == {*SMALL, BIN_INDEX}
    assert all(len(file.sha256) == 64 for file in revision.files)


@with_reference
def test_the_pins_are_the_reference_data():
    listed = json.loads((SHARED / "bigscience-bloom-2a3d62e.files.json").read_text())
    entries = {entry["path"]: entry for entry in listed["files"]}
    for file in hub.pinned(BLOOM).files:
        entry = entries[file.path]
        assert entry["size"] == file.size
        if "lfs" in entry:
            assert entry["lfs"]["oid"] == file.sha256
            continue
        data = (REFERENCE / file.path).read_bytes()
        assert hashlib.sha256(data).hexdigest() == file.sha256
        assert hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest() == entry["oid"]


@with_reference
def test_the_pinned_shards_are_those_of_the_real_index():
    index = (REFERENCE / BIN_INDEX).read_bytes()
    pinned = [file.path for file in hub.pinned(BLOOM).files if file.path.endswith(".bin")]
    assert sorted(set(parse_index(index, ".bin", "the index").values())) == pinned


@pytest.mark.parametrize("revision", [None, COMMIT, COMMIT.upper()])
def test_bloom_is_pinned_and_the_hub_is_not_asked(serve, repo, revision):
    local = serve({BLOOM: repo})
    assert hub.resolve(BLOOM, revision).pinned
    assert local.requests == []


def test_a_branch_of_bloom_that_means_the_pinned_commit_gives_the_pins(serve, repo):
    serve({BLOOM: Repo(repo, commit=COMMIT)})
    assert hub.resolve(BLOOM, "main") == hub.pinned(BLOOM)


def test_another_revision_of_bloom_comes_from_the_hub(serve, repo):
    serve({BLOOM: repo})
    revision = hub.resolve(BLOOM, "main")
    assert not revision.pinned and revision.commit != COMMIT
    assert hub.needed(revision, read_from(repo)).total < 2_000_000


@pytest.mark.parametrize("revision", [None, "main", "refs/pr/1", "abcdef0", "abcdef0" + "1" * 33])
def test_every_name_of_a_revision_becomes_its_commit(serve, repo, revision):
    commit = "abcdef0" + "1" * 33
    local = serve({NAME: Repo(repo, commit=commit, branches=("main", "refs/pr/1"))})
    found = hub.resolve(NAME, revision)
    assert found.commit == commit
    assert len(local.asked("GET", f"/tree/{commit}")) == 1
    assert len(local.requests) == (1 if revision == commit else 2)  # a commit is not asked for


def test_hashes_come_from_the_tree_page_by_page(serve, repo):
    local = serve({NAME: repo}, page_size=3)
    revision = hub.resolve(NAME)
    assert len(local.asked("GET", f"/tree/{revision.commit}")) == 5
    for name in NEEDED:
        file, data = revision.find(name), (repo / name).read_bytes()
        assert file.size == len(data)
        if name.endswith(".bin") or name == "tokenizer.json":
            assert (file.sha256, file.git_sha1) == (hashlib.sha256(data).hexdigest(), None)
        else:
            blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            assert (file.sha256, file.git_sha1) == (None, blob)


def test_only_what_is_needed_is_chosen(serve, repo):
    serve({NAME: repo})
    assert chosen(repo) == list(NEEDED)


def test_names_with_a_dash_and_absent_companions(serve, tmp_path):
    names = tuple(f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2))
    repo = write_bin_repo(tmp_path / "dash", names)
    (repo / "special_tokens_map.json").unlink()
    serve({NAME: repo})
    assert chosen(repo) == [*SMALL[:3], BIN_INDEX, *names]


def test_a_whole_safetensors_set_comes_before_bin(serve, repo):
    names = add_safetensors(repo)
    serve({NAME: repo})
    assert chosen(repo) == [*SMALL, "model.safetensors.index.json", *names]


def test_an_incomplete_safetensors_set_does_not(serve, repo):
    (repo / add_safetensors(repo)[0]).unlink()
    serve({NAME: repo})
    assert chosen(repo) == list(NEEDED)


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (("model.safetensors", "pytorch_model.bin"), "model.safetensors"),
        (("pytorch_model.bin",), "pytorch_model.bin"),
    ],
)
def test_single_files(serve, repo, present, expected):
    for path in repo.glob("pytorch_model*"):
        path.unlink()
    for name in present:
        (repo / name).write_bytes(b"weights")
    serve({NAME: repo})
    assert chosen(repo) == [*SMALL, expected]


def test_a_shard_that_the_repository_lacks_is_named(serve, repo):
    (repo / NEEDED[-1]).unlink()
    serve({NAME: repo})
    with pytest.raises(BloomdeskError, match=f"{BIN_INDEX} names {NEEDED[-1]}.*1 of 3 missing"):
        chosen(repo)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_repository_without_a_required_file_is_refused(serve, repo, name):
    (repo / name).unlink()
    serve({NAME: repo})
    with pytest.raises(BloomdeskError, match=f"holds no {name}"):
        chosen(repo)


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "a--b", "someone/", "-a", "x\n"])
def test_what_is_no_name_is_refused_before_any_request(serve, repo, name):
    local = serve({NAME: repo})
    with pytest.raises(BloomdeskError, match="not the name of a repository"):
        hub.resolve(name)
    assert local.requests == []


def test_an_unknown_repository(serve, repo, monkeypatch):
    local = serve({NAME: repo})
    with pytest.raises(BloomdeskError, match="no repository someone/else, or it is private") as caught:
        hub.resolve("someone/else")
    assert "HF_TOKEN" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(BloomdeskError, match="or the token in HF_TOKEN may not read it"):
        hub.resolve("someone/else")
    assert len(local.requests) == 2  # neither 401 nor 404 is tried again


@pytest.mark.parametrize("revision", ["no-such-branch", "0" * 40])
def test_an_unknown_revision(serve, repo, revision):
    local = serve({NAME: repo})
    with pytest.raises(BloomdeskError, match=f"{NAME} has no revision '{revision}'") as caught:
        hub.resolve(NAME, revision)
    assert "--revision" in caught.value.hint
    assert len(local.requests) == 1


def test_a_private_repository_opens_with_its_token(serve, repo, monkeypatch):
    serve({NAME: Repo(repo, token="hf_right")})
    with pytest.raises(BloomdeskError, match="no repository"):
        hub.resolve(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert hub.resolve(NAME).find("config.json")


@pytest.mark.parametrize(
    ("status", "expected"), [(401, "does not accept"), (403, "refuses access"), (418, "418")]
)
def test_other_refusals_are_not_tried_again(serve, repo, status, expected):
    local = serve({NAME: repo})
    local.fail(f"/api/models/{NAME}/revision/main", Fault(status=status))
    with pytest.raises(BloomdeskError, match=expected):
        hub.resolve(NAME)
    assert len(local.requests) == 1


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_a_hub_with_a_passing_weakness_is_asked_again(serve, repo, status):
    local = serve({NAME: repo})
    local.fail(f"/api/models/{NAME}/revision/main", Fault(status=status, times=3))
    assert hub.resolve(NAME).find("config.json")
    assert len(local.asked("GET", "/revision/main")) == 4


def test_a_hub_that_stays_weak_is_an_error(serve, repo):
    local = serve({NAME: repo})
    local.fail(f"/api/models/{NAME}/revision/main", Fault(status=503))
    with pytest.raises(BloomdeskError, match="answered 503") as caught:
        hub.resolve(NAME)
    assert "resumes where" in caught.value.hint
    assert len(local.requests) == 1 + len(retry.BACKOFF)


@pytest.mark.parametrize("header", [{"Retry-After": "7"}, {"ratelimit": '"api";r=0;t=7'}])
def test_a_hub_that_asks_for_a_pause_gets_it(serve, repo, header):
    local = serve({NAME: repo})
    local.fail(f"/api/models/{NAME}/revision/main", Fault(status=429, headers=header, times=1))
    said, clock = [], FastClock(1000)
    began = clock.monotonic()
    hub.resolve(NAME, None, Line(say=said.append, clock=clock))
    assert clock.monotonic() - began >= 7
    assert len(said) == 1 and "answered 429" in said[0] and said[0].endswith(", as asked")


def test_a_pause_of_an_hour_is_left_to_the_user(serve, repo):
    local = serve({NAME: repo})
    local.fail(f"/api/models/{NAME}/revision/main", Fault(status=429, headers={"Retry-After": "3600"}))
    with pytest.raises(BloomdeskError, match=r"no more requests .* for 3600 seconds"):
        hub.resolve(NAME)
    assert len(local.requests) == 1


def test_a_hub_that_is_down(serve, repo):
    serve({NAME: repo}).close()
    with pytest.raises(BloomdeskError, match=r"the Hub at http://127\.0\.0\.1:\d+ cannot be reached"):
        hub.resolve(NAME)


def test_a_hub_that_is_silent(serve, repo, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    local = serve({NAME: repo})
    local.fail(f"/api/models/{NAME}/revision/main", Fault(stall=60.0))
    with pytest.raises(BloomdeskError, match="cannot be reached"):
        hub.resolve(NAME)


@pytest.mark.parametrize("address", ["not-an-address", "ftp://127.0.0.1", "http://127.0.0.1:99999999"])
def test_an_address_that_is_none(monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(BloomdeskError, match="environment variable HF_ENDPOINT"):
        hub.resolve(NAME)


@pytest.mark.parametrize("body", [b"<html>sign in</html>", b'{"sha": "../.."}', b"[1]"])
def test_something_that_is_no_hub(tmp_path, monkeypatch, body):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Portal(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Portal) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(BloomdeskError) as caught:
            hub.resolve(NAME)
        server.shutdown()
        thread.join()
    assert "HF_ENDPOINT" in caught.value.hint


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("http://127.0.0.1:port/next", "to an invalid address"),
        ("http://127.0.0.1:99999/next", "to an invalid address"),
        ("//[bad/next", "files to another host|to an invalid address"),
        ("http://localhost:1/next", "files to another host"),
        ("?recursive=true&expand=false", "without an end"),
    ],
)
def test_a_list_that_goes_on_nowhere(serve, repo, link, expected):
    local = serve({NAME: repo})
    commit = local.shelf.commit(local.repos[NAME])
    local.fail(f"/api/models/{NAME}/tree/{commit}", Fault(headers={"Link": f'<{link}>; rel="next"'}))
    with pytest.raises(BloomdeskError, match=expected):
        hub.resolve(NAME)
    assert len(local.requests) < 5


def test_offline_means_no_request(serve, repo, monkeypatch):
    local = serve({NAME: repo})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BloomdeskError, match=r"offline mode is on \(HF_HUB_OFFLINE\)"):
        hub.resolve(NAME)
    assert hub.resolve(BLOOM).pinned
    assert local.requests == []


def test_the_token_must_be_one(serve, repo, monkeypatch):
    serve({NAME: repo})
    monkeypatch.setenv("HF_TOKEN", "ключ")
    with pytest.raises(BloomdeskError, match="HF_TOKEN holds characters"):
        hub.resolve(NAME)


@pytest.mark.slow
def test_importing_is_light():
    modules = (
        "toolkit.hub, toolkit.commands.download, toolkit.hub.record, toolkit.hub.transfer, toolkit.hub.client"
    )
    heavy = ("huggingface_hub", "httpx2", "torch")
    check = f"import sys, {modules}; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", check], env=os.environ, check=False).returncode == 0
