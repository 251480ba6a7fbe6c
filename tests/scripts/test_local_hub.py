"""The local hub as huggingface_hub's own client sees it, and as a script."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from scripts.fakehub.server import Fault, LocalHub, RandomFaults, Repo
from tests.support.bloom_repos import NEEDED, SHARD, SHARDS, sha256, write_bin_repo

SCRIPT = "scripts.fakehub.server"
NAME = "someone/bloom-small"


@pytest.fixture(scope="module")
def library():
    """huggingface_hub, without the requests that its telemetry would make."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    yield huggingface_hub
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return write_bin_repo(tmp_path_factory.mktemp("hub") / "repo")


@pytest.fixture
def local(repo):
    with LocalHub({NAME: repo}, page_size=4) as started:
        yield started


def ask(address, method, path, **headers):
    """One request: status, headers, body."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    try:
        connection.request(
            method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def shard_address(local, name=SHARDS[0]):
    status, headers, _ = ask(local.endpoint, "HEAD", f"/{NAME}/resolve/main/{name}")
    assert status == 302
    parts = urlsplit(headers["Location"])
    assert f"http://{parts.netloc}" == local.store
    return f"{parts.path}?{parts.query}"


def test_the_library_downloads_a_whole_repository(local, repo, library, tmp_path):
    target = tmp_path / "target"
    library.snapshot_download(NAME, local_dir=target, endpoint=local.endpoint, token=False)
    for path in repo.rglob("*"):
        if path.is_file():
            assert (target / path.relative_to(repo)).read_bytes() == path.read_bytes()


def test_the_library_s_own_comparison_of_hashes_agrees(local, repo, library):
    api = library.HfApi(endpoint=local.endpoint, token=False)
    result = api.verify_repo_checksums(NAME, local_dir=repo)
    assert result.checked_count == sum(path.is_file() for path in repo.rglob("*"))
    assert not result.mismatches and not result.missing_paths


def test_the_library_sees_the_same_metadata_as_from_the_hub(local, repo, library):
    api = library.HfApi(endpoint=local.endpoint, token=False)
    info = api.model_info(NAME)
    assert api.model_info(NAME, revision=info.sha[:8]).sha == info.sha
    files = {each.path: each for each in api.list_repo_tree(NAME, recursive=True)}
    assert {*NEEDED, "README.md", "tensorboard/main/events.out.tfevents.0"} <= set(files)
    assert {each.path for each in api.list_repo_tree(NAME)} == {*NEEDED, "README.md", "tensorboard"}
    shard, data = files[SHARDS[0]], (repo / SHARDS[0]).read_bytes()
    assert (shard.size, shard.lfs.sha256, shard.lfs.size) == (SHARD, sha256(data), SHARD)
    url = library.hf_hub_url(NAME, SHARDS[0], endpoint=local.endpoint)
    found = library.get_hf_file_metadata(url, token=False)
    assert (found.commit_hash, found.etag, found.size) == (info.sha, sha256(data), SHARD)
    assert found.xet_file_data is None


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("nobody/nothing/resolve/main/config.json", "RepositoryNotFoundError"),
        (f"{NAME}/resolve/elsewhere/config.json", "RevisionNotFoundError"),
        (f"{NAME}/resolve/main/nothing.json", "RemoteEntryNotFoundError"),
        ("gated/model/resolve/main/config.json", "GatedRepoError"),
        ("private/model/resolve/main/config.json", "RepositoryNotFoundError"),
    ],
)
@pytest.mark.parametrize("token", [False, "hf_wrong"])
def test_the_library_raises_its_errors(local, repo, library, path, error, token):
    local.repos["gated/model"] = Repo(repo, token="hf_right", gated=True)
    local.repos["private/model"] = Repo(repo, token="hf_right")
    with pytest.raises(getattr(library.errors, error)):
        library.get_hf_file_metadata(f"{local.endpoint}/{path}", token=token)
    if "model" in path:
        assert library.get_hf_file_metadata(f"{local.endpoint}/{path}", token="hf_right").size


def test_commits_follow_from_contents(repo, tmp_path):
    with LocalHub({NAME: repo, "other/name": repo}) as one, LocalHub({NAME: repo}) as two:
        commits = [
            json.loads(ask(hub.endpoint, "GET", f"/api/models/{NAME}")[2])["sha"] for hub in (one, two)
        ]
        assert commits[0] == commits[1] == one.shelf.commit(one.repos["other/name"])
        directory = tmp_path / "changing"
        directory.mkdir()
        (directory / "a").write_text("1")
        before = one.shelf.commit(Repo(directory))
        (directory / "a").write_text("22")
        assert before != one.shelf.commit(Repo(directory))
        assert one.shelf.commit(Repo(directory, commit="c" * 40)) == "c" * 40


@pytest.mark.parametrize("name", [SHARDS[0], "config.json"])
def test_ranges_are_served_as_asked_for(local, repo, name):
    data = (repo / name).read_bytes()
    if name == "config.json":
        address, path = local.endpoint, f"/{NAME}/resolve/main/{name}"
    else:
        address, path = local.store, shard_address(local)
    for wanted, expected in (
        ("bytes=100-", data[100:]),
        ("bytes=5-9", data[5:10]),
        ("bytes=0-999999999", data),
    ):
        status, headers, body = ask(address, "GET", path, Range=wanted)
        assert (status, body) == (206, expected)
        first = int(wanted[6:].partition("-")[0])
        assert headers["Content-Range"] == f"bytes {first}-{first + len(expected) - 1}/{len(data)}"
    status, headers, _ = ask(address, "GET", path, Range=f"bytes={len(data)}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{len(data)}")
    etag = ask(address, "HEAD", path)[1]["ETag"]
    assert ask(address, "GET", path, Range="bytes=5-", If_Range=etag)[0] == 206
    assert ask(address, "GET", path, Range="bytes=5-", If_Range='"other"')[0] == 200
    assert ask(address, "GET", path)[2] == data


def test_the_store_wants_its_signature_and_nothing_outside_is_served(local, repo):
    path = shard_address(local)
    assert ask(local.store, "GET", path.partition("?")[0])[0] == 403
    (repo.parent / "outside.txt").write_text("secret")
    for reach in ("../outside.txt", "%2e%2e/outside.txt", "/etc/passwd", "tensorboard"):
        assert ask(local.endpoint, "GET", f"/{NAME}/resolve/main/{reach}")[0] == 404


def test_faults_apply_in_their_order_and_requests_are_recorded(local, repo):
    path, data = shard_address(local), (repo / SHARDS[0]).read_bytes()
    local.requests.clear()
    local.fail(
        SHARDS[0],
        Fault(status=429, headers={"Retry-After": "3"}, times=1),
        Fault(flip=7, times=1),
        Fault(ignore_range=True, times=1),
        Fault(size=10, times=1),
        Fault(size=SHARD + 5, times=1),
    )
    status, headers, _ = ask(local.store, "GET", path)
    assert (status, headers["Retry-After"]) == (429, "3")
    changed = ask(local.store, "GET", path)[2]
    assert [at for at in range(SHARD) if changed[at] != data[at]] == [7]
    assert ask(local.store, "GET", path, Range="bytes=5-")[0] == 200
    assert ask(local.store, "GET", path)[2] == data[:10]
    assert ask(local.store, "GET", path)[2] == data + bytes(5)
    assert ask(local.store, "GET", path)[2] == data
    assert [each.server for each in local.asked("GET", SHARDS[0])] == ["cdn"] * 6
    assert local.requests[2].headers["range"] == "bytes=5-"


@pytest.mark.parametrize(
    "fault", [Fault(drop_after=1000), Fault(drop_after=0), Fault(drop_after=1000, reset=True)]
)
def test_a_fault_drops_the_connection(local, fault):
    path = shard_address(local)
    local.fail(SHARDS[0], fault)
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        ask(local.store, "GET", path)


def test_the_rate_limits_each_connection_alone(repo):
    with LocalHub({NAME: repo}, rate=1_000_000) as local:
        path, began = shard_address(local), time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            bodies = pool.map(lambda _: ask(local.store, "GET", path)[2], range(4))
        assert set(bodies) == {(repo / SHARDS[0]).read_bytes()}
        assert 0.2 < time.monotonic() - began < 4 * SHARD / 1e6  # 0.3 s each, all at the same time


@pytest.mark.slow
def test_random_faults_are_the_same_for_the_same_seed(repo):
    data, met = (repo / SHARDS[0]).read_bytes(), {}
    for run, seed in (("first", 1), ("again", 1), ("other", 2)):
        with LocalHub({NAME: repo}) as local:
            path, met[run] = shard_address(local), []
            local.random_faults = RandomFaults(seed, share=0.6, longest_stall=0.01)
            for _ in range(60):
                try:
                    status, _, body = ask(local.store, "GET", path)
                    met[run].append((status, body == data))
                except (http.client.HTTPException, OSError):
                    met[run].append(("broken", False))
    assert met["first"] == met["again"] != met["other"]
    kinds = {kind for kind, _ in met["first"]}
    assert {200, "broken"} <= kinds and kinds & {429, 500, 502, 503}
    assert (200, True) in met["first"]


def test_closing_does_not_wait_for_stalls_or_idle_clients(repo):
    with LocalHub({NAME: repo}) as local:
        local.fail("config.json", Fault(stall=60.0))
        address = urlsplit(local.endpoint).netloc
        stalled, idle = http.client.HTTPConnection(address), http.client.HTTPConnection(address)
        stalled.request("GET", f"/{NAME}/resolve/main/config.json")
        idle.request("GET", f"/api/models/{NAME}")
        idle.getresponse().read()
        began = time.monotonic()
    assert time.monotonic() - began < 5
    stalled.close()
    idle.close()


def test_a_hub_that_was_never_started_can_be_closed(repo):
    LocalHub({NAME: repo}).close()


@pytest.fixture
def script(repo):
    """Start the script with its output and input as pipes; (process, address)."""
    started = []

    def start(*options):
        command = [sys.executable, "-m", SCRIPT, f"{NAME}={repo}", *options]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        with process:
            process.kill()


@pytest.mark.slow
def test_the_script_serves_loopback_until_its_input_closes(script):
    process, address = script()
    assert urlsplit(address).hostname == "127.0.0.1"
    assert ask(address, "GET", f"/api/models/{NAME}")[0] == 200
    process.stdin.close()
    assert process.wait(10) == 0


@pytest.mark.slow
def test_the_script_limits_the_rate_and_lets_answers_fail(script):
    _, address = script("--rate", "1", "--faults", "7", "--share", "1", "--longest-stall", "0")
    assert {ask(address, "GET", f"/api/models/{NAME}")[0] for _ in range(30)} & {429, 500, 502, 503}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_script_ends_cleanly_on_a_signal(script, number):
    process, _ = script()
    process.send_signal(number)
    assert process.wait(10) == 0


@pytest.mark.slow
def test_the_script_ends_after_its_time(script):
    process, _ = script("--minutes", "0.005")
    assert process.wait(10) == 0


@pytest.mark.slow
def test_the_script_ends_when_its_parent_ends(repo):
    # The shell leaves it behind; its standard input is /dev/null, which says nothing.
    command = f'"{sys.executable}" -m "{SCRIPT}" "{NAME}={repo}" </dev/null & sleep 1.5'
    with subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout.readline().startswith("http://127.0.0.1:")
        shell.kill()
        assert shell.stdout.read() == ""  # ends when the script has closed it


@pytest.mark.slow
@pytest.mark.parametrize("given", ["no-directory", "name=", "=.", "name=/no/such/directory"])
def test_the_script_refuses_what_it_cannot_serve(given):
    result = subprocess.run(
        [sys.executable, "-m", SCRIPT, given], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "NAME=DIRECTORY" in result.stderr
