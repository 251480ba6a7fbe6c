"""The backup of the manifest: there when a directory is complete, checked, and enough to go on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runner.errors import BloomdeskError
from runner.format.layout import MANIFEST, MANIFEST_BACKUP
from runner.format.manifest import load_manifest
from toolkit.commands.verify import verify
from toolkit.parts.manifest_backup import find_manifest, recover_manifest, write_backup

BLOCK = "block_01.safetensors"


@pytest.fixture
def prepared(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "prepared"))


def edited(text: str) -> str:
    body = json.loads(text)
    body["parts"][0]["xxh3_128"] = "0" * 32
    return json.dumps(body)


def of_another_version(text: str) -> str:
    return json.dumps({**json.loads(text), "format_version": 2})


Harm = Callable[[Path], object]
HARMS: dict[str, Harm] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "edited": lambda path: path.write_text(edited(path.read_text())),
    "another version": lambda path: path.write_text(of_another_version(path.read_text())),
    "not text": lambda path: path.write_bytes(b"\xff\xfe"),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


def make_incomplete(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    parts = {file: record for file, record in manifest.parts.items() if file != BLOCK}
    (prepared / MANIFEST).write_text(replace(manifest, parts=parts).to_json())


def test_it_is_the_manifest_byte_for_byte(prepared: Path) -> None:
    assert (prepared / MANIFEST_BACKUP).read_bytes() == (prepared / MANIFEST).read_bytes()
    assert load_manifest(prepared, MANIFEST_BACKUP) == load_manifest(prepared)


def test_only_a_complete_directory_gets_one(prepared: Path) -> None:
    (prepared / MANIFEST_BACKUP).unlink()
    make_incomplete(prepared)
    write_backup(prepared, load_manifest(prepared))
    assert not (prepared / MANIFEST_BACKUP).exists()


def test_it_is_not_written_again_where_it_is_right(prepared: Path) -> None:
    before = (prepared / MANIFEST_BACKUP).stat()
    write_backup(prepared, load_manifest(prepared))
    after = (prepared / MANIFEST_BACKUP).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
@pytest.mark.parametrize("quick", [True, False])
def test_a_bad_backup_is_its_own_damage(prepared: Path, harm: Harm, quick: bool) -> None:
    harm(prepared / MANIFEST_BACKUP)
    report = verify(prepared, quick=quick)
    assert [(item.file, item.tensor) for item in report.damage] == [(MANIFEST_BACKUP, None)]


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_with_a_sound_backup_a_bad_manifest_is_damage_and_the_check_goes_on(
    prepared: Path, harm: Harm
) -> None:
    everything = verify(prepared).bytes_read
    harm(prepared / MANIFEST)
    (prepared / BLOCK).write_bytes((prepared / BLOCK).read_bytes()[:-1] + b"?")
    report = verify(prepared)
    assert [(item.file, item.tensor) for item in report.damage] == [
        (MANIFEST, None),
        (BLOCK, "mlp.dense_4h_to_h.bias"),
    ]
    assert report.bytes_read == everything


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_without_either_nothing_can_be_checked(prepared: Path, harm: Harm) -> None:
    harm(prepared / MANIFEST)
    harm(prepared / MANIFEST_BACKUP)
    for check in (verify, find_manifest, recover_manifest):
        with pytest.raises(BloomdeskError, match=rf"{MANIFEST}|{prepared.name} is not a prepared"):
            check(prepared)


def test_an_incomplete_directory_has_none_and_that_is_no_damage(prepared: Path) -> None:
    make_incomplete(prepared)
    (prepared / MANIFEST_BACKUP).unlink()
    report = verify(prepared, quick=True)
    assert [item.file for item in report.damage] == [BLOCK]
    assert find_manifest(prepared) == (load_manifest(prepared), {})


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
@pytest.mark.parametrize("file", [MANIFEST, MANIFEST_BACKUP])
def test_recovery_makes_both_right(prepared: Path, file: str, harm: Harm) -> None:
    original = (prepared / MANIFEST).read_bytes()
    harm(prepared / file)
    if (prepared / file).is_dir():  # that is not ours to delete
        with pytest.raises(BloomdeskError, match="cannot be written"):
            recover_manifest(prepared)
        return
    manifest = recover_manifest(prepared)
    assert manifest.to_json().encode() == original
    assert (prepared / MANIFEST).read_bytes() == (prepared / MANIFEST_BACKUP).read_bytes() == original
    assert verify(prepared).sound


def test_recovery_leaves_an_incomplete_directory_as_it_is(prepared: Path) -> None:
    make_incomplete(prepared)
    (prepared / MANIFEST_BACKUP).unlink()
    before = sorted(path.name for path in prepared.iterdir())
    assert recover_manifest(prepared).missing == (BLOCK,)
    assert sorted(path.name for path in prepared.iterdir()) == before


def test_a_manifest_in_another_layout_is_put_right_with_its_backup(prepared: Path) -> None:
    """The same content with other spaces is sound, and the backup is not its copy."""
    original = (prepared / MANIFEST).read_bytes()
    (prepared / MANIFEST).write_text(json.dumps(json.loads(original)))
    assert [item.file for item in verify(prepared, quick=True).damage] == [MANIFEST_BACKUP]
    recover_manifest(prepared)
    assert (prepared / MANIFEST).read_bytes() == (prepared / MANIFEST_BACKUP).read_bytes() == original
