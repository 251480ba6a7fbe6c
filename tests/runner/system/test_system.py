"""What the operating system is asked for: the same results with and without Linux's own calls."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

import runner
import runner.generation.memory_plan
from runner.system import files, memory, platform
from runner.weights import chunks
from runner.weights.part_file import PartFile
from runner.weights.stream import Stream

ROOT = Path(__file__).resolve().parents[3]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="these are Linux's own calls")


def run_python(code: str, *arguments: object) -> str:
    """What a fresh interpreter prints; it has a minute."""
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert run.returncode == 0, (run.returncode, run.stdout, run.stderr)
    return run.stdout


# Without the Linux calls.


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_the_miniature_gives_the_same_tokens_without_linux_calls(
    miniature: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    prompt = "The weather today is"
    wanted = list(runner.load(miniature[1]).generate(prompt, max_new_tokens=12))
    monkeypatch.setattr(platform, "LINUX_CALLS", False)
    model = runner.load(miniature[1])
    if streamed:
        monkeypatch.setattr(chunks, "LARGEST_CHUNK", 100_000)
        monkeypatch.setattr(runner.generation.memory_plan, "MARGIN", 0)
        model = runner.load(miniature[1])
        model = replace(model, ram=model.process_nbytes + int(0.6 * model.weights.nbytes))
    generation = model.generate(prompt, max_new_tokens=12)
    assert (generation.streamed_bytes_per_pass > 0) == streamed
    assert list(generation) == wanted


ELSEWHERE = """
import dataclasses, faulthandler, mmap, os, sys, types
faulthandler.dump_traceback_later(50, exit=True)
import psutil, tokenizers, torch  # they are those of this system
from runner.kernel.library import load_kernel
load_kernel()  # so is it
for module, names in ((os, ("O_DIRECT", "posix_fadvise", "pread", "preadv", "sched_getaffinity", "getuid", "fork")),
                      (mmap, [name for name in dir(mmap) if name.startswith(("MADV_", "MAP_", "PROT_"))])):
    for name in names:
        if hasattr(module, name): delattr(module, name)
for name in ("fcntl", "resource", "termios", "pwd"):
    sys.modules[name] = None  # cannot be imported
# Windows locks with a module of its own.
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda descriptor, mode, nbytes: None)
torch.set_num_threads(1)
sys.platform = "win32"
import runner, runner.generation.memory_plan, runner.weights.chunks, runner.system
from runner.__main__ import main
assert not runner.system.platform.LINUX_CALLS
runner.generation.memory_plan.MARGIN = 0
runner.weights.chunks.LARGEST_CHUNK = 20000
model = runner.load(sys.argv[1])
print(list(model.generate([5, 6, 7], max_new_tokens=5)))
small = runner.load(sys.argv[1], ram=model.process_nbytes + model.weights.nbytes * 3 // 4)
small = dataclasses.replace(small, process_nbytes=model.process_nbytes)
generation = small.generate([5, 6, 7], max_new_tokens=5)
assert generation.streamed_bytes_per_pass
print(list(generation))
runner.system.memory.peak_memory(), runner.system.memory.bytes_read_from_disk()
assert main([sys.argv[1], "hello", "--max-new-tokens", "2"]) == 0
"""


@pytest.mark.slow
def test_it_runs_on_a_system_without_linux_names(prepared) -> None:
    directory = prepared()[1]
    wanted = str(list(runner.load(directory).generate([5, 6, 7], max_new_tokens=5)))
    assert run_python(ELSEWHERE, directory).splitlines()[:2] == [wanted, wanted]


def test_reads_past_the_cache_are_refused_without_linux_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    monkeypatch.setattr(platform, "LINUX_CALLS", False)
    with pytest.raises(OSError) as caught:
        files.open_for_streaming(path, past_the_cache=True)
    assert caught.value.errno == errno.EINVAL
    with files.open_for_streaming(path, past_the_cache=False) as file:
        assert file.read() == b"x" * 10


# The page cache.


class MappedFile:
    """A file of ones, mapped so that the page cache can be looked at."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        path.write_bytes(b"\1" * nbytes)
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.tensor = torch.frombuffer(self.mapping, dtype=torch.uint8)

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    def cached(self) -> list[bool]:
        """For each page, whether the page cache holds it."""
        size = len(self.mapping)
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(self.address), ctypes.c_size_t(size), pages) == 0
        return [bool(page & 1) for page in pages]

    def drop(self) -> None:
        self.mapping.madvise(mmap.MADV_DONTNEED)
        with files.open_for_streaming(self.path, past_the_cache=False) as file:
            files.forget(file, 0, len(self.mapping))
        if any(self.cached()):
            pytest.skip("this file system keeps its pages")


