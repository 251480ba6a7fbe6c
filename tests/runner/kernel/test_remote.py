"""The kernel's tests once more: with the code for aarch64 under an emulator, and with sanitizers in the code."""

from __future__ import annotations

import ctypes
import platform
import shutil
import sys
from pathlib import Path

import pytest

from runner.kernel import compiler
from runner.kernel.library import load_kernel, usable_variants
from tests.runner.kernel import remote

EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler.find_compiler() is None, reason="no C compiler"),
]


@pytest.fixture(autouse=True, scope="module")
def variant() -> None:
    """In place of the fixture that runs each test with every variant of this processor."""


NO_EMULATOR = pytest.mark.skipif(
    EMULATOR is None, reason="no qemu-aarch64; on Debian: apt install qemu-user-static"
)
NO_SANITIZERS = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64") or not shutil.which("gcc"),
    reason="not Linux on x86-64, or no gcc, which has the libraries of the sanitizers",
)
PROGRAMS = [
    pytest.param("neon", marks=NO_EMULATOR),
    *(pytest.param(variant, marks=NO_SANITIZERS) for variant in usable_variants()[-1:]),
]


@pytest.fixture(scope="module", params=PROGRAMS)
def command(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """The command of the program for NEON, or of that with sanitizers for the best variant of this processor."""
    name, folder = request.param, tmp_path_factory.mktemp("remote")
    if name == "neon":
        return [EMULATOR, remote.compile_for_aarch64(folder)]
    return [remote.compile_with_sanitizers(folder, name)]


def test_the_bits_are_those_of_the_reference(command: list[str | Path]) -> None:
    """And no function touches a byte beyond what it was given, or does what C leaves undefined."""
    remote.run_tests(command)


def test_a_byte_too_few_is_noticed(command: list[str | Path]) -> None:
    kernel = remote.RemoteKernel(command, load_kernel())
    rows, coded, lengths = [(ctypes.c_ubyte * 4096)() for _ in range(3)]
    scratch = (ctypes.c_ubyte * kernel.scratch_bytes_of_encoder())()
    kernel.encode_rows(rows, 12, 64, coded, lengths, scratch)
    short = (ctypes.c_ubyte * (12 * 64 * 2 - 1))()
    with pytest.raises(RuntimeError, match="the remote kernel ended in encode_rows"):
        kernel.encode_rows(short, 12, 64, coded, lengths, scratch)
    kernel.close()
