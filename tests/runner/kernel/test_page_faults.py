"""A page that a mapped file no longer has: zeros and a count in a watched range, the usual bus error elsewhere."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runner.system import platform

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(platform.WINDOWS, reason="has no bus errors")]

BEGINNING = """
import faulthandler, mmap, os, sys
import torch
from runner.kernel.page_faults import WatchedRange
faulthandler.dump_traceback_later(50, exit=True)
PAGE = mmap.PAGESIZE
with open(sys.argv[1], "w+b") as file:
    file.write(b"\\1" * 40 * PAGE)
    file.flush()
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    watched = WatchedRange(tensor.data_ptr(), 20 * PAGE)
    assert tensor.sum() == 40 * PAGE
    os.truncate(sys.argv[1], 3 * PAGE)
"""


def ended(code: str, path: Path) -> tuple[int, str, str]:
    """Exit status, output and errors of a process that runs this."""
    command = [sys.executable, "-c", BEGINNING + code, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    return run.returncode, run.stdout, run.stderr


def test_zeros_take_the_place_of_what_is_gone(tmp_path: Path) -> None:
    code = """
assert not watched.has_failed
assert tensor[: 3 * PAGE].sum() == 3 * PAGE and not watched.has_failed
assert tensor[7 * PAGE + 5] == 0 and watched.has_failed
assert tensor[7 * PAGE : 20 * PAGE].sum() == 0  # one fault replaced all that comes after
assert tensor[3 * PAGE : 7 * PAGE].sum() == 0
assert tensor[: 3 * PAGE].sum() == 3 * PAGE
os.truncate(sys.argv[1], 40 * PAGE)
assert not mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, access=mmap.ACCESS_READ)[30 * PAGE]
print("through")
"""
    status, out, errors = ended(code, tmp_path / "file")
    assert (status, out) == (0, "through\n"), errors


@pytest.mark.parametrize(
    "code",
    [
        "print(tensor[21 * PAGE])",
        "del watched; print(tensor[5 * PAGE])",
        "os.kill(os.getpid(), 7 if sys.platform == 'linux' else 10); print('it went on')",
    ],
    ids=["elsewhere", "not watched any more", "sent"],
)
def test_other_bus_errors_end_the_process(tmp_path: Path, code: str) -> None:
    status, out, _ = ended(code, tmp_path / "file")
    assert (status, out) == (-signal.SIGBUS, "")


def test_who_handled_bus_errors_before_still_does(tmp_path: Path) -> None:
    code = "print(tensor[5 * PAGE], flush=True); print(tensor[21 * PAGE])"
    before = "import faulthandler; faulthandler.enable()\n"
    run = subprocess.run(
        [sys.executable, "-c", before + BEGINNING + code, str(tmp_path / "file")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert run.returncode == -signal.SIGBUS and run.stdout == "tensor(0, dtype=torch.uint8)\n"
    assert "Bus error" in run.stderr


def test_ranges_come_and_go(tmp_path: Path) -> None:
    code = """
import threading
def many():
    for _ in range(2000):
        each = WatchedRange(0x1000, 0x1000)
        assert not each.has_failed
threads = [threading.Thread(target=many) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
more = [WatchedRange(0x1000, 0x1000) for _ in range(10_000)]  # more than can be watched
assert not any(each.has_failed for each in more)
assert tensor[5 * PAGE] == 0 and watched.has_failed
del more
again = WatchedRange(tensor.data_ptr() + 20 * PAGE, 20 * PAGE)
assert tensor[21 * PAGE] == 0 and again.has_failed
print("through")
"""
    status, out, errors = ended(code, tmp_path / "file")
    assert (status, out) == (0, "through\n"), errors
