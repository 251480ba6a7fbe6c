"""A control group's limits hold for what runs inside, and nothing of it is left afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.bench import control_group as module
from scripts.bench.control_group import (
    NoControlGroups,
    block_device,
    control_group,
    mount_of,
    mounts,
    own_group,
    whole_disk,
)

MIB = 2**20


@pytest.fixture(scope="module")
def _groups() -> None:
    """Skips where this machine gives no control group."""
    try:
        with control_group(ram=64 * MIB):
            pass
    except NoControlGroups as error:
        pytest.skip(str(error))


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    """64 MiB on the disk and out of the page cache; skips where the file system is on no disk."""
    path = tmp_path / "big"
    path.write_bytes(os.urandom(64 * MIB))
    try:
        with control_group(read_rate=10**9, disk_of=path):
            pass
    except NoControlGroups as error:
        pytest.skip(str(error))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def test_without_limits_there_is_no_group() -> None:
    with control_group() as group:
        assert group.kind == "none"
        assert group.peak() is None
        assert group.command(["echo", Path("x")]) == ["echo", "x"]


def test_a_rate_needs_a_disk() -> None:
    with pytest.raises(ValueError, match="path"), control_group(read_rate=1e9):
        pass


@pytest.mark.slow
@pytest.mark.usefixtures("_groups")
def test_the_page_cache_counts(tmp_path: Path) -> None:
    """Reading a file larger than the group's RAM fills it up and no further; arguments come through as they are."""
    path = tmp_path / "with a blank"
    path.write_bytes(bytes(96 * MIB))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with control_group(ram=64 * MIB) as group:
        read = subprocess.run(group.command(["cat", path]), stdout=subprocess.PIPE, check=True)
        peak = group.peak()
    assert len(read.stdout) == 96 * MIB
    if peak is None:
        pytest.skip(f"this system's {group.kind} does not tell the peak")
    assert peak <= 64 * MIB


@pytest.mark.slow
@pytest.mark.usefixtures("_groups")
def test_more_memory_than_the_group_has_is_not_given() -> None:
    with control_group(ram=64 * MIB) as group:
        command = group.command([sys.executable, "-c", f"print(len(bytearray({256 * MIB})))"])
        greedy = subprocess.run(command, capture_output=True)
    assert greedy.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert not greedy.stdout


@pytest.mark.slow
def test_the_disk_is_braked(big_file: Path) -> None:
    with control_group(ram=256 * MIB, read_rate=32 * MIB, disk_of=big_file) as group:
        start = time.monotonic()
        subprocess.run(group.command(["cat", big_file]), stdout=subprocess.DEVNULL, check=True)
    assert time.monotonic() - start > 1.5  # 64 MiB; a brake may let the first moment through


@pytest.mark.slow
@pytest.mark.usefixtures("_groups")
def test_nothing_is_left_after_an_exception_not_even_a_process() -> None:
    with pytest.raises(KeyboardInterrupt), control_group(ram=64 * MIB) as group:
        if not group.directories:
            pytest.skip("systemd looks after its own groups")
        sleeper = subprocess.Popen(group.command(["sleep", "600"]))
        while not (group.directories[0] / "cgroup.procs").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert sleeper.wait(timeout=10) == -signal.SIGKILL
    assert not any(directory.exists() for directory in group.directories)


@pytest.mark.slow
@pytest.mark.usefixtures("_groups")
def test_a_group_that_a_killed_process_left_goes_with_the_next() -> None:
    hold = "with module.control_group(ram=2**26) as group: print(*group.directories, flush=True); time.sleep(600)"
    code = f"import time\nfrom scripts.bench import control_group as module\n{hold}"
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)
    with process:
        left = [Path(name) for name in process.stdout.readline().split()]
        process.kill()
    if not left:
        pytest.skip("systemd looks after its own groups")
    assert all(directory.exists() for directory in left)
    with control_group(ram=64 * MIB):
        pass
    assert not any(directory.exists() for directory in left)


@pytest.fixture
def no_mounts(tmp_path: Path) -> Path:
    """A mountinfo in which no control groups are mounted."""
    file = tmp_path / "mountinfo"
    file.write_text("")
    return file


def test_the_reasons_are_named_if_there_is_no_group(monkeypatch: pytest.MonkeyPatch, no_mounts: Path) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoControlGroups) as error, control_group(ram=64 * MIB, mounts_file=no_mounts):
        pass
    for why in ("controller memory is not mounted", "v2: not mounted", "systemd-run: not installed"):
        assert why in str(error.value)


