"""Wheels: one for another system is what it says it is, and what is wrong with one is named."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import pytest

from runner.kernel import compiler

pytest.importorskip("lief")

from scripts.wheels.build import ROOT, build_wheel, workshop
from scripts.wheels.check import faults, library_faults

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler.find_compiler() is None, reason="no C compiler"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For Linux on aarch64; made after libraries of another system had been left in the build's folder."""
    with workshop() as place:
        left = place / "source" / "build" / "lib" / "runner" / "kernel" / "lib" / "neon-old.dylib"
        left.parent.mkdir(parents=True)
        left.write_bytes(b"of another build")
        return build_wheel(place, "linux-aarch64", tmp_path_factory.mktemp("wheels"))


def test_a_wheel_for_another_system_is_sound(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-manylinux_2_17_aarch64.whl")
    assert faults(wheel, "linux-aarch64", [str(ROOT), str(Path.home()), tempfile.gettempdir()]) == []


def test_what_is_wrong_with_a_wheel_is_named(wheel: Path) -> None:
    (name,) = [each for each in zipfile.ZipFile(wheel).namelist() if each.endswith(".so")]
    assert faults(wheel, "linux-aarch64", [".dynsym"]) == [f"{name} has the text '.dynsym'"]
    assert faults(wheel, "linux-x86_64", [])[0].startswith("libraries are ")
    library = zipfile.ZipFile(wheel).read(name)
    assert list(library_faults(library, "linux-x86_64")) == ["is for ARCH.AARCH64, not x86_64"]
    assert list(library_faults(library, "macos-aarch64")) == ["is ELF, not MACHO"]
    renamed = library.replace(b"decode_rows", b"decode_cols")
    assert list(library_faults(renamed, "linux-aarch64")) == ["does not export decode_rows"]
