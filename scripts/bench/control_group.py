"""A control group: a command with a limited amount of RAM, process and page cache together, and a limited disk.

    with control_group(ram=3 * 10**9, read_rate=1.073e9, disk_of=Path("bloom")) as group:
        subprocess.run(group.command(["bloomdesk", "generate", "bloom", "Hello"]))
        print(group.peak())

Linux has three ways, tried in this order. v1: /sys/fs/cgroup/memory and /sys/fs/cgroup/blkio, one group in each.
v2: one group with the controllers memory and io. systemd-run --scope: systemd makes the v2 group. The first two need
root, or a group that was handed to the user. A group belongs under the caller's own one, so that limits already in
force stay in force; v2 allows no group with processes and limited children at once, so there it may stand higher.

A page counts for the group that brought it into the page cache: what is measured must begin cold, or the pages of
another process serve it for nothing.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
OWN_GROUPS = Path("/proc/self/cgroup")
SECONDS_TO_REMOVE = 10.0
# The shell puts itself into every group before it becomes the command, so no page is charged to another group.
ENTER = 'while [ "$1" != -- ]; do echo $$ > "$1" || exit 125; shift; done; shift; exec "$@"'
# A scope's group goes away with its last process, so the peak is written down from the inside.
NOTE_PEAK = (
    'note=$1; shift; "$@"; status=$?; '
    'cat "/sys/fs/cgroup$(sed -n "s/^0:://p" /proc/self/cgroup)/memory.peak" > "$note" 2> /dev/null; exit $status'
)
_numbers = itertools.count()


class NoControlGroups(Exception):
    """This machine gives no control group with the limits asked for; the message says why."""


@dataclass(frozen=True)
class Mount:
    """A line of mountinfo: the part `root` of a file system shows at `point`."""

    root: str
    point: Path
    kind: str
    source: str
    options: frozenset[str]


@dataclass
class ControlGroup:
    """A group that exists. `kind` is v1, v2 or systemd-run; "none" if no limit was asked for."""

    kind: str = "none"
    directories: list[Path] = field(default_factory=list)
    prefix: list[str] = field(default_factory=list)
    peak_file: Path | None = None

    def command(self, command: Sequence[str | Path]) -> list[str]:
        """The arguments that run `command`, and all that it starts, inside the group."""
        entered = [str(directory / "cgroup.procs") for directory in self.directories]
        enter = ["sh", "-c", ENTER, "sh", *entered, "--"] if entered else []
        return [*self.prefix, *enter, *map(str, command)]

    def peak(self) -> int | None:
        """The most bytes the group had so far, page cache included; None if the system does not say."""
        with suppress(OSError, ValueError):
            return int(self.peak_file.read_text()) if self.peak_file else None
        return None


@dataclass(frozen=True)
class Wanted:
    """The limits of a group, and where this process finds the file systems of groups and its own ones.

    `rates` are bytes a second by the "major:minor" of a disk.
    """

    ram: int | None
    rates: dict[str, int]
    mounts: list[Mount]
    own_groups: Path


@contextmanager
def control_group(
    *,
    ram: int | None = None,
    read_rate: float | None = None,
    disk_of: Path | None = None,
    also: Sequence[tuple[Path, float]] = (),
    mounts_file: Path = MOUNTS,
    groups_file: Path = OWN_GROUPS,
    disk: str | None = None,
) -> Iterator[ControlGroup]:
    """A group limited to `ram` bytes and `read_rate` bytes a second from the disk that `disk_of` lies on.

    `also` are paths on further disks, and their rates.

    At the end, also after an exception or Ctrl-C, processes still in the group are killed and the group removed.
    `disk` is the "major:minor" of that disk, if it is not to be looked up. Raises `NoControlGroups` if no way works,
    and ValueError for a rate without `disk_of`.
    """
    if read_rate is not None and disk_of is None:
        raise ValueError("a read rate needs a path on the disk that it is for")
    if ram is None and read_rate is None:
        yield ControlGroup()
        return
    rates = {block_device(path): int(rate) for path, rate in also}
    if read_rate is not None:
        rates[disk or block_device(disk_of)] = int(read_rate)
    wanted = Wanted(ram, rates, mounts(mounts_file), groups_file)
    refusals = []
    for make in (_make_v1, _make_v2, _make_scope):
        with ExitStack() as undo:
            try:
                group = make(undo, wanted)
            except (NoControlGroups, OSError, subprocess.TimeoutExpired) as error:
                refusals.append(str(error))
                continue
            yield group
            return
    raise NoControlGroups("no control group with these limits on this machine: " + "; ".join(refusals))


def block_device(path: Path) -> str:
    """The "major:minor" of the whole disk that `path` lies on: limits are for disks, not for their partitions.

    Raises `NoControlGroups` if the file system is on no block device.
    """
    number = path.stat().st_dev
    if os.major(number) == 0:  # btrfs and the like have made-up numbers; the mount names the device
        mount = mount_of(path)
        with suppress(OSError):
            number = Path(mount.source).stat().st_rdev
        if os.major(number) == 0:
            raise NoControlGroups(f"{path} is on no block device, but on {mount.kind} from {mount.source}")
    return whole_disk(f"{os.major(number)}:{os.minor(number)}")


def whole_disk(device: str, devices: Path = Path("/sys/dev/block")) -> str:
    """The disk of a partition, both as "major:minor"; a disk is its own."""
    entry = (devices / device).resolve()
    return (entry.parent / "dev").read_text().strip() if (entry / "partition").exists() else device


def mount_of(path: Path) -> Mount:
    """The mount that `path` is seen through."""
    resolved = path.resolve()
    through = [mount for mount in mounts() if resolved.is_relative_to(mount.point)]
    return max(through, key=lambda mount: len(mount.point.parts))


def mounts(file: Path = MOUNTS) -> list[Mount]:
    """All mounts; of two at the same place the later one, which hides the other, is left."""
    found = {}
    for line in file.read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, point = (_unescaped(word) for word in before.split()[3:5])
        kind, source, options = after.split(maxsplit=2)
        found[point] = Mount(root, Path(point), kind, _unescaped(source), frozenset(options.split(",")))
    return list(found.values())


def own_group(controller: str, mount: Mount, file: Path = OWN_GROUPS) -> Path:
    """The directory of this process's own group of a v1 controller, or of v2 if `controller` is empty."""
    for line in file.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") and (controller or not controllers):
            # In a container the mount's root is a group, and paths may or may not begin with it.
            inside = path.removeprefix(mount.root) if mount.root != "/" else path
            own = mount.point / inside.strip("/")
            return own if own.is_dir() else mount.point
    return mount.point


