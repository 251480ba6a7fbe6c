"""Fill up a small disk in the middle of download, conversion and preparation, make room, and continue.

    sudo python -m scripts.torture.full_disk [--levels 5] [--command convert]

For each command and each level it mounts a tmpfs that is too small, runs the command until the disk is full, and
expects exit status 1 and one clear sentence. Then it makes room (by a larger mount, every second time by deleting a
ballast file), runs the same command again, and expects the bytes of an undisturbed run. Needs root on Linux and
permission to mount, ends with 2 without them, and always unmounts.

The commands measure the disk before they begin and would refuse at once. This test simulates another program that
fills the disk later: in the disturbed run, the measurement alone reports an endless disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from runner.format.coded import LOSSLESS
from runner.format.layout import COMPANIONS, EMBEDDING, MANIFEST
from runner.format.manifest import load_manifest
from runner.format.quantised import FORMS
from scripts.fakehub.checkpoint import synthetic
from scripts.fakehub.server import LocalHub
from scripts.torture.attempt import assert_no_row_lost, content, environment, placeless
from toolkit.hub.record import RECORD

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
REPO = "someone/bloom-small"
SHAPE = {"hidden_size": 256, "heads": 8, "blocks": 8, "vocab_size": 2000}
ENDLESS = """
import shutil
measure = shutil.disk_usage
shutil.disk_usage = lambda path: measure(path)._replace(free=2**50)
"""
OTHER_FULL, FIRST_FULL, OF_PREPARED = "spread, other disk", "spread, first disk", "prepared"
COMMANDS = ("download", "convert", "prepare", *FORMS[1:], OTHER_FULL, FIRST_FULL, OF_PREPARED)
COMMAND = "from toolkit.cli.app import main; main()"


class NotAllowed(Exception):
    """This machine does not let us mount a disk."""


class Failure(Exception):
    """A command did not do what it should on a full disk."""


def fill(path: Path, leave: int) -> Path:
    """The path of a new ballast file that takes all space of the disk at `path` but `leave` bytes."""
    ballast = path / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(path).free - leave))
    return ballast


def _mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    except OSError as error:
        raise NotAllowed(f"mount cannot be run: {error.strerror}") from None
    if done.returncode:
        raise NotAllowed(done.stderr.strip() or f"mount ended with {done.returncode}")


@contextmanager
def disk(size: int) -> Iterator[Path]:
    """A new tmpfs of `size` bytes, rounded up to pages, until the block ends. Raises `NotAllowed`."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise NotAllowed("it takes root on Linux to mount a disk")
    with tempfile.TemporaryDirectory(prefix="bloomdesk-disk-") as place:
        _mount("-t", "tmpfs", "-o", f"size={size},mode=700", "bloomdesk-test", place)
        try:
            yield Path(place)
        finally:
            if subprocess.run(["umount", place], capture_output=True).returncode:
                subprocess.run(["umount", "--lazy", place], check=True)


def run(arguments: Sequence[str], endpoint: str, *, endless: bool) -> subprocess.CompletedProcess[str]:
    """The outcome of a `bloomdesk` command, run as a user would."""
    command = [sys.executable, "-c", (ENDLESS if endless else "") + COMMAND, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(endpoint), timeout=600)


@dataclass(frozen=True)
class Case:
    """A command that writes a directory, and the result of an undisturbed run; sizes are bytes on a tmpfs.

    `base` of them are taken before it begins. In `work` lies what it starts from, and the other disk of a `spread`.
    """

    name: str
    command: Sequence[str]
    work: Path
    expected: Mapping[str, bytes] = field(default_factory=dict)
    size: int = 0
    manifest: int = 0
    base: int = 0

    def levels(self, count: int) -> dict[str, int]:
        """Sizes of disks that are too small: shares of the result, and all of it without its manifest or record."""
        shares = {
            f"{(n + 0.5) / count:.0%}": self.base + int((n + 0.5) / count * self.size) for n in range(count)
        }
        if self.base:
            return shares
        # The manifest or record is written last, and its rewrite needs space beside the file that it replaces.
        last = {"all but the manifest": self.size - self.manifest, "all but a page": self.size - PAGE}
        return shares | last

    @property
    def enough(self) -> int:
        return self.base + 4 * self.size + 2**26

    def disks(self, target: Path) -> list[Path]:
        """The directories that a `spread` writes, the first one first, or only the target."""
        other = self.work / "elsewhere"
        return {FIRST_FULL: [target, other], OTHER_FULL: [other, target]}.get(self.name, [target])

    def begin(self, target: Path) -> list[str]:
        """The command that writes to the disk of `target`, where what it starts from lies then."""
        here, *others = self.disks(target)
        if not others:
            return [*self.command, str(target)]
        for each in (here, *others):
            shutil.rmtree(each, ignore_errors=True)
        shutil.copytree(self.work / "whole", here)
        return [*self.command, str(here), "--also", str(others[0]), "--shares", "2,1"]

    def check(self, target: Path) -> None:
        """AssertionError if a `spread` that has failed has lost something."""
        here, *others = self.disks(target)
        if others:
            assert_no_row_lost(load_manifest(self.work / "whole"), here, others)

    def found(self, target: Path) -> dict[str, bytes]:
        """What it has left; slices record where they lie, which is elsewhere each time."""
        disks = self.disks(target)
        if len(disks) == 1:
            return content(target)
        made = enumerate(map(placeless, disks))
        return {f"{index}/{name}": data for index, files in made for name, data in files.items()}


