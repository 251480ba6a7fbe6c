"""Fail each system call of each command in turn, once or from then on; nothing may be lost, and a rerun ends right.

    python -m scripts.torture.io_errors [--every 1]

As SQLite does it: an undisturbed run counts the calls of each kind on files of the trial; then the command is run again
and again, and its nth open, read, write, fsync, rename, unlink, mkdir, stat, statvfs, flock or truncate fails with EIO,
ENOSPC, EACCES or EMFILE. After each, the rules of `combinations` must hold, and the same command, undisturbed, must end
with what an undisturbed first run gives, byte for byte.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import fcntl
import io
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from scripts.fakehub.server import LocalHub
from scripts.torture.attempt import placeless
from scripts.torture.trial import Command, Trial
from scripts.torture.world import Content, World, make_world, scratch
from toolkit.hub.record import RECORD
from toolkit.io import reader

ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EMFILE)
SPREAD = ("spread", "DST", "--also", "ALSO", "--shares", "2,1")
CASES = {
    "convert": ("absent", Command(("convert", "SRC", "DST"), "a")),
    "convert lossless": ("absent", Command(("convert", "SRC", "DST", "--form", "lossless"), "a")),
    "convert, half made": ("half", Command(("convert", "SRC", "DST"), "a")),
    "convert --delete-source": ("absent", Command(("convert", "SRC", "DST", "--delete-source"), "a")),
    "convert --also": (
        "absent",
        Command(("convert", "SRC", "DST", "--also", "ALSO", "--shares", "2,1"), "a"),
    ),
    "convert --slice": ("absent", Command(("convert", "SRC", "DST", "--slice", "1/2"), "a")),
    "convert, prepared": ("absent", Command(("convert", "PREPARED", "DST", "--form", "lossless"))),
    "spread": ("complete", Command(SPREAD)),
    "spread, half done": ("half spread", Command(SPREAD)),
    "prepare": ("absent", Command(("prepare", "me/a", "DST"), repo="me/a")),
    "download": ("absent", Command(("download", "me/a", "DST"), repo="me/a")),
    "download --check": ("downloaded, decayed", Command(("download", "me/a", "DST", "--check"), repo="me/a")),
    "repair, part flipped": ("part flipped", Command(("repair", "DST", "--source", "SRC"), "a")),
    "repair, part missing": ("part missing", Command(("repair", "DST", "--source", "SRC"), "a")),
    "repair, manifest damaged": ("manifest damaged", Command(("repair", "DST", "--source", "SRC"), "a")),
    "export": ("absent", Command(("export", "PREPARED", "DST"))),
    "export, rotten": ("rotten export", Command(("export", "PREPARED", "DST"))),
    "verify": ("complete", Command(("verify", "DST"))),
}


@dataclass
class Faults:
    """Counts calls on files under `root` by their kind, and fails one of them, or all from that one on."""

    root: Path
    kind: str = ""
    number: int = 0
    error: int = errno.EIO
    lasting: bool = False
    calls: Counter[str] = field(default_factory=Counter)

    def tick(self, kind: str, file: object) -> None:
        """Count a call, and raise its OSError."""
        if isinstance(file, int):
            try:
                file = str(Path(f"/proc/self/fd/{file}").readlink())
            except OSError:
                return
        if not isinstance(file, str | os.PathLike) or not str(file).startswith(str(self.root)):
            return
        self.calls[kind] += 1
        now = self.calls[kind]
        if kind == self.kind and (now == self.number or (self.lasting and now > self.number)):
            raise OSError(self.error, os.strerror(self.error), str(file))

    @contextmanager
    def active(self) -> Iterator[None]:
        """System calls fail within this block."""
        functions = {
            "open": (os, "open"),
            "read": (os, "preadv"),
            "write": (os, "write"),
            "fsync": (os, "fsync"),
            "fdatasync": (os, "fdatasync"),
            "rename": (os, "replace"),
            "unlink": (os, "unlink"),
            "rmdir": (os, "rmdir"),
            "mkdir": (os, "mkdir"),
            "stat": (os, "stat"),
            "statvfs": (os, "statvfs"),
            "truncate": (os, "ftruncate"),
            "flock": (fcntl, "flock"),
            "listdir": (os, "scandir"),
        }
        with ExitStack() as patches:
            for kind, (module, name) in functions.items():
                patches.enter_context(patch.object(module, name, self._failing(kind, getattr(module, name))))
            opened = self._opener()
            patches.enter_context(patch.object(io, "open", opened))
            patches.enter_context(patch.object(builtins, "open", opened))
            yield

    def _failing(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any = ".", *rest: Any, **named: Any) -> Any:
            self.tick(kind, file)
            return real(file, *rest, **named)

        return call

    def _opener(self) -> Callable[..., Any]:
        real, faults = io.open, self

        class File(io.FileIO):
            def readinto(self, buffer: Any) -> int:
                faults.tick("read", self.fileno())
                return super().readinto(buffer)

            def readall(self) -> bytes:
                faults.tick("read", self.fileno())
                return super().readall()

            def read(self, size: int = -1) -> bytes:
                faults.tick("read", self.fileno())
                return super().read(size)

            def write(self, data: Any) -> int:
                faults.tick("write", self.fileno())
                return super().write(data)

        def opened(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
            is_ours = isinstance(file, int) or str(file).startswith(str(faults.root))
            if not is_ours or "b" not in mode or rest or set(named) - {"closefd"}:
                return real(file, mode, buffering, *rest, **named)
            if not isinstance(file, int):
                faults.tick("open", file)
            raw = File(file, mode.replace("b", ""), named.get("closefd", True))
            if buffering == 0:
                return raw
            if "+" in mode:
                return io.BufferedRandom(raw)
            return io.BufferedReader(raw) if mode.startswith("r") else io.BufferedWriter(raw)

        return opened


class Case:
    """A command on a state, whose system calls fail."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.state, self.command = CASES[name]
        with tempfile.TemporaryDirectory(dir=scratch()) as directory:
            trial = Trial(world, self.state, Path(directory))
            faults = Faults(Path(directory))
            trial.run(self.command, faults.active)
            self.result = _comparable(trial)
        self.calls = {kind: count for kind, count in faults.calls.items() if count}

    def injections(self) -> Iterator[tuple[str, int, int, bool]]:
        """Every call of every kind, with every error, passing and lasting."""
        for kind, count in self.calls.items():
            yield from itertools.product((kind,), range(1, count + 1), ERRORS, (False, True))

    def check(self, kind: str, number: int, error: int, lasting: bool) -> None:
        """One run with a fault, and one without; AssertionError if a rule is broken."""
        with tempfile.TemporaryDirectory(dir=scratch()) as directory:
            trial = Trial(self.world, self.state, Path(directory))
            faults = Faults(Path(directory), kind, number, error, lasting)
            how = (
                f"{self.name}, {kind} {number}, {errno.errorcode[error]}, {'lasting' if lasting else 'once'}"
            )
            try:
                trial.run(self.command, faults.active)
                # What is done is then a state of its own.
                trial.run(self.command, keep_source=True)
            except AssertionError as failure:
                raise AssertionError(f"{how}: {failure}") from None
            found = _comparable(trial)
            names = found.keys() | self.result.keys()
            differ = sorted(name for name in names if found.get(name) != self.result.get(name))
            assert not differ, f"{how}: after a rerun {differ[:5]} differ"