def _make_v1(undo: ExitStack, wanted: Wanted) -> ControlGroup:
    group = ControlGroup("v1")

    def made(controller: str) -> Path:
        for mount in wanted.mounts:
            if mount.kind == "cgroup" and controller in mount.options:
                group.directories.append(_made(undo, own_group(controller, mount, wanted.own_groups)))
                return group.directories[-1]
        raise NoControlGroups(f"v1: the controller {controller} is not mounted")

    if wanted.ram is not None:
        directory = made("memory")
        (directory / "memory.limit_in_bytes").write_text(str(wanted.ram))
        if (swap := directory / "memory.memsw.limit_in_bytes").exists():
            swap.write_text(str(wanted.ram))
        group.peak_file = directory / "memory.max_usage_in_bytes"
    brake = made("blkio") / "blkio.throttle.read_bps_device" if wanted.rates else None
    for disk, rate in wanted.rates.items():
        brake.write_text(f"{disk} {rate}")
    return group


def _make_v2(undo: ExitStack, wanted: Wanted) -> ControlGroup:
    mount = next((mount for mount in wanted.mounts if mount.kind == "cgroup2"), None)
    if mount is None:
        raise NoControlGroups("v2: not mounted")
    controllers = {"memory"} if wanted.ram is not None else set()
    controllers |= {"io"} if wanted.rates else set()
    own = own_group("", mount, wanted.own_groups)
    directory = _made(undo, _v2_parent(undo, mount, own, controllers))
    group = ControlGroup("v2", [directory])
    if wanted.ram is not None:
        (directory / "memory.max").write_text(str(wanted.ram))
        if (swap := directory / "memory.swap.max").exists():
            swap.write_text("0")
        if (peak := directory / "memory.peak").exists():
            group.peak_file = peak
    for disk, rate in wanted.rates.items():
        (directory / "io.max").write_text(f"{disk} rbps={rate}")
    return group