def cases(directory: Path, endpoint: str, commands: Sequence[str]) -> list[Case]:
    """Every command's case, each with the result of an undisturbed run."""
    whole = directory / "whole"
    if {FIRST_FULL, OTHER_FULL, OF_PREPARED} & set(commands):
        _run_well(["convert", str(directory / "repo"), str(whole)], endpoint)
    made = []
    for name in commands:
        source = str(directory / "repo") if name in ("convert", *FORMS) else REPO
        command = ["convert", "--form", name, source] if name in FORMS else [name, source]
        if name == OF_PREPARED:
            command = ["convert", "--form", LOSSLESS, str(whole)]
        elif name in (FIRST_FULL, OTHER_FULL):
            command = ["spread"]
        case, target = Case(name, command, directory), directory / f"{name}-undisturbed"
        _run_well(case.begin(target), endpoint)
        pages = _pages(target)
        size, manifest, base = sum(pages.values()), pages[RECORD if name == "download" else MANIFEST], 0
        if name == FIRST_FULL:
            # Once the whole embedding is gone there is more space than its slice has taken.
            base = sum(_pages(whole).values())
            size = sum(size for file, size in pages.items() if file == EMBEDDING or file in COMPANIONS)
        made.append(replace(case, expected=case.found(target), size=size, manifest=manifest, base=base))
    return made


def _run_well(command: Sequence[str], endpoint: str) -> None:
    done = run(command, endpoint, endless=False)
    if done.returncode:
        raise Failure(f"{' '.join(command)} fails undisturbed: {done.stderr}")


def _pages(directory: Path) -> dict[str, int]:
    """Bytes that each file takes of a tmpfs, by name."""
    return {p.name: -(-p.stat().st_size // PAGE) * PAGE for p in directory.rglob("*") if p.is_file()}


def trial(case: Case, size: int, endpoint: str, *, ballast: bool) -> str:
    """The error of a run on a disk of `size` bytes, after a rerun with more space. Raises `Failure`."""
    with disk(case.enough if ballast else size) as small:
        target = small / "target"
        command = case.begin(target)
        taken = fill(small, size - case.base) if ballast else None
        sentence = _one_error(run(command, endpoint, endless=True), "disk is full")
        case.check(target)
        if taken is not None:
            taken.unlink()
        else:
            _mount("-o", f"remount,size={case.enough}", str(small))
        again = run(command, endpoint, endless=False)
        if again.returncode:
            raise Failure(f"the rerun ended with {again.returncode}: {again.stderr}")
        found = case.found(target)
        if found != case.expected:
            names = {name for name, _ in found.items() ^ case.expected.items()}
            raise Failure(f"the rerun's result differs in {', '.join(sorted(names))}")
        return sentence


def refused(case: Case, endpoint: str) -> str:
    """The error with which the command refuses a disk that is too small from the start. Raises `Failure`."""
    with disk(case.base + case.size // 2) as small:
        command = case.begin(small / "target")
        before = content(small)
        done = run(command, endpoint, endless=False)
        if content(small) != before:
            raise Failure(f"something was written: {done.stderr[-2000:]}")
        return _one_error(done, "")


def _one_error(done: subprocess.CompletedProcess[str], reason: str) -> str:
    """The error that a command ended with. Raises `Failure` unless it is one sentence with `reason` and a next step."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if done.returncode != 1 or len(errors) != 1 or "Traceback" in done.stderr:
        raise Failure(f"exit status {done.returncode}, expected 1 and one error: {done.stderr[-2000:]}")
    if reason not in errors[0] or (reason and "\n  next: " not in done.stderr):
        raise Failure(f"the error lacks {reason!r} or the next step: {done.stderr[-2000:]}")
    return errors[0].removeprefix("error: ")


@contextmanager
def hub(directory: Path, shape: Mapping[str, int]) -> Iterator[str]:
    """A Hub on loopback with a small checkpoint, which is also in DIRECTORY/repo: its address."""
    synthetic(directory / "repo", **shape)
    with LocalHub({REPO: directory / "repo"}) as local:
        yield local.endpoint


def main() -> int:
    parser = argparse.ArgumentParser(description="Fill up a disk under bloomdesk, make room, and continue.")
    parser.add_argument(
        "--levels", type=int, default=5, metavar="N", help="sizes for each command (default: 5)"
    )
    parser.add_argument("--command", choices=COMMANDS, action="append", help="default: all")
    options = parser.parse_args()
    # `sys.exit` unwinds the stack, which unmounts the disks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    outcomes = []
    try:
        with (
            disk(PAGE * 16),
            tempfile.TemporaryDirectory(prefix="bloomdesk-full-") as scratch,
            hub(Path(scratch), SHAPE) as endpoint,
        ):
            for case in cases(Path(scratch), endpoint, options.command or COMMANDS):
                print(f"{case.name}, before the start: {refused(case, endpoint)}", flush=True)
                for number, (level, size) in enumerate(case.levels(options.levels).items()):
                    try:
                        outcomes.append(trial(case, size, endpoint, ballast=bool(number % 2)))
                    except Failure as failure:
                        outcomes.append(f"FAILED: {failure}")
                    how = "ballast deleted" if number % 2 else "larger mount"
                    print(f"{case.name}, disk of {size:,} bytes ({level}), {how}: {outcomes[-1]}", flush=True)
    except NotAllowed as error:
        print(f"this machine does not allow it: {error}", file=sys.stderr)
        return 2
    failures = sum(outcome.startswith("FAILED") for outcome in outcomes)
    good = len(outcomes) - failures
    print(
        f"{len(outcomes)} full disks, {good} with one clear error and a rerun byte-identical to an undisturbed run"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
