"""Exports have hashes: they are checked, resumed and mended by content; what could not be read is no damage."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest

from runner.errors import BloomdeskError
from runner.format.manifest import load_manifest
from tests.support.commands import refused, run
from tests.support.lossless import content, flip, make
from toolkit.commands.convert import convert
from toolkit.commands.export import INDEX, export
from toolkit.commands.info import inspect
from toolkit.commands.repair import repair
from toolkit.commands.verify import verify
from toolkit.io import reader
from toolkit.parts import check
from toolkit.parts.destination import write_manifest
from toolkit.parts.export_record import EXPORT_RECORD

BLOCK = "block_01.safetensors"
SHARD = "model-00003-of-00005.safetensors"


@pytest.fixture
def exported(made: Path, tmp_path: Path) -> Path:
    export(made, tmp_path / "export")
    return tmp_path / "export"


@pytest.mark.parametrize(
    ("file", "harm", "tensor"),
    [
        (SHARD, lambda path: flip(path, -9), "h.1.self_attention.query_key_value.weight"),
        (SHARD, lambda path: path.write_bytes(path.read_bytes()[:-9]), None),
        (SHARD, Path.unlink, None),
        (SHARD, lambda path: flip(path, 30), None),
        ("config.json", lambda path: flip(path, 3), None),
        (INDEX, lambda path: flip(path, 3), None),
    ],
)
def test_an_export_is_checked_and_mended_by_the_same_export(
    made: Path, exported: Path, file: str, harm: Callable[[Path], object], tensor: str | None
) -> None:
    assert "is sound" in run("verify", exported).stdout
    right = content(exported)
    harm(exported / file)
    report = verify(exported)
    assert {item.file for item in report.damage} == {file}
    assert tensor is None or {item.tensor for item in report.damage} == {tensor}
    done = run("verify", exported)
    assert done.returncode == 1 and "run the same bloomdesk export again" in done.stdout
    rotten = (exported / file).read_bytes() if (exported / file).exists() else None
    done = run("export", made, exported)
    found = content(exported)
    # It may be somebody's work, so it is set aside.
    assert found.pop(f"{file}.changed", None) == rotten
    assert done.returncode == 0 and found == right


def test_an_export_of_an_earlier_version_gets_its_record_if_it_is_right(made: Path, exported: Path) -> None:
    right = content(exported)
    (exported / EXPORT_RECORD).unlink()
    assert export(made, exported).written == () and content(exported) == right
    (exported / EXPORT_RECORD).unlink()
    flip(exported / SHARD, -9)
    rotten = content(exported)
    with pytest.raises(BloomdeskError, match="no record says whose it is"):
        export(made, exported)
    assert content(exported) == rotten


def unreadable(monkeypatch: pytest.MonkeyPatch, name: str, number: int, times: int = 10**6) -> None:
    """Reading the file `name` fails with an error number, the first few times."""
    left, read = [times], os.preadv

    def fail(descriptor: int, buffers: list[memoryview], start: int) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == name and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return read(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(reader, "PAUSES", (0.0, 0.0, 0.0))


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="no such system call here")
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ESTALE])
def test_what_cannot_be_read_is_unchecked_and_never_replaced(
    made: Path, made_copy: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before, exported_before = content(made_copy), content(exported)
    unreadable(monkeypatch, BLOCK, number)
    report = verify(made_copy)
    assert not report.damage and not report.sound and [item.file for item in report.unchecked] == [BLOCK]
    done = run("verify", made_copy, "--json")
    assert done.returncode == 2 and json.loads(done.stdout)["sound"] is False
    assert json.loads(done.stdout)["unchecked"][0]["errno"] == number
    shown = run("verify", made_copy).stdout
    assert f"{BLOCK}: it cannot be read: {os.strerror(number)}" in shown and "next: " in shown
    with pytest.raises(BloomdeskError, match="so it was not replaced"):
        repair(made_copy)
    assert content(made_copy) == before
    said = refused("export", made_copy, made_copy.parent / "new")
    assert f"{made_copy / BLOCK} cannot be read at " in said and "damaged" not in said
    unreadable(monkeypatch, SHARD, number)
    assert "so it was not replaced" in refused("export", made, exported)
    assert content(exported) == exported_before


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="no such system call here")
def test_a_passing_read_error_is_read_again(made_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreadable(monkeypatch, BLOCK, errno.EIO, times=2)
    assert verify(made_copy).sound


def test_damage_beside_what_cannot_be_read_is_damage(
    made_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(made_copy / "tokenizer.json", 9)
    unreadable(monkeypatch, BLOCK, errno.EACCES)
    assert run("verify", made_copy).returncode == 1


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="no such system call here")
def test_what_is_wrong_and_cannot_be_read_whole_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    flip(out / BLOCK, 5000)
    before, read = content(out), os.preadv

    def fail(descriptor: int, buffers: list[memoryview], start: int) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == BLOCK and start > 50_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(reader, "PAUSES", ())
    assert verify(out).damage and verify(out).unchecked
    with pytest.raises(BloomdeskError, match="so it was not replaced"):
        repair(out, source)
    assert content(out) == before


def test_a_file_that_readers_take_in_place_of_the_shards_is_damage(exported: Path, tmp_path: Path) -> None:
    (exported / "model.safetensors").write_bytes(b"another's")
    done = run("verify", exported)
    assert done.returncode == 1 and "readers take it in place of the shards: move it away" in done.stdout
    said = refused("convert", exported, tmp_path / "new")
    assert "holds two checkpoints, model.safetensors and the shards of" in said
    (exported / "model.safetensors").unlink()
    assert run("verify", exported).returncode == 0


def test_another_programs_index_and_files_are_kept(made: Path, exported: Path, tmp_path: Path) -> None:
    """The same names and weight map, as after save_pretrained into the directory."""
    other = json.loads((exported / INDEX).read_text())
    other["metadata"] = {"total_size": 1}
    (exported / INDEX).write_text(json.dumps(other))
    (exported / SHARD).write_bytes(b"trained on")
    run("export", made, exported)
    assert json.loads((exported / f"{INDEX}.changed").read_text()) == other
    assert (exported / f"{SHARD}.changed").read_bytes() == b"trained on"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / INDEX).write_text(json.dumps(other))
    (foreign / "config.json").write_text("{}")
    before = content(foreign)
    assert "is not empty and holds no export" in refused("export", made, foreign)
    assert content(foreign) == before


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="no such system call here")
def test_what_is_damaged_is_mended_beside_what_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    right = content(out)
    flip(out / "block_00.safetensors", 9000)
    unreadable(monkeypatch, BLOCK, errno.EACCES)
    with pytest.raises(BloomdeskError, match=f"{BLOCK}: it cannot be read"):
        repair(out, source)
    assert content(out) == right


def test_downloads_are_named_with_what_is_right_for_them(made_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "bloomdesk-download.json").write_text("{}")
    for command in ("verify", "info", "repair"):
        said = refused(command, tmp_path / "d", status=2 if command == "verify" else 1)
        assert "is a downloaded checkpoint" in said and "--check" in said
    assert "is a downloaded checkpoint" in refused("export", tmp_path / "d", tmp_path / "new")


def test_info_looks_at_the_files(made_copy: Path) -> None:
    assert inspect(made_copy).as_json()["complete"]
    (made_copy / BLOCK).unlink()
    (made_copy / "tokenizer.json").write_bytes(b"cut")
    found = inspect(made_copy).as_json()
    assert not found["complete"] and found["damaged"] == [BLOCK, "tokenizer.json"]
    said = run("info", made_copy).stdout
    assert "damaged: 2 files" in said and f"next  bloomdesk repair {made_copy} --source SRC" in said


@pytest.mark.parametrize("file", [BLOCK, "tokenizer.json"])
def test_a_link_to_a_disk_that_is_not_mounted_is_not_replaced(
    made: Path, made_copy: Path, tmp_path: Path, file: str
) -> None:
    (tmp_path / "disk").mkdir()
    (made_copy / file).rename(tmp_path / "disk" / file)
    (made_copy / file).symlink_to(tmp_path / "disk" / file)
    assert verify(made_copy).sound
    (tmp_path / "disk").rename(tmp_path / "away")
    done = run("verify", made_copy)
    assert done.returncode == 2 and f"{file}: it is a link to {tmp_path / 'disk' / file}" in done.stdout
    assert "so it was not replaced" in refused("repair", made_copy)
    (tmp_path / "away").rename(tmp_path / "disk")
    assert verify(made_copy).sound and (made_copy / file).is_symlink()


@pytest.mark.parametrize("file", [BLOCK, "tokenizer.json", "manifest.json", "manifest.backup.json"])
def test_a_directory_in_the_place_of_a_file(tmp_path: Path, file: str) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "a place"
    convert(source, out)
    (out / file).unlink()
    (out / file).mkdir()
    done = run("verify", out)
    assert done.returncode == 1 and f"next: bloomdesk repair '{out}'" in done.stdout
    said = refused("repair", out, "--source", source)
    assert f"{out / file}" in said and f"next: move {out / file} away" in said
    (out / file).rmdir()
    assert run("repair", out, "--source", source).returncode == 0 and verify(out).sound


def test_info_names_what_it_could_not_look_at(made_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = check.open_regular

    def fail(path: Path) -> BinaryIO:
        if path.name == BLOCK:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path)

    monkeypatch.setattr(check, "open_regular", fail)
    found = inspect(made_copy).as_json()
    assert not found["complete"] and found["unread"] == [BLOCK] and not found["damaged"]
    assert f"not known: 1 files can't be looked at, {BLOCK} first" in run("info", made_copy).stdout


def test_an_unfinished_directory_is_not_called_damaged(made_copy: Path) -> None:
    manifest = load_manifest(made_copy)
    parts = {file: record for file, record in manifest.parts.items() if file != BLOCK}
    write_manifest(made_copy, replace(manifest, parts=parts))
    done = run("verify", made_copy)
    assert done.returncode == 1 and "not complete: 8 of 9 files are made, and these are sound" in done.stdout
    assert f"next: bloomdesk convert SRC {made_copy}" in done.stdout
    said = run("info", made_copy).stdout
    assert "not complete: 1 files are still to be made" in said
    assert f"next  bloomdesk convert SRC {made_copy} resumes where it stopped" in said
    flip(made_copy / "tokenizer.json", 9)
    assert f"next: bloomdesk repair {made_copy}" in run("verify", made_copy).stdout
