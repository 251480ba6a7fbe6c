"""Fill up a small disk in the middle of download, conversion and preparation, make room, and go on.

    sudo python -m scripts.torture.full_disk [--levels 5] [--command convert]

For each command and each level it mounts a tmpfs of its own that is too small, runs the command until the disk
is full, and wants exit status 1 and one clear sentence; then it makes room, by a larger mount or by deleting a
ballast file in turns, runs the same command again, and wants the bytes of an undisturbed run. Needs root on
Linux and the right to mount; says so and ends with 2 where that is missing. Unmounts whatever happens.

The commands measure the disk before they begin and would refuse at once. Here another program takes the room
after that: in the disturbed run the measurement, and nothing else, is told of an endless disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.fakehub.checkpoint import synthetic
from scripts.fakehub.server import LocalHub

ROOT = Path(__file__).resolve().parents[2]
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
RECORD = "bloomdesk-download.json"
REPO = "someone/bloom-small"
SHAPE = {"hidden_size": 256, "heads": 8, "blocks": 8, "vocab_size": 2000}
ENDLESS = """
import shutil
measure = shutil.disk_usage
shutil.disk_usage = lambda path: measure(path)._replace(free=2**50)
"""
COMMAND = "from toolkit.cli.app import main; main()"


class NotAllowed(Exception):
    """This machine does not let us mount a disk of our own."""


class Failure(Exception):
    """A command did not do what it should on a full disk."""


@dataclass
class Disk:
    """A tmpfs at `path`; sizes are bytes, rounded up to pages by the system."""

    path: Path

    def resize(self, size: int) -> None:
        _mount("-o", f"remount,size={size}", str(self.path))

    def fill(self, leave: int) -> Path:
        """Take all room but `leave` bytes with a ballast file, whose path it returns."""
        ballast = self.path / "ballast"
        usage = os.statvfs(self.path)
        size = max(0, usage.f_bavail * usage.f_frsize - leave)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, size))
        return ballast


def _mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    except OSError as error:
        raise NotAllowed(f"mount cannot be run: {error.strerror}") from None
    if done.returncode:
        raise NotAllowed(done.stderr.strip() or f"mount ended with {done.returncode}")


@contextmanager
def disk(size: int) -> Iterator[Disk]:
    """A disk of its own, gone when the block ends. Raises `NotAllowed`."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise NotAllowed("it takes root on Linux to mount a disk")
    with tempfile.TemporaryDirectory(prefix="bloomdesk-disk-") as place:
        _mount("-t", "tmpfs", "-o", f"size={size},mode=700", "bloomdesk-test", place)
        try:
            yield Disk(Path(place))
        finally:
            if subprocess.run(["umount", place], capture_output=True).returncode:
                subprocess.run(["umount", "--lazy", place], check=True)


def run(arguments: Sequence[str], endpoint: str, *, endless: bool) -> subprocess.CompletedProcess[str]:
    """A `bloomdesk` command as a user runs it."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        environment.pop(name, None)
    code = (ENDLESS if endless else "") + COMMAND
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def available(command: str) -> bool:
    command = "convert" if command == "lossless" else command
    return run([command, "--help"], "http://127.0.0.1:1", endless=False).returncode == 0


def content(directory: Path) -> dict[str, str]:
    """sha256 of each file, by name; of a download's record without the times of its files."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == RECORD:
                data = re.sub(rb'"(mtime_ns|sha256)": .*', b"", data)
            found[str(path.relative_to(directory))] = hashlib.sha256(data).hexdigest()
    return found


def pages(directory: Path) -> int:
    """Bytes that the files take on a tmpfs."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in directory.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Case:
    """A command that ends in a directory: its arguments for one, and what an undisturbed run puts there."""

    command: str
    arguments: Callable[[Path], list[str]]
    expected: Mapping[str, str]
    size: int
    manifest: int

    def levels(self, count: int) -> dict[str, int]:
        """Sizes of disks that are too small: shares of the result, and all of it but for its manifest or record."""
        shares = [(number + 0.5) / count for number in range(count)]
        found = {f"{share:.0%}": int(share * self.size) for share in shares}
        # What is written last: the manifest or record, whose rewrite needs room beside what it replaces.
        found["all but the manifest"] = self.size - -(-self.manifest // PAGE) * PAGE
        found["all but a page"] = self.size - PAGE
        return found


def cases(directory: Path, endpoint: str, commands: Sequence[str]) -> list[Case]:
    """Every command's case, with an undisturbed run of each for comparison."""
    repo = directory / "repo"
    arguments: dict[str, Callable[[Path], list[str]]] = {
        "download": lambda target: ["download", REPO, str(target)],
        "convert": lambda target: ["convert", str(repo), str(target)],
        "prepare": lambda target: ["prepare", REPO, str(target)],
        "lossless": lambda target: ["convert", str(repo), str(target), "--lossless"],
    }
    made = []
    for command in commands:
        target = directory / f"{command}-undisturbed"
        done = run(arguments[command](target), endpoint, endless=False)
        if done.returncode:
            raise Failure(f"{command} fails undisturbed: {done.stderr}")
        manifest = target / (RECORD if command == "download" else "manifest.json")
        size = manifest.stat().st_size
        made.append(Case(command, arguments[command], content(target), pages(target), size))
    return made