def _v2_parent(undo: ExitStack, mount: Mount, own: Path, wanted: set[str]) -> Path:
    """The nearest group, from this process's own upwards, whose children may have the controllers."""
    why = f"v2: no group has the controllers {' and '.join(sorted(wanted))}"
    for directory in (own, *own.parents):
        if not directory.is_relative_to(mount.point):
            break
        if not wanted <= set((directory / "cgroup.controllers").read_text().split()):
            continue
        control = directory / "cgroup.subtree_control"
        missing = wanted - set(control.read_text().split())
        try:
            for name in missing:
                control.write_text(f"+{name}")
                undo.callback(_try_to_write, control, f"-{name}")
            return directory
        except OSError as error:  # it has processes of its own, or is not ours
            why = f"v2: {error}"
    raise NoControlGroups(why)


def _try_to_write(file: Path, text: str) -> None:
    with suppress(OSError):
        file.write_text(text)


def _make_scope(undo: ExitStack, wanted: Wanted) -> ControlGroup:
    program = shutil.which("systemd-run")
    if program is None:
        raise NoControlGroups("systemd-run: not installed")
    scope = [program, "--scope", "--quiet", "--collect", *([] if os.geteuid() == 0 else ["--user"])]
    if wanted.ram is not None:
        scope += ["-p", f"MemoryMax={wanted.ram}", "-p", "MemorySwapMax=0"]
    for disk, rate in wanted.rates.items():
        scope += ["-p", f"IOReadBandwidthMax=/dev/block/{disk} {rate}"]
    trial = subprocess.run([*scope, "true"], capture_output=True, text=True, timeout=60)
    if trial.returncode:
        raise NoControlGroups(f"systemd-run: {trial.stderr.strip().splitlines()[-1:] or trial.returncode}")
    note = Path(undo.enter_context(tempfile.TemporaryDirectory()), "peak")
    return ControlGroup(
        "systemd-run", prefix=[*scope, "sh", "-c", NOTE_PEAK, "sh", str(note)], peak_file=note
    )


def _made(undo: ExitStack, parent: Path) -> Path:
    """A new group below `parent`, removed at the end; groups of ours that a killed process left go first."""
    if not os.access(parent, os.W_OK):
        raise NoControlGroups(f"no right to make a group in {parent}")
    for left in parent.glob("bloomdesk-*-*"):
        owner = re.fullmatch(r"bloomdesk-(\d+)-\d+", left.name)
        if owner and not Path("/proc", owner[1]).exists():
            _remove(left)
    directory = parent / f"bloomdesk-{os.getpid()}-{next(_numbers)}"
    undo.callback(_remove, directory)  # before it is made: an interrupt can't come in between
    directory.mkdir()
    return directory


def _remove(directory: Path) -> None:
    """Kill what is left in a group of ours and remove it; a group is busy until its last process is gone."""
    end = time.monotonic() + SECONDS_TO_REMOVE
    while directory.exists():
        with suppress(OSError):
            for pid in (directory / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        # v1: gives the page cache back, which would otherwise count for the parent.
        with suppress(OSError), (directory / "memory.force_empty").open("r+") as file:
            file.write("0")
        try:
            directory.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def _unescaped(word: str) -> str:
    """A word of mountinfo, where blanks and backslashes are octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)
