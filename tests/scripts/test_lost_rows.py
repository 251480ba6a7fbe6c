"""The rule of scripts/torture that no row is lost while a directory is spread: it notices one that is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.format.layout import SPREADING
from runner.format.manifest import load_manifest
from scripts.torture.attempt import assert_no_row_lost
from tests.support.lossless import flip, interrupt_at, make
from toolkit.commands.convert import convert
from toolkit.commands.spread import spread

GONE, WHOLE = "block_00.safetensors", "block_02.safetensors"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that was being spread when its second block was made: its disks are `a` and `b`."""
    base = tmp_path_factory.mktemp("half")
    convert(make(base / "source"), base / "whole")
    shutil.copytree(base / "whole", base / "a")
    with pytest.raises(KeyboardInterrupt):
        spread(base / "a", [base / "b"], interrupt_at("block_01.safetensors"))
    return base


@pytest.fixture
def disks(half: Path, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    yield tuple(Path(shutil.copytree(half / name, tmp_path / name)) for name in "ab")


def test_what_is_half_spread_has_lost_nothing(half: Path, disks: tuple[Path, Path]) -> None:
    assert assert_no_row_lost(load_manifest(half / "whole"), disks[0], disks[1:]) == 2


@pytest.mark.parametrize("lost", [f"a/{SPREADING}/{GONE}", f"b/{GONE}", f"a/{WHOLE}"])
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: flip(path, -1)], ids=["gone", "flipped"])
def test_a_lost_row_is_noticed(half: Path, disks: tuple[Path, Path], lost: str, harm) -> None:
    harm(disks[0].parent / lost)
    with pytest.raises(AssertionError, match=Path(lost).name):
        assert_no_row_lost(load_manifest(half / "whole"), disks[0], disks[1:])
