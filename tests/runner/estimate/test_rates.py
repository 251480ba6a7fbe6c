"""The machine's rates: numbers that make sense, nothing left on the disk, errors in one sentence."""

from __future__ import annotations

import errno
import os
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from runner import BloomdeskError
from runner.estimate import rates
from runner.kernel.matmul import Kernel
from runner.kernel.threads import workers
from runner.system import files, platform


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "LARGEST_CHUNK", 2**20)
    monkeypatch.setattr(rates, "SMALLEST_SCRATCH", 2**20)


@pytest.fixture(params=[True, False], ids=["past the cache", "plain"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(platform, "LINUX_CALLS", request.param and platform.LINUX_CALLS)
    return request.param


def test_all_of_the_files_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: bool) -> None:
    sizes = (3 * 2**20 + 5, 4096, 17, 2**20)
    paths = [tmp_path / str(number) for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(os.urandom(size))
    found = {path: bytearray(-(-size // 2**20) * 2**20) for path, size in zip(paths, sizes, strict=True)}
    read = files.read_uncached

    def kept(path: Path, start: int, view: memoryview, wanted: int) -> None:
        read(path, start, view, wanted)
        found[path][start : start + wanted] = view[:wanted]

    monkeypatch.setattr(files, "read_uncached", kept)
    assert rates.disk_rate(paths) > 0
    assert all(found[path][:size] == path.read_bytes() for path, size in zip(paths, sizes, strict=True))


def test_reading_ends_after_so_many_bytes_or_seconds(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2**24))
    assert rates.disk_rate([path], nbytes=2**20) > 0
    began = time.monotonic()
    assert rates.disk_rate([path] * 2000, seconds=0.05) > 0
    assert time.monotonic() - began < 30


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2**21))

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "open_for_streaming", broken)
    with pytest.raises(BloomdeskError, match="cannot be read: Input/output error"):
        rates.disk_rate([path])


def test_the_scratch_file_is_noise_and_leaves_nothing(tmp_path: Path, calls: bool) -> None:
    with rates.scratch(tmp_path, 2**22) as path:
        assert path.stat().st_size == 2**22
        assert len(set(path.read_bytes()[:4096])) > 100
        assert rates.disk_rate([path]) > 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), rates.scratch(tmp_path, 2**22):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not platform.LINUX_CALLS, reason="a file without a name is Linux's")
def test_the_scratch_file_has_no_name_that_a_killed_process_could_leave(tmp_path: Path) -> None:
    with rates.scratch(tmp_path, 2**20):
        assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_measured_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(BloomdeskError, match="cannot be measured: No such file"),
        rates.scratch(tmp_path / "x"),
    ):
        pass
    usage = namedtuple("usage", "free")(2**20)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(BloomdeskError, match="too little free space"), rates.scratch(tmp_path):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_rates_are_above_zero(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MEMORY_BYTES", 2**22)
    found = rates.kernel_rates(Kernel(dtype, workers(1)), dtype)
    assert len(found) == 5 and all(rate > 0 for rate in found)
