"""The cache of huggingface_hub: a download copies and hashes its files, and changes nothing in it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from scripts.fakehub.checkpoint import Layout
from scripts.fakehub.server import LocalHub, Repo
from scripts.fakehub.shelf import git_blob
from tests.support.bloom_repos import COMMIT, NAME, NEEDED, SHARDS, VICTIM, assert_whole, fetched
from tests.support.commands import run
from tests.support.lossless import flip, make
from toolkit.commands.convert import convert
from toolkit.commands.download import download, plan_download
from toolkit.commands.prepare import prepare
from toolkit.hub.hub_cache import cache_directory, snapshot_of

pytest_plugins = ("tests.support.network",)
pytestmark = pytest.mark.usefixtures("client", "surroundings")


def fill(cache: Path, repo: Path, name: str = NAME, commit: str = COMMIT) -> Path:
    """The snapshot of `repo`, as huggingface_hub puts it into its cache."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for path in (path for path in repo.iterdir() if path.is_file()):
        data = path.read_bytes()
        is_large = path.suffix in (".bin", ".safetensors")
        blob = hashlib.sha256(data).hexdigest() if is_large else git_blob(data)
        (folder / "blobs" / blob).write_bytes(data)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob)
    return snapshot


def state(directory: Path) -> dict[str, tuple[bytes, int, int]]:
    """Bytes, time of change and number of links of all that is in a cache."""
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_nlink)
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(repo: Path, monkeypatch: pytest.MonkeyPatch):
    with LocalHub({NAME: Repo(repo, commit=COMMIT)}) as started:
        monkeypatch.setenv("HF_ENDPOINT", started.endpoint)
        yield started


def test_what_the_cache_has_is_not_fetched(hub, repo: Path, cache: Path, target: Path) -> None:
    fill(cache, repo)
    before = state(cache)
    plan = plan_download(NAME, target)
    assert plan.to_copy == plan.to_fetch == plan.revision.total
    done = download(NAME, target)
    assert_whole(target, repo)
    assert fetched(hub) == set() and (done.received, done.cached) == (0, done.revision.total)
    assert not any((target / name).is_symlink() for name in NEEDED)
    for path in target.iterdir():
        # Whatever becomes of the copies, the cache stays as it is.
        path.chmod(0o600)
        path.write_bytes(b"")
    shutil.rmtree(target)
    assert state(cache) == before


def test_a_damaged_file_of_the_cache_is_fetched(hub, repo: Path, cache: Path, target: Path) -> None:
    snapshot = fill(cache, repo)
    flip((snapshot / VICTIM).resolve(), 1000)
    (snapshot / SHARDS[0]).unlink()
    (snapshot / SHARDS[2]).resolve().write_bytes(b"cut")
    before = state(cache)
    done = download(NAME, target)
    assert_whole(target, repo)
    # The first shard has lost its link, and is known by its blob.
    assert fetched(hub) == {VICTIM, SHARDS[2]} and done.fetched == NEEDED
    assert state(cache) == before


def test_a_begun_file_goes_on_from_the_cache(hub, repo: Path, cache: Path, target: Path) -> None:
    fill(cache, repo)
    download(NAME, target)
    record = (target / "bloomdesk-download.json").read_bytes()
    whole = (target / VICTIM).read_bytes()
    (target / VICTIM).unlink()
    (target / f"{VICTIM}.incomplete").write_bytes(whole[:1000])
    done = download(NAME, target)
    assert (done.resumed, done.cached, done.received) == (1000, len(whole) - 1000, 0)
    assert_whole(target, repo)
    assert json.loads(record)["commit"] == COMMIT


def test_the_command_says_what_it_copies(hub, repo: Path, cache: Path, target: Path) -> None:
    fill(cache, repo)
    said = run("download", NAME, target, "--dry-run").stdout
    assert (
        f"{VICTIM}  (in the Hub's cache)" in said
        and "still to fetch: 0 bytes, to copy from the Hub's" in said
    )
    assert (
        "0 bytes fetched, " in (said := run("download", NAME, target).stdout)
        and "from the Hub's cache" in said
    )


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/b"}, "/b"),
        ({"HF_HOME": "/c"}, "/c/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({"HOME": "/e"}, "/e/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_directory() == Path(expected)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (f"/x/models--big--bloom-7b1/snapshots/{COMMIT}", ("big/bloom-7b1", COMMIT)),
        (f"/x/models--gpt2/snapshots/{COMMIT}", ("gpt2", COMMIT)),
        ("/x/models--big--bloom/snapshots/main", None),
        (f"/x/big--bloom/snapshots/{COMMIT}", None),
        ("/", None),
    ],
)
def test_a_snapshot_is_known_by_its_place(path: str, expected: tuple[str, str] | None) -> None:
    assert snapshot_of(Path(path)) == expected


@pytest.fixture
def bloom(tmp_path: Path) -> Path:
    """A real checkpoint, which a conversion reads."""
    return make(tmp_path / "bloom", Layout())


def test_a_snapshot_is_recorded_and_the_hub_repairs_it(
    bloom: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, out = fill(cache, bloom), tmp_path / "out"
    convert(snapshot, out)
    source = json.loads((out / "manifest.json").read_text())["source"]
    assert source == {"repo": NAME, "commit": COMMIT}
    whole = (out / "block_01.safetensors").read_bytes()
    flip(out / "block_01.safetensors", 5000)
    with LocalHub({NAME: Repo(bloom, commit=COMMIT)}) as started:
        monkeypatch.setenv("HF_ENDPOINT", started.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
        assert run("repair", out).returncode == 0
    assert (out / "block_01.safetensors").read_bytes() == whole


def test_a_snapshot_that_was_changed_is_a_local_checkpoint(bloom: Path, cache: Path, tmp_path: Path) -> None:
    snapshot = fill(cache, bloom)
    config = (snapshot / "config.json").read_bytes()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_bytes(config + b" ")
    convert(snapshot, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["repo"] is None


def test_a_damaged_blob_is_found_by_its_name(bloom: Path, cache: Path, tmp_path: Path) -> None:
    snapshot = fill(cache, bloom)
    shard = next(path for path in sorted(snapshot.iterdir()) if path.suffix == ".bin")
    flip(shard.resolve(), shard.stat().st_size // 2)
    done = run("convert", snapshot, tmp_path / "out")
    assert done.returncode == 1 and f"{shard} is damaged or has changed: its sha256 is" in done.stderr
    assert "hf download" in done.stderr


def test_prepare_takes_shards_from_the_cache(
    bloom: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cache, bloom)
    before = state(cache)
    with LocalHub({NAME: Repo(bloom, commit=COMMIT)}) as started:
        monkeypatch.setenv("HF_ENDPOINT", started.endpoint)
        done = prepare(NAME, tmp_path / "out")
        shards = {path for path in fetched(started) if path.endswith(".bin")}
    # The first megabyte of one is asked for its dtype.
    assert len(shards) <= 1 and done.received == 0 and done.cached > 0
    assert state(cache) == before
    convert(bloom, tmp_path / "other")
    for part in (tmp_path / "other").glob("*.safetensors"):
        assert (tmp_path / "out" / part.name).read_bytes() == part.read_bytes()
