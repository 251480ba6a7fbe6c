"""Clones whose work tree holds pointers of Git LFS, as the tutorial makes them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from runner.errors import BloomdeskError
from scripts.fakehub.checkpoint import Layout, synthetic, to_lfs_clone
from toolkit.commands.convert import convert, plan_conversion
from toolkit.commands.repair import repair

SHAPE = {"hidden_size": 64, "heads": 8, "blocks": 2, "vocab_size": 300}
LAYOUTS = {
    "shards": Layout(),
    "one file": Layout(single=True),
    "safetensors": Layout(form="safetensors"),
    "one safetensors file": Layout(single=True, form="safetensors"),
}


@pytest.fixture(params=LAYOUTS)
def clone(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A clone with pointers in place of all but config.json; its files as they were are in tmp_path/whole."""
    synthetic(tmp_path / "whole", **SHAPE, layout=LAYOUTS[request.param])
    shutil.copytree(tmp_path / "whole", tmp_path / "clone")
    to_lfs_clone(tmp_path / "clone")
    return tmp_path / "clone"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.startswith(".")}


def shard_of(clone: Path) -> Path:
    """The last pointer to weights."""
    return sorted(path for path in clone.iterdir() if path.suffix in (".bin", ".safetensors"))[-1]


def object_of(pointer: Path) -> Path:
    sha256 = pointer.read_text().split("sha256:")[1][:64]
    return pointer.parent / ".git" / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256


def test_a_clone_is_taken_as_it_is(clone: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in clone.rglob("*") if path.is_file()}
    assert shard_of(clone).stat().st_size < 200
    convert(clone, tmp_path / "bloom")
    convert(tmp_path / "whole", tmp_path / "expected")
    # The manifest names the same shards with the same hashes.
    assert contents(tmp_path / "bloom") == contents(tmp_path / "expected")
    assert {path: path.read_bytes() for path in clone.rglob("*") if path.is_file()} == before


def test_a_linked_work_tree(clone: Path, tmp_path: Path) -> None:
    common = clone / ".git"
    shutil.move(common, tmp_path / "common")
    linked = tmp_path / "common" / "worktrees" / "clone"
    linked.mkdir(parents=True)
    (linked / "commondir").write_text("../..\n")
    common.write_text(f"gitdir: {linked}\n")
    convert(clone, tmp_path / "bloom")


@pytest.mark.parametrize("which", ["shard", "tokenizer.json"])
def test_a_missing_object_is_named_with_the_command_to_fetch_it(
    clone: Path, tmp_path: Path, which: str
) -> None:
    pointer = shard_of(clone) if which == "shard" else clone / which
    sha256 = hashlib.sha256((tmp_path / "whole" / pointer.name).read_bytes()).hexdigest()
    object_of(pointer).unlink()
    with pytest.raises(BloomdeskError, match="pointer of Git LFS whose object") as caught:
        convert(clone, tmp_path / "bloom")
    assert str(pointer) in caught.value.message and sha256 in caught.value.message
    assert caught.value.hint == f'fetch it: git -C {clone} lfs fetch --include "{pointer.name}"'


def test_all_objects_missing(clone: Path, tmp_path: Path) -> None:
    for path in clone.iterdir():
        if path.suffix in (".bin", ".safetensors"):
            object_of(path).unlink()
    with pytest.raises(BloomdeskError, match="pointer of Git LFS whose object") as caught:
        convert(clone, tmp_path / "bloom")
    assert "lfs fetch --include" in caught.value.hint and len(caught.value.hint) < 400


@pytest.mark.parametrize("which", ["shard", "tokenizer.json", "config.json"])
def test_a_pointer_without_a_clone_is_called_one(clone: Path, tmp_path: Path, which: str) -> None:
    pointer = shard_of(clone) if which == "shard" else clone / which
    text = shard_of(clone).read_text()
    shutil.rmtree(clone)
    shutil.copytree(tmp_path / "whole", clone)
    pointer.write_text(text)
    with pytest.raises(BloomdeskError, match="is a pointer of Git LFS, not the file of"):
        convert(clone, tmp_path / "bloom")


@pytest.mark.parametrize("which", ["shard", "tokenizer.json"])
@pytest.mark.parametrize("how", ["size", "content"])
def test_an_object_that_is_not_what_the_pointer_says(
    clone: Path, tmp_path: Path, how: str, which: str
) -> None:
    damaged = object_of(shard_of(clone) if which == "shard" else clone / which)
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] if how == "size" else data[:-3] + b" " + data[-2:])
    with pytest.raises(BloomdeskError, match=r"bytes, the pointer|damaged|not a sound"):
        convert(clone, tmp_path / "bloom")


def test_objects_are_never_deleted(clone: Path, tmp_path: Path) -> None:
    with pytest.raises(BloomdeskError, match="pointer of Git LFS"):
        plan_conversion(clone, tmp_path / "bloom", delete_source=True)


def test_repair_from_a_clone(clone: Path, tmp_path: Path) -> None:
    convert(tmp_path / "whole", tmp_path / "bloom")
    part = tmp_path / "bloom" / "block_01.safetensors"
    sound = part.read_bytes()
    part.write_bytes(sound[:-1] + b"\0")
    repair(tmp_path / "bloom", clone)
    assert part.read_bytes() == sound