def trial(case: Case, size: int, endpoint: str, *, ballast: bool) -> str:
    """Run on a disk of `size` bytes, make room, run again: the first run's sentence. Raises `Failure`."""
    room = 4 * case.size + 2**26
    with disk(room if ballast else size) as small:
        taken = small.fill(size) if ballast else None
        target = small.path / "target"
        first = run(case.arguments(target), endpoint, endless=True)
        sentence = _one_sentence(first)
        if taken is not None:
            taken.unlink()
        else:
            small.resize(room)
        again = run(case.arguments(target), endpoint, endless=False)
        if again.returncode:
            raise Failure(f"the rerun ended with {again.returncode}: {again.stderr}")
        found = content(target)
        if found != case.expected:
            names = sorted(
                name for name in {*found, *case.expected} if found.get(name) != case.expected.get(name)
            )
            raise Failure(f"the rerun's result differs in {', '.join(names)}")
        return sentence


def _one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The error that a command ended with; raises `Failure` where it is not one clear sentence."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if done.returncode != 1 or len(errors) != 1 or "Traceback" in done.stderr:
        raise Failure(f"exit status {done.returncode}, expected 1 and one error: {done.stderr[-2000:]}")
    if "disk is full" not in errors[0] or "\n  next: " not in done.stderr:
        raise Failure(f"it does not say that the disk is full, and what to do: {done.stderr[-2000:]}")
    return errors[0].removeprefix("error: ")


def refused(case: Case, endpoint: str) -> str:
    """The sentence with which the command refuses a disk that is too small from the start. Raises `Failure`."""
    with disk(case.size // 2) as small:
        done = run(case.arguments(small.path / "target"), endpoint, endless=False)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        if done.returncode != 1 or len(errors) != 1 or list(small.path.iterdir()):
            raise Failure(f"exit status {done.returncode}, something was written: {done.stderr[-2000:]}")
        return errors[0].removeprefix("error: ")


@contextmanager
def hub(directory: Path, shape: Mapping[str, int]) -> Iterator[str]:
    """A Hub on loopback with a small checkpoint, which is also in DIRECTORY/repo: its address."""
    synthetic(directory / "repo", **shape)
    with LocalHub({REPO: directory / "repo"}) as local:
        yield local.endpoint


def main() -> int:
    parser = argparse.ArgumentParser(description="Fill up a disk under bloomdesk, make room, and go on.")
    parser.add_argument(
        "--levels", type=int, default=5, metavar="N", help="sizes for each command (default: 5)"
    )
    choices = ("download", "convert", "prepare", "lossless")
    parser.add_argument("--command", choices=choices, action="append", help="default: all that are there")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each run instead")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is mounted is unmounted
    commands = [name for name in options.command or choices if available(name)]
    failures = runs = 0
    try:
        with (
            tempfile.TemporaryDirectory(prefix="bloomdesk-full-") as scratch,
            hub(Path(scratch), SHAPE) as endpoint,
        ):
            with disk(PAGE * 16):
                pass  # nothing is done where disks can't be mounted
            for case in cases(Path(scratch), endpoint, commands):
                print(f"{case.command}, before the start: {refused(case, endpoint)}", flush=True)
                for number, (level, size) in enumerate(case.levels(options.levels).items()):
                    how = "ballast deleted" if number % 2 else "larger mount"
                    runs += 1
                    try:
                        outcome = trial(case, size, endpoint, ballast=bool(number % 2))
                    except Failure as failure:
                        failures += 1
                        outcome = f"FAILED: {failure}"
                    line = {
                        "command": case.command,
                        "level": level,
                        "bytes": size,
                        "room": how,
                        "error": outcome,
                    }
                    told = f"{case.command}, disk of {size:,} bytes ({level}), {how}: {outcome}"
                    print(json.dumps(line) if options.json else told, flush=True)
    except NotAllowed as error:
        print(f"this machine does not allow it: {error}", file=sys.stderr)
        return 2
    print(
        f"{runs} full disks, {runs - failures} with one clear sentence and a rerun byte-identical to an undisturbed run"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
