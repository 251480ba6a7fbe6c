"""What `prepare` finds in `.source`: only what is right goes into a part, and only what is ours is removed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runner.errors import BloomdeskError
from runner.format.manifest import load_manifest
from scripts.fakehub.checkpoint import synthetic
from scripts.fakehub.server import Fault, LocalHub
from tests.support.commands import refused, run
from toolkit.commands import staged_shards
from toolkit.commands.convert import convert
from toolkit.commands.prepare import plan_preparation, prepare
from toolkit.hub import retry, revision
from toolkit.hub.record import RECORD, load_record
from toolkit.parts.destination import STAGING

REPO = "me/bloom"
FIRST, SECOND = "pytorch_model_00001-of-00005.bin", "pytorch_model_00002-of-00005.bin"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("staging")
    synthetic(base / "repo", hidden_size=64, heads=8, blocks=3, vocab_size=300)
    convert(base / "repo", base / "expected")
    return base / "repo"


@pytest.fixture
def hub(source: Path, monkeypatch: pytest.MonkeyPatch):
    with LocalHub({REPO: source}) as local:
        monkeypatch.setenv("HF_ENDPOINT", local.endpoint)
        monkeypatch.setattr(retry, "BACKOFF", ())
        yield local


@pytest.fixture
def begun(hub: LocalHub, tmp_path: Path) -> Path:
    """A directory without parts, with the first shard staged and recorded."""
    hub.fail(SECOND, Fault(method="HEAD", status=404, code="EntryNotFound"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toolkit.commands.build.write_part", stopped)
        with pytest.raises((BloomdeskError, KeyboardInterrupt)):
            prepare(REPO, tmp_path / "out")
    hub.faults.clear()
    hub.requests.clear()
    assert (tmp_path / "out" / STAGING / FIRST).is_file()
    return tmp_path / "out"


def stopped(*_: object) -> None:
    raise KeyboardInterrupt


def parts_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def assert_right(out: Path, source: Path) -> None:
    assert parts_in(out) == parts_in(source.parent / "expected")


def decay(path: Path) -> None:
    """Flip bits in the middle, where the weights are; the date stays."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


RIGHT: dict[str, Callable[[Path], object]] = {
    "as it was": lambda staging: None,
    "touched": lambda staging: os.utime(staging / FIRST, ns=(1, 1)),
    "no record": lambda staging: (staging / RECORD).unlink(),
    "damaged record": lambda staging: (staging / RECORD).write_text("{"),
}
WRONG: dict[str, Callable[[Path], object]] = {
    "decayed": lambda staging: decay(staging / FIRST),
    "written to": lambda staging: (staging / FIRST).write_bytes(b"x" * (staging / FIRST).stat().st_size),
    "cut off": lambda staging: os.truncate(staging / FIRST, 100),
}


@pytest.mark.parametrize("change", RIGHT.values(), ids=RIGHT)
def test_a_staged_shard_that_is_right_does_not_come_twice(hub, source, begun, change) -> None:
    change(begun / STAGING)
    is_known = (begun / STAGING / RECORD).exists()
    assert prepare(REPO, begun).resumed == (source / FIRST).stat().st_size
    assert_right(begun, source)
    # Without a record it may be the user's own.
    left = list((begun / STAGING).iterdir()) if (begun / STAGING).exists() else []
    assert [path.name for path in left] == ([] if is_known else [FIRST])


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_staged_shard_that_is_wrong_is_fetched_again(hub, source, begun, change) -> None:
    change(begun / STAGING)
    found, date = (begun / STAGING / FIRST).read_bytes(), (begun / STAGING / FIRST).stat().st_mtime_ns
    is_decayed = load_record(begun / STAGING).files[FIRST].mtime_ns == date
    assert prepare(REPO, begun).resumed == 0
    assert_right(begun, source)
    if is_decayed:
        assert not (begun / STAGING).exists()
    else:
        # It may be somebody's work.
        assert [path.name for path in (begun / STAGING).iterdir()] == [f"{FIRST}.changed"]
        assert (begun / STAGING / f"{FIRST}.changed").read_bytes() == found


def test_a_staged_shard_that_somebody_replaced_is_not_deleted_when_it_is_not_needed(
    hub, source, begun
) -> None:
    """An earlier run has made all its parts, and ended before it could delete the shard."""
    staged = (begun / STAGING / FIRST).read_bytes()
    record = (begun / STAGING / RECORD).read_bytes()
    prepare(REPO, begun)
    (begun / STAGING).mkdir()
    (begun / STAGING / RECORD).write_bytes(record)
    (begun / STAGING / FIRST).write_bytes(b"mine" + staged[4:])
    (begun / "block_02.safetensors").unlink()
    prepare(REPO, begun)
    assert_right(begun, source)
    assert (begun / STAGING / FIRST).read_bytes() == b"mine" + staged[4:]