@pytest.mark.slow
def test_a_scope_of_systemd_has_the_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_mounts: Path
) -> None:
    """With a stand-in for systemd-run that notes its arguments and runs the command."""
    stand_in = tmp_path / "systemd-run"
    stand_in.write_text('#!/bin/sh\necho "$@" >> "$0.log"\nwhile [ "${1#-}" != "$1" ]; do\n'
                        '[ "$1" = -p ] && shift\nshift\ndone\nexec "$@"\n')  # fmt: skip
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with control_group(ram=10**9, mounts_file=no_mounts) as group:
        assert group.kind == "systemd-run"
        echo = subprocess.run(group.command(["echo", "a b"]), capture_output=True, text=True, check=True)
        failed = subprocess.run(group.command(["false"]))
    assert echo.stdout == "a b\n"
    assert failed.returncode == 1
    assert "--scope" in (log := Path(f"{stand_in}.log").read_text())
    assert "MemoryMax=1000000000 -p MemorySwapMax=0" in log


def test_version_2_in_a_made_up_tree(tmp_path: Path) -> None:
    """The group stands below the nearest one whose children may have the controllers, which are given back."""
    root = tmp_path / "groups"
    own = root / "user" / "shell"
    own.mkdir(parents=True)
    for directory, given in ((own, ""), (own.parent, "memory"), (root, "memory io")):
        (directory / "cgroup.controllers").write_text("cpu io memory")
        (directory / "cgroup.subtree_control").write_text(given)
    mounts_file, groups_file = tmp_path / "mountinfo", tmp_path / "cgroup"
    mounts_file.write_text(f"30 27 0:29 / {root} rw - cgroup2 cgroup2 rw\n")
    groups_file.write_text("0::/user\n")
    limits = {"ram": 10**9, "read_rate": 1e6, "disk_of": tmp_path, "disk": "8:0"}
    with control_group(**limits, mounts_file=mounts_file, groups_file=groups_file) as group:
        assert group.kind == "v2"
        (made,) = group.directories
        assert made.parent == own.parent
        assert (own.parent / "cgroup.subtree_control").read_text() == "+io"
        files = {file.name: file.read_text() for file in made.iterdir()}
        # The files of a real group go with its directory.
        for file in list(made.iterdir()):
            file.unlink()
    assert files == {"memory.max": "1000000000", "io.max": "8:0 rbps=1000000"}
    assert not made.exists()
    assert (own.parent / "cgroup.subtree_control").read_text() == "-io"


def test_a_partition_is_of_its_disk(tmp_path: Path) -> None:
    devices, disk = tmp_path / "dev" / "block", tmp_path / "devices" / "sda"
    partition = disk / "sda1"
    partition.mkdir(parents=True)
    devices.mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    (partition / "dev").write_text("8:1\n")
    (partition / "partition").write_text("1\n")
    (devices / "8:0").symlink_to(disk)
    (devices / "8:1").symlink_to(partition)
    assert whole_disk("8:1", devices) == "8:0"
    assert whole_disk("8:0", devices) == "8:0"


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="not on Linux")
def test_what_is_on_no_disk_is_told() -> None:
    with pytest.raises(NoControlGroups, match="on no block device"):
        block_device(Path("/proc"))
    assert mount_of(Path("/proc/self")).kind == "proc"


def test_mountinfo(tmp_path: Path) -> None:
    """Optional fields, octal blanks, and a mount that hides another."""
    file = tmp_path / "mountinfo"
    file.write_text(
        "27 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw,discard\n"
        "28 27 8:17 /sub /mnt/a\\040b rw - ext4 /dev/sdb1 rw\n"
        "29 27 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
        "30 27 0:29 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    )
    root, other, groups = mounts(file)
    assert (root.point, root.kind, root.source) == (Path("/"), "ext4", "/dev/vda")
    assert (other.root, other.point) == ("/sub", Path("/mnt/a b"))
    assert groups.kind == "cgroup2"


def test_the_own_group_in_and_outside_a_container(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    file = tmp_path / "cgroup"
    file.write_text("4:memory,hugetlb:/outer/inner\n3:cpu:/\n0::/inner\n")

    def mount(root: str) -> module.Mount:
        return module.Mount(root, tmp_path, "cgroup", "cgroup", frozenset({"memory"}))

    assert own_group("memory", mount("/outer"), file) == tmp_path / "inner"
    assert own_group("memory", mount("/"), file) == tmp_path  # its own directory is not to be seen here
    assert own_group("", mount("/"), file) == tmp_path / "inner"
    assert own_group("cpu", mount("/"), file) == tmp_path
