"""Weights that stay are pages of their file: shared, dropped when they stay no longer, and whole or an error."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runner import BloomdeskError
from runner.system import memory, platform
from runner.weights import part_file
from runner.weights.mapping import Mapping
from runner.weights.stream import Stream
from tests.support.streaming import LONGEST, Shelf, logits_of, opened, promptly

ROOT = Path(__file__).resolve().parents[3]
on_linux = pytest.mark.skipif(not platform.LINUX_CALLS, reason="looks at memory as Linux shows it")


def resident_kilobytes(path: Path) -> int:
    """Kilobytes of RAM that this process has mapped of a file."""
    maps, found = Path("/proc/self/smaps").read_text(), 0
    for part in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", maps, flags=re.MULTILINE):
        if str(path) in part:
            found += int(re.search(r"^Rss:\s+(\d+) kB", part, re.MULTILINE)[1])
    return found


def test_the_bits_are_those_of_the_file_where_pages_cannot_be_asked_for(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(memory, "page_in", lambda *how: bool(asked.append(how)))
    stream = Stream(shelf.chunks)
    promptly(lambda: [shelf.check_pass(stream) for _ in range(2)])
    assert len(asked) == len(shelf.chunks)


@on_linux
def test_what_stays_no_longer_leaves_the_ram(shelf: Shelf) -> None:
    stream = Stream(shelf.chunks)
    promptly(lambda: shelf.check_pass(stream))
    assert resident_kilobytes(shelf.path) * 1024 >= shelf.nbytes
    stream.arrange(frozenset({9}), 2)
    # Its pages at the ends went with its neighbours; whoever uses them has them again.
    assert 0 < resident_kilobytes(shelf.path) * 1024 <= shelf.chunks[9].nbytes + 2 * mmap.PAGESIZE
    promptly(lambda: [shelf.check_pass(stream) for _ in range(2)])


def test_a_file_that_cannot_be_mapped_is_named(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(shelf.chunks)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "mapped", lambda _: (_ for _ in ()).throw(OSError(19, os.strerror(19))))
        with pytest.raises(BloomdeskError, match="cannot be read at bytes") as caught:
            promptly(lambda: shelf.check_pass(stream))
        assert str(shelf.path) in caught.value.message and os.strerror(19) in caught.value.message
    promptly(lambda: shelf.check_pass(stream))


def test_weights_that_were_lost_in_use_are_an_error_and_read_again(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(shelf.chunks)
    promptly(lambda: [shelf.check_pass(stream) for _ in range(2)])
    made = []
    monkeypatch.setattr(part_file, "Mapping", lambda file: made.append(Mapping(file)) or made[-1])
    for index in (4, 0, 12):
        with monkeypatch.context() as patch:
            patch.setattr(Mapping, "has_failed", True)
            with (
                pytest.raises(BloomdeskError, match="cannot be read while it is in use"),
                stream.chunk(index),
            ):
                raise ValueError("a decoder found zeros")
        promptly(lambda: [shelf.check_pass(stream) for _ in range(2)])
    assert len(made) == 3


CUT_WITHIN_A_PASS = """
import faulthandler, os, sys
from pathlib import Path
import runner
from runner import BloomdeskError
from runner.weights.part_file import PartFile
faulthandler.dump_traceback_later({longest}, exit=True)
directory = Path(sys.argv[1])
path = directory / "block_01.safetensors"
model = runner.load(directory)
cache = model.cache(8)
expected = model.forward([5, 200, 31], cache).tolist()
cache.rewind(0)
data, found = path.read_bytes(), path.stat()
check = PartFile.check_unchanged
def cut_after(self, *given):  # right after the pass has looked at it
    check(self, *given)
    if self.path == path:
        os.truncate(path, int(sys.argv[2]))
PartFile.check_unchanged = cut_after
try: model.forward([5, 200, 31], cache)
except BloomdeskError as error:
    assert str(path) in error.message and "bloomdesk verify" in error.hint, error.worded()
    print(error.message)
else: raise SystemExit("it was not noticed")
PartFile.check_unchanged = check
with path.open("r+b") as file:
    file.write(data)
os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
assert model.forward([5, 200, 31], cache).tolist() == expected
print("through")
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.WINDOWS, reason="cuts no file that is mapped")
@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("size", [0, 20_000])
def test_a_file_that_is_cut_within_a_pass_is_no_bus_error(
    prepared, coded_copy: Path, tmp_path: Path, size: int, lossless: bool
) -> None:
    directory = coded_copy if lossless else shutil.copytree(prepared()[1], tmp_path / "plain")
    code = CUT_WITHIN_A_PASS.format(longest=LONGEST)
    run = subprocess.run(
        [sys.executable, "-c", code, str(directory), str(size)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=2 * LONGEST,
    )
    assert run.returncode == 0, (run.returncode, run.stdout, run.stderr)  # a bus error is -7
    assert "was changed while the model was in use" in run.stdout and run.stdout.endswith("through\n")


@pytest.mark.slow
@on_linux
def test_two_models_share_their_pages(prepared) -> None:
    directory = prepared()[1]
    first, second = opened(directory), opened(directory)
    wanted = logits_of(first, frozenset(range(len(first.weights.stream.chunks))), 0)
    assert torch.equal(logits_of(second, frozenset(range(len(second.weights.stream.chunks))), 0), wanted)
    for part in directory.glob("block_*.safetensors"):
        pss = [
            int(re.search(r"^Pss:\s+(\d+) kB", each, re.MULTILINE)[1])
            for each in re.split(
                r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE
            )
            if str(part) in each
        ]
        # Models of earlier tests may still be there; their pages are the same.
        assert len(pss) >= 2 and sum(pss) * 1024 < 1.1 * part.stat().st_size
