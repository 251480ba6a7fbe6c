"""Which library is loaded, and what is said where none can be."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from runner.errors import BloomdeskError
from runner.kernel import compiler, library
from runner.kernel.library import ENVIRONMENT, load_kernel, usable_variants


@pytest.fixture(autouse=True)
def nothing_is_loaded() -> None:
    forget()
    yield
    forget()


def forget() -> None:
    for function in (load_kernel, usable_variants, library.open_library):
        function.cache_clear()


def test_the_environment_chooses_a_variant(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(load_kernel()._name).name.startswith(f"{variant}-")
    forget()
    monkeypatch.delenv(ENVIRONMENT)
    assert Path(load_kernel()._name).name.startswith(f"{usable_variants()[-1]}-")


@pytest.mark.parametrize("wrong", ["avx1024", "AVX2", "neon/../sse2"])
def test_an_unknown_variant_is_one_clear_sentence(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, wrong)
    with pytest.raises(BloomdeskError, match="which this processor does not run") as caught:
        load_kernel()
    assert usable_variants()[0] in caught.value.hint


def test_an_unknown_system_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "this_target", lambda: "plan9-mips")
    with pytest.raises(BloomdeskError, match="no kernel for plan9-mips"):
        load_kernel()


@pytest.fixture
def changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose kernel.c has changed since it was compiled; the folder of its libraries."""
    source, folder = tmp_path / "kernel.c", tmp_path / "lib"
    source.write_text(compiler.SOURCE.read_text() + "\n// changed\n")
    folder.mkdir()
    for path in compiler.LIBRARIES.iterdir():
        # Not the folders of builds that run now, or were killed.
        if path.is_file():
            shutil.copy2(path, folder)
    monkeypatch.setattr(compiler, "SOURCE", source)
    monkeypatch.setattr(compiler.library, "__defaults__", (folder,))
    monkeypatch.setattr(compiler.compile_all, "__defaults__", (folder,))
    return folder


def test_a_library_that_does_not_load_is_one_clear_sentence(changed: Path) -> None:
    for path in changed.iterdir():
        path.unlink()
    for variant in compiler.variants(compiler.this_target()):
        compiler.library(compiler.this_target(), variant, changed).write_bytes(b"no library")
    with pytest.raises(BloomdeskError, match=r"the kernel cannot be loaded: \S") as caught:
        load_kernel()
    assert caught.value.hint == "install bloomdesk again"


def test_without_a_compiler_a_change_is_one_clear_sentence(
    changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "find_compiler", lambda: None)
    with pytest.raises(BloomdeskError, match="the kernel is not compiled") as caught:
        load_kernel()
    assert "pip install" in caught.value.hint


@pytest.mark.slow
@pytest.mark.skipif(compiler.find_compiler() is None, reason="no C compiler")
def test_a_changed_source_is_compiled_again(changed: Path) -> None:
    before = set(changed.iterdir())
    load_kernel()
    after = set(changed.iterdir())
    assert len(after) == len(compiler.variants(compiler.this_target()))
    assert not before & after


@pytest.mark.slow
def test_what_a_killed_build_left_goes_with_the_next_one(tmp_path: Path) -> None:
    killed, running = tmp_path / "tmpkilled", tmp_path / "tmprunning"
    for folder in (killed, running):
        folder.mkdir()
        (folder / "sse2.o").write_bytes(b"half")
    long_ago = time.time() - compiler.LONGEST_BUILD - 1
    os.utime(killed, (long_ago, long_ago))
    # It writes an empty file in place of what is asked for.
    stand_in = [sys.executable, "-c", "import sys; open(sys.argv[-1], 'w')"]
    compiler.compile_all("linux-aarch64", stand_in, tmp_path)
    made = compiler.library("linux-aarch64", "neon", tmp_path)
    assert set(tmp_path.iterdir()) == {running, made}
    assert (running / "sse2.o").exists()


@pytest.mark.slow
@pytest.mark.skipif(compiler.find_compiler() is None, reason="no C compiler")
def test_a_source_that_does_not_compile_is_named(changed: Path) -> None:
    compiler.SOURCE.write_text("no C at all")
    with pytest.raises(BloomdeskError, match=r"cannot be compiled: .*error"):
        load_kernel()