@pytest.mark.parametrize("change", ["alone", "linked"])
def test_a_beginning_that_is_not_from_here_stays_as_it_is(hub, source, begun, tmp_path, change) -> None:
    """Under the name that a beginning of ours has; without the record, or with another name elsewhere."""
    (begun / STAGING / FIRST).unlink()
    path = begun / STAGING / f"{FIRST}.incomplete"
    path.write_bytes(b"mine")
    if change == "alone":
        (begun / STAGING / RECORD).unlink()
        with pytest.raises(BloomdeskError, match=r"no record that this program has begun it"):
            prepare(REPO, begun)
        assert path.read_bytes() == b"mine"
        return
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(b"mine")
    path.hardlink_to(tmp_path / "elsewhere")
    prepare(REPO, begun)
    assert_right(begun, source)
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_file_that_is_not_from_here_is_refused_by_name(hub, begun, change) -> None:
    (begun / STAGING / RECORD).unlink()
    change(begun / STAGING)
    found = (begun / STAGING / FIRST).read_bytes()
    with pytest.raises(BloomdeskError, match=f"not from this program: {FIRST}"):
        prepare(REPO, begun)
    assert (begun / STAGING / FIRST).read_bytes() == found
    assert not load_manifest(begun).parts


def test_a_shard_that_decays_after_it_came_goes_into_no_part(hub, source, tmp_path, monkeypatch) -> None:
    real = staged_shards.read_member

    def late(index, path):
        tensors = real(index, path)
        if path.name == SECOND:
            decay(path)
        return tensors

    with monkeypatch.context() as patch:
        patch.setattr(staged_shards, "read_member", late)
        # Hashed only once it has decayed.
        patch.setattr(staged_shards.ShardHashes, "begin", lambda self, path: None)
        patch.setattr(staged_shards.ShardHashes, "result", lambda self, path: self._sha256(path))
        with pytest.raises(BloomdeskError, match=f"{SECOND} has changed on the disk since it arrived"):
            prepare(REPO, tmp_path / "out")
    out = tmp_path / "out"
    assert (
        "block_00.safetensors" not in load_manifest(out).parts and not (out / "block_00.safetensors").exists()
    )
    assert not (out / STAGING / SECOND).exists()
    prepare(REPO, out)
    assert_right(out, source)


@pytest.mark.parametrize(
    "make", [lambda path, other: path.symlink_to(other), lambda path, _: path.write_text("mine")]
)
def test_what_is_no_directory_of_ours_is_refused_before_anything_is_written(hub, tmp_path, make) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / STAGING, tmp_path / "elsewhere")
    assert "is in the way: it is no directory" in refused("prepare", REPO, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [STAGING]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_is_not_ours_stays_and_is_said(hub, source, begun) -> None:
    (begun / STAGING / "thesis.txt").write_text("years of work")
    (begun / STAGING / "more").mkdir()
    (begun / STAGING / f"{SECOND}.incomplete").write_bytes(b"")
    done = run("prepare", REPO, begun)
    assert done.returncode == 0 and "stays: it holds more, thesis.txt" in done.stderr
    assert sorted(path.name for path in (begun / STAGING).iterdir()) == ["more", "thesis.txt"]
    assert_right(begun, source)


def test_a_directory_that_cannot_be_removed_is_no_failure(hub, source, begun, monkeypatch) -> None:
    def refuse(self: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))

    monkeypatch.setattr(Path, "rmdir", refuse)
    done = run("prepare", REPO, begun)
    assert done.returncode == 0 and "cannot be removed: Device or resource busy" in done.stderr
    assert_right(begun, source)


def test_parts_of_other_shards_are_another_source(hub, begun, monkeypatch) -> None:
    prepare(REPO, begun)
    (begun / "block_02.safetensors").unlink()
    real = revision.resolve

    def changed(repo: str, wanted: str | None = None, *_: object, **__: object):
        found = real(repo, wanted)
        files = tuple(replace(file, sha256="0" * 64) if file.path == FIRST else file for file in found.files)
        return replace(found, files=files)

    monkeypatch.setattr(revision, "resolve", changed)
    with pytest.raises(BloomdeskError, match=f"another source: it has parts of another {FIRST}"):
        plan_preparation(REPO, begun)


def test_a_small_temporary_directory_is_not_used(hub, tmp_path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert plan_preparation(REPO, tmp_path / "out").companions
