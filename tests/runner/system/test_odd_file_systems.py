"""File systems that cannot do all that others can, and those that fail: what cannot be had is done without or said."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest

from runner.cli.results import Results
from runner.errors import BloomdeskError, explained
from runner.system import platform
from runner.system.atomic import write_atomically
from runner.system.disk import UNKNOWN_SPACE, free_bytes
from runner.system.lock import sole_writer
from tests.support.commands import run
from tests.support.lossless import make
from toolkit.io.disk import require_large_files


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_directory_that_cannot_be_synced_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    whole = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: fail(number) if _is_directory(fd) else whole(fd))
    write_atomically(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"


def test_a_directory_whose_sync_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: fail(errno.EIO) if _is_directory(fd) else None)
    with pytest.raises(OSError):
        write_atomically(tmp_path / "file", b"data")


@pytest.mark.parametrize("times", [3, 10**9])
def test_a_rename_that_a_scanner_blocks_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    whole, left, now = Path.replace, [times], [0.0]

    def blocked(path: Path, target: Path) -> None:
        left[0] -= 1
        fail(errno.EACCES) if left[0] >= 0 else whole(path, target)

    monkeypatch.setattr(Path, "replace", blocked)
    monkeypatch.setattr("time.sleep", lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with pytest.raises(PermissionError):
        # Elsewhere nothing but the rights is in the way.
        write_atomically(tmp_path / "file", b"data")
    left[0] = times
    monkeypatch.setattr(platform, "WINDOWS", True)
    if times < 10:
        write_atomically(tmp_path / "file", b"data")
        assert (tmp_path / "file").read_bytes() == b"data"
    else:
        with pytest.raises(PermissionError):
            write_atomically(tmp_path / "file", b"data")
        assert 2 < now[0] < 10


@pytest.mark.skipif(platform.WINDOWS, reason="locks in another way")
@pytest.mark.parametrize("number", [errno.EBADF, errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_a_lock_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_: fail(number))
    with pytest.raises(BloomdeskError, match="cannot be locked") as caught, sole_writer(tmp_path):
        pass
    assert os.strerror(number) in caught.value.message


def test_a_disk_that_does_not_say_what_is_free_is_begun_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "source")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0))
    assert free_bytes(tmp_path) == UNKNOWN_SPACE
    done = run("convert", source, tmp_path / "out")
    assert done.returncode == 0 and "does not say how much is free" in done.stderr
    assert run("export", tmp_path / "out", tmp_path / "back").returncode == 0


@pytest.mark.skipif(platform.WINDOWS, reason="has no such files")
@pytest.mark.parametrize("kind", ["device", "pipe", "directory"])
def test_results_go_to_a_regular_file_alone(tmp_path: Path, kind: str) -> None:
    path = {"device": Path("/dev/full")}.get(kind, tmp_path / "out.jsonl")
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "directory":
        path.mkdir()
    with pytest.raises(BloomdeskError, match=r"is not a regular file|Is a directory"):
        Results(path, ())


@pytest.mark.skipif(platform.WINDOWS, reason="has no inodes")
@pytest.mark.parametrize(
    ("number", "files", "left", "said"),
    [
        (errno.ENOSPC, 100, 0, "no inodes are free"),
        (errno.ENOSPC, 100, 5, "the disk is full"),
        (errno.ENOSPC, 0, 0, "the disk is full"),
        (errno.EDQUOT, 100, 0, "quota"),
    ],
)
def test_what_a_full_disk_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, files: int, left: int, said: str
) -> None:
    found = type("", (), {"f_files": files, "f_favail": left})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(9, 7))
    monkeypatch.setattr(os, "statvfs", lambda _: found)
    why, step = explained(OSError(number, os.strerror(number)), tmp_path / "nowhere/file")
    assert said in why and "7 bytes are free" in why and "run the same command again" in step


def usage(total: int, free: int) -> SimpleNamespace:
    return SimpleNamespace(total=total, free=free)


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


def _is_directory(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").is_dir()


@pytest.mark.parametrize(
    ("kind", "limit", "why", "step"),
    [
        ("vfat", None, "4,294,967,295 bytes (FAT)", "exFAT, NTFS, ext4 or APFS"),
        ("ext4", 10_000, "10,000 bytes (ulimit -f)", "raise the limit: ulimit -f unlimited"),
        ("ext4", None, "", ""),
    ],
)
def test_the_largest_file_is_known_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, limit: int | None, why: str, step: str
) -> None:
    mounts = [
        SimpleNamespace(mountpoint="/", fstype="btrfs"),
        SimpleNamespace(mountpoint=str(tmp_path), fstype=kind),
    ]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    most = resource.RLIM_INFINITY if limit is None else limit
    monkeypatch.setattr(resource, "getrlimit", lambda _: (most, most))
    sizes = {"config.json": 10, "block_69.safetensors": 5 * 10**9}
    if not why:
        require_large_files(tmp_path / "new", sizes)
        return
    with pytest.raises(BloomdeskError) as raised:
        require_large_files(tmp_path / "new", sizes)
    said = f"takes no file of more than {why}, and block_69.safetensors has 5,000,000,000"
    assert said in raised.value.message and step in raised.value.hint
    require_large_files(tmp_path / "new", {"config.json": 10})