def _comparable(trial: Trial) -> Content:
    """What a command has left; a download's record has the dates of its files, and a cut shard may lie there."""
    found = placeless(trial.destination)
    if trial.other_disk.is_dir():
        found |= {f"other disk/{name}": data for name, data in placeless(trial.other_disk).items()}
    return {name: data for name, data in found.items() if name != RECORD and not name.endswith(".incomplete")}


def prepare_world(world_of: Callable[[], World]) -> World:
    """The world, with errors of reading tried again at once."""
    reader.PAUSES = (0.0,) * len(reader.PAUSES)
    return world_of()


def main() -> None:
    """Run all of them; exit status 1 if a rule was broken."""
    parser = argparse.ArgumentParser(description="Fail each system call of each command in turn.")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try every Nth of them")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name begins so")
    given = parser.parse_args()
    failures = total = 0
    with ExitStack() as opened:
        base = Path(opened.enter_context(tempfile.TemporaryDirectory(dir=scratch())))
        world = prepare_world(lambda: make_world(base, lambda repos: opened.enter_context(LocalHub(repos))))
        for name in (name for name in CASES if name.startswith(given.only)):
            case = Case(world, name)
            chosen = list(case.injections())[:: given.every]
            for injection in chosen:
                try:
                    case.check(*injection)
                except AssertionError as error:
                    failures += 1
                    print(f"FAILED {error}\n", flush=True)
            total += len(chosen)
            print(
                f"{name}: {len(chosen)} injected, calls {case.calls}; {failures} failures so far", flush=True
            )
    print(f"{total} injected, {failures} failures")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
