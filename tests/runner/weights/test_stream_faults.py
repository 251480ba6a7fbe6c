"""Files that change and disks that fail under a stream: named, no bus error, and over when the fault is."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import runner
from runner import BloomdeskError
from runner.generation.model import Model
from runner.system import files, memory
from runner.weights import chunks
from tests.support.streaming import (
    LONGEST,
    SMALL_CHUNK,
    Shelf,
    arrangement,
    logits_of,
    opened,
    promptly,
    ready,
    soon,
)

ROOT = Path(__file__).resolve().parents[3]
PARTS = ["block_00.safetensors", "block_01.safetensors", "embedding.safetensors"]
BUDGETS = ["nothing", "half", "resident"]


@pytest.fixture
def directory(prepared, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared()[1], tmp_path / "bloom"))


@contextmanager
def damaged(path: Path, kind: str) -> Iterator[None]:
    """The file spoiled, and then as it was."""
    found, kept = path.stat(), path.with_suffix(".kept")
    if kind == "touched":
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000_000))
        yield
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
        return
    path.rename(kept)
    if kind == "replaced":
        shutil.copyfile(kept, path)
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000_000))
    yield
    path.unlink(missing_ok=True)
    kept.rename(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["touched", "replaced", "deleted"])
@pytest.mark.parametrize(
    ("part", "used"), [(PARTS[0], False), (PARTS[1], True), (PARTS[2], False), (PARTS[2], True)]
)
def test_a_file_that_changes_is_named_and_works_again_as_it_was(
    directory: Path,
    logits_in_ram,
    prepared,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    part: str,
    used: bool,
) -> None:
    wanted = logits_in_ram(prepared()[1])
    monkeypatch.setattr(chunks, "LARGEST_CHUNK", SMALL_CHUNK)
    for budget in BUDGETS:
        model = opened(directory)
        shares = arrangement(model.weights, budget)

        def use(model: Model = model, shares: tuple[frozenset[int], int] = shares) -> torch.Tensor:
            return promptly(lambda: logits_of(model, *shares))

        if used:
            use()
        with damaged(directory / part, kind):
            for _ in range(2):
                with pytest.raises(BloomdeskError) as caught:
                    use()
                assert str(directory / part) in caught.value.message
                assert f"bloomdesk verify {directory}" in caught.value.hint
        assert torch.equal(use(), wanted)


# Part, the size it is cut to, budget, and whether a pass went before.
TRUNCATIONS = [
    ("block_01.safetensors", 8000, "nothing", True),
    ("block_01.safetensors", 0, "half", True),
    ("block_00.safetensors", 0, "resident", True),
    ("block_00.safetensors", 5000, "resident", False),
    ("embedding.safetensors", 40_000, "half", False),
    ("embedding.safetensors", 0, "resident", True),
]
TRUNCATE = """
import faulthandler, json, os, sys
from pathlib import Path
import runner
from runner import BloomdeskError
from runner.weights import chunks
faulthandler.dump_traceback_later({longest}, exit=True)
chunks.LARGEST_CHUNK = 9000
directory = Path(sys.argv[1])
for part, size, budget, used in json.loads(sys.argv[2]):
    print(part, size, budget, used, flush=True)
    path = directory / part
    model = runner.load(directory)
    count = len(model.weights.stream.chunks)
    shares = {{"resident": (range(count), 0), "half": (range(0, count, 2), 3), "nothing": ((), 2)}}[budget]
    def use():
        cache = model.cache(8)
        model.weights.stream.arrange(frozenset(shares[0]), shares[1])
        return model.forward([5, 700, 31], cache).tolist()
    expected = runner.load(directory)
    expected = expected.forward([5, 700, 31], expected.cache(8)).tolist()
    if used:
        assert use() == expected
    data, found = path.read_bytes(), path.stat()
    os.truncate(path, size)
    for _ in range(2):
        try: use()
        except BloomdeskError as error:
            assert str(path) in error.message and "bloomdesk verify" in error.hint, error.worded()
        else: raise SystemExit("it was not noticed")
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert use() == expected
print("through")
"""


@pytest.mark.slow
def test_a_truncated_file_is_no_bus_error(directory: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", TRUNCATE.format(longest=LONGEST), str(directory), json.dumps(TRUNCATIONS)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=2 * LONGEST,
    )
    assert run.returncode == 0, (run.returncode, run.stdout, run.stderr)  # a bus error is -7
    assert run.stdout.endswith("through\n")


class Failing(io.FileIO):
    """A file on a disk with a fault."""

    code = errno.EIO

    def readinto(self, buffer: object) -> int:
        raise OSError(self.code, os.strerror(self.code))


def failing_reads(
    monkeypatch: pytest.MonkeyPatch, part: str, times: float, code: int = errno.EIO
) -> list[Path]:
    """The next `times` reads of that part fail, however they are made; what has failed so far."""
    failed: list[Path] = []

    def faulty(path: Path) -> bool:
        if path.name == part and len(failed) < times:
            failed.append(path)
            return True
        return False

    open_for_streaming = files.open_for_streaming

    def open_faulty(path: Path, *, past_the_cache: bool) -> io.FileIO:
        if faulty(path):
            return Failing(path, "r")
        return open_for_streaming(path, past_the_cache=past_the_cache)

    monkeypatch.setattr(Failing, "code", code)
    monkeypatch.setattr(files, "open_for_streaming", open_faulty)
    # Otherwise the page cache has all of it, and there is no read to fail.
    monkeypatch.setattr(memory, "page_in", lambda *_: False)
    return failed


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("part", PARTS)
def test_a_faulty_disk_is_named_and_works_again_when_it_does(
    directory: Path, logits_in_ram, prepared, monkeypatch: pytest.MonkeyPatch, budget: str, part: str
) -> None:
    wanted = logits_in_ram(prepared()[1])
    monkeypatch.setattr(chunks, "LARGEST_CHUNK", SMALL_CHUNK)
    readers = 1 if part == PARTS[0] else 4
    model = opened(directory, readers=readers)
    shares = arrangement(model.weights, budget)
    with monkeypatch.context() as patch:
        failed = failing_reads(patch, part, times=float("inf"))
        for _ in range(3):
            with pytest.raises(BloomdeskError, match="cannot be read at bytes") as caught:
                promptly(lambda: logits_of(model, *shares))
            assert str(directory / part) in caught.value.message
            assert os.strerror(errno.EIO) in caught.value.message
            assert caught.value.hint == f"see what is damaged: bloomdesk verify {directory}"
        quiet = len(failed)
        time.sleep(0.05)
        assert len(failed) <= quiet + readers  # a broken disk is not read over and over
    assert torch.equal(promptly(lambda: logits_of(model, *shares)), wanted)


def test_a_fault_that_is_over_when_the_chunk_is_needed_is_forgotten(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = shelf.stream(buffers=3)
    with monkeypatch.context() as patch:
        with stream.chunk(0):
            soon(lambda: len(ready(stream)) == 2)
            failed = failing_reads(patch, shelf.path.name, times=1)
        soon(lambda: bool(failed))
    promptly(lambda: [shelf.check(stream, index) for index in range(1, len(shelf.chunks))])
    promptly(lambda: shelf.check_pass(stream))


def test_a_failed_first_chunk_is_read_again_in_the_next_pass(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = shelf.stream(buffers=3)
    with monkeypatch.context() as patch:
        failing_reads(patch, shelf.path.name, times=float("inf"))
        with pytest.raises(BloomdeskError):
            promptly(lambda: shelf.check(stream, 0))
    time.sleep(0.01)
    promptly(lambda: shelf.check_pass(stream))


def test_rows_that_cannot_be_read_are_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runner.load(directory)
    with monkeypatch.context() as patch:
        patch.setattr(files, "open_for_rows", lambda path: Failing(path, "r"))
        with pytest.raises(BloomdeskError, match=r"embedding\.safetensors cannot be read") as caught:
            model.forward([5], model.cache(1))
        assert "bloomdesk verify" in caught.value.hint
    model.forward([5], model.cache(1))


def test_a_file_that_ends_too_early_is_an_error_and_no_endless_loop(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ending(io.FileIO):
        def readinto(self, buffer: object) -> int:
            return 0

    monkeypatch.setattr(files, "open_for_streaming", lambda path, past_the_cache: Ending(path, "r"))
    with pytest.raises(BloomdeskError, match="the file ends too early"):
        promptly(lambda: shelf.check_pass(shelf.stream()))