@pytest.fixture
def mapped(tmp_path: Path) -> MappedFile:
    return MappedFile(tmp_path / "file", 40 * mmap.PAGESIZE)


def test_anonymous_memory_is_aligned_for_any_disk() -> None:
    for nbytes in (4096, 5 * 4096, 2**22):
        own = torch.frombuffer(memory.anonymous(nbytes), dtype=torch.uint8)
        assert own.data_ptr() % platform.PAGE == 0
        assert own.numel() == nbytes and not own.any()


def test_a_stream_leaves_nothing_in_the_page_cache(prepared, tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("nowhere else the cache is looked at")
    made = MappedFile(tmp_path / "part", 300_000)
    made.drop()
    state = PartFile.of(made.path)
    cut = tuple(
        chunks.Chunk(state, start, 0, 1, torch.uint8, (1, 50_000)) for start in range(0, 300_000, 50_000)
    )
    stream = Stream(cut)
    stream.arrange(frozenset({1}), 3)
    for _ in range(3):
        for index in range(len(cut)):
            with stream.chunk(index) as weights:
                assert weights.eq(1).all()
    # The resident chunk lies there, and what shares a block of pages with it.
    assert 13 <= sum(made.cached()) <= 13 + 32
    stream.arrange(frozenset(), 3)
    with stream.chunk(0):
        # A busy system keeps given-up pages that are still in its queues, but no streamed ones come to them.
        assert sum(made.cached()) <= 13 + 32


# Memory to spare.


def write_group(directory: Path, version: int, limit: object, usage: int, stat: dict[str, int]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    names = [("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")][
        version - 1
    ]
    for name, value in zip(names, (limit, usage), strict=True):
        (directory / name).write_text(f"{value}\n")
    (directory / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of control groups that are plain files; `own` names those of this process."""
    monkeypatch.setattr(platform, "LINUX_CALLS", True)
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "GROUP_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 50 * 2**30}))
    return tmp_path


def test_without_control_groups_the_machine_is_the_limit(groups: Path) -> None:
    assert memory.memory_to_spare() == 50 * 2**30  # there is not even a list
    (groups / "own").write_text("0::/user.slice/a\n")
    assert memory.memory_to_spare() == 50 * 2**30


def test_a_control_group_of_version_2_is_a_limit(groups: Path) -> None:
    (groups / "own").write_text("0::/user.slice/a:b\n")
    inner = groups / "cgroup/user.slice/a:b"
    write_group(inner, 2, 3000, 1000, {"anon": 600, "file": 400, "active_file": 100, "inactive_file": 250})
    assert memory.memory_to_spare() == 3000 - 1000 + 350
    write_group(inner, 2, "max", 1000, {"active_file": 100, "inactive_file": 250})
    assert memory.memory_to_spare() == 50 * 2**30
    write_group(inner.parent, 2, 5000, 4900, {"active_file": 0, "inactive_file": 30})
    assert memory.memory_to_spare() == 130  # of the group around it
    write_group(inner, 2, 3000, 3500, {"active_file": 0, "inactive_file": 0})
    assert memory.memory_to_spare() == 0


def test_a_control_group_of_version_1_is_a_limit(groups: Path) -> None:
    (groups / "own").write_text("9:name=systemd:/x\n4:memory:/jobs/a\n1:cpu:/jobs\n0::/\n")
    write_group(groups / "cgroup/x", 1, 10, 1, {})  # of no memory controller
    stat = {"active_file": 1, "inactive_file": 2, "total_active_file": 100, "total_inactive_file": 250}
    write_group(groups / "cgroup/memory/jobs/a", 1, 3000, 1000, stat)
    write_group(groups / "cgroup/memory", 1, 9223372036854771712, 1000, stat)
    assert memory.memory_to_spare() == 2350


def test_in_a_container_the_limit_is_at_the_root(groups: Path) -> None:
    (groups / "own").write_text("4:memory:/docker/of-the-host\n")
    write_group(groups / "cgroup/memory", 1, 3000, 1000, {"total_active_file": 0, "total_inactive_file": 20})
    assert memory.memory_to_spare() == 2020
    (groups / "own").write_text("0::/../../elsewhere\n")
    write_group(groups / "cgroup", 2, 700, 100, {"active_file": 0, "inactive_file": 20})
    assert memory.memory_to_spare() == 620


@pytest.mark.parametrize("content", ["", "nonsense", "-", "12 12"])
def test_a_control_group_that_cannot_be_read_is_no_limit(groups: Path, content: str) -> None:
    (groups / "own").write_text("0::/a\n")
    write_group(groups / "cgroup/a", 2, 3000, 1000, {"active_file": 0, "inactive_file": 0})
    (groups / "cgroup/a/memory.current").write_text(content)
    assert memory.memory_to_spare() == 50 * 2**30
    write_group(groups / "cgroup/a", 2, content, 1000, {"active_file": 0, "inactive_file": 0})
    assert memory.memory_to_spare() == 50 * 2**30


def test_the_default_is_most_of_what_is_free_and_what_the_process_has(groups: Path) -> None:
    (groups / "own").write_text("0::/a\n")
    spare = 3 * 2**30
    write_group(groups / "cgroup/a", 2, spare, 0, {"active_file": 0, "inactive_file": 0})
    total = runner.generation.memory_plan.default_total()
    own = memory.memory_of_its_own()
    assert abs(total - runner.generation.memory_plan.DEFAULT_SHARE * (spare + own)) < 2**26
    assert 2**24 < own <= memory.memory_in_use()


@pytest.mark.slow
@on_linux
def test_mapped_files_do_not_count_as_the_processs_memory(mapped: MappedFile, tmp_path: Path) -> None:
    large = MappedFile(tmp_path / "large", 2**26)
    own, whole = memory.memory_of_its_own(), memory.memory_in_use()
    assert large.tensor.sum() == 2**26
    assert memory.memory_in_use() - whole > 0.9 * 2**26
    assert memory.memory_of_its_own() - own < 0.3 * 2**26


@pytest.mark.slow
@on_linux
def test_the_peak_is_of_this_program_alone() -> None:
    """What the parent held when it started the child counts for nothing."""
    ballast = bytearray(b"\1") * 2**28
    code = (
        "import runner.system.memory as s; x = b'1' * 2**26; del x; print(s.peak_memory(), s.memory_in_use())"
    )
    peak, now = map(int, run_python(code).split())
    assert len(ballast) == 2**28
    assert now + 2**25 < peak < now + 2**27


HELD = """
import sys, torch
from runner.system import memory
if sys.argv[1] == "back":
    memory.give_freed_memory_back()
for _ in range(2):  # the second time the C library has learned
    before, blocks = memory.memory_in_use(), [torch.ones(2**21) for _ in range(20)]
    last = torch.ones(2**10)  # above them all
    blocks.clear()
print(memory.memory_in_use() - before)
"""


@pytest.mark.slow
@on_linux
def test_large_blocks_go_back_when_they_are_freed() -> None:
    assert int(run_python(HELD, "back")) < 2**24
