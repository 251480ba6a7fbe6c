"""The backup of the manifest: there when a directory is complete, checked, and enough to go on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runner.errors import BloomdeskError
from runner.format.layout import MANIFEST, MANIFEST_BACKUP
from runner.format.manifest import load_manifest, read_manifest
from toolkit.commands.verify import verify
from toolkit.parts.destination import write_manifest
from toolkit.parts.manifest_backup import find_manifest, recover_manifest

BLOCK = "block_01.safetensors"


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
    "an unknown version": lambda path: path.write_bytes(
        path.read_bytes().replace(b'"format_version": 1', b'"format_version": 9')
    ),
    "not text": lambda path: path.write_bytes(b"\xff\xfe"),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


def make_incomplete(made_copy: Path) -> None:
    manifest = load_manifest(made_copy)
    parts = {file: record for file, record in manifest.parts.items() if file != BLOCK}
    (made_copy / MANIFEST).write_text(replace(manifest, parts=parts).to_json())


def test_the_backup_is_the_manifest_byte_for_byte(made_copy: Path) -> None:
    assert (made_copy / MANIFEST_BACKUP).read_bytes() == (made_copy / MANIFEST).read_bytes()
    assert read_manifest(made_copy / MANIFEST_BACKUP) == load_manifest(made_copy)


def test_a_right_backup_is_not_written_again(made_copy: Path) -> None:
    before = (made_copy / MANIFEST_BACKUP).stat()
    write_manifest(made_copy, load_manifest(made_copy))
    after = (made_copy / MANIFEST_BACKUP).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
@pytest.mark.parametrize("quick", [True, False])
def test_a_bad_backup_is_its_own_damage(made_copy: Path, harm: Harm, quick: bool) -> None:
    harm(made_copy / MANIFEST_BACKUP)
    report = verify(made_copy, quick=quick)
    assert [(item.file, item.tensor) for item in report.damage] == [(MANIFEST_BACKUP, None)]


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_with_a_sound_backup_a_bad_manifest_is_damage_and_the_rest_is_checked(
    made_copy: Path, harm: Harm
) -> None:
    everything = verify(made_copy).bytes_read
    harm(made_copy / MANIFEST)
    (made_copy / BLOCK).write_bytes((made_copy / BLOCK).read_bytes()[:-1] + b"?")
    report = verify(made_copy)
    assert [(item.file, item.tensor) for item in report.damage] == [
        (MANIFEST, None),
        (BLOCK, "mlp.dense_4h_to_h.bias"),
    ]
    assert report.bytes_read == everything


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_without_either_nothing_can_be_checked(made_copy: Path, harm: Harm) -> None:
    harm(made_copy / MANIFEST)
    harm(made_copy / MANIFEST_BACKUP)
    for check in (verify, find_manifest, recover_manifest):
        with pytest.raises(BloomdeskError, match=rf"{MANIFEST}|{made_copy.name} is not a prepared"):
            check(made_copy)


def test_an_incomplete_directory_without_a_backup_is_no_damage(made_copy: Path) -> None:
    make_incomplete(made_copy)
    (made_copy / MANIFEST_BACKUP).unlink()
    report = verify(made_copy, quick=True)
    assert [item.file for item in report.damage] == [BLOCK]
    assert find_manifest(made_copy) == (load_manifest(made_copy), {})


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
@pytest.mark.parametrize("file", [MANIFEST, MANIFEST_BACKUP])
def test_recovery_makes_both_right(made_copy: Path, file: str, harm: Harm) -> None:
    original = (made_copy / MANIFEST).read_bytes()
    harm(made_copy / file)
    if (made_copy / file).is_dir():  # that is not ours to delete
        with pytest.raises(BloomdeskError, match="cannot be written"):
            recover_manifest(made_copy)
        return
    manifest = recover_manifest(made_copy)
    assert manifest.to_json().encode() == original
    assert (made_copy / MANIFEST).read_bytes() == (made_copy / MANIFEST_BACKUP).read_bytes() == original
    assert verify(made_copy).sound


def test_recovery_leaves_an_incomplete_directory_as_it_is(made_copy: Path) -> None:
    make_incomplete(made_copy)
    (made_copy / MANIFEST_BACKUP).unlink()
    before = sorted(path.name for path in made_copy.iterdir())
    assert recover_manifest(made_copy).missing == (BLOCK,)
    assert sorted(path.name for path in made_copy.iterdir()) == before


def test_a_manifest_in_another_layout_is_put_right_with_its_backup(made_copy: Path) -> None:
    """The same content with other spaces is sound, and the backup is not its copy."""
    original = (made_copy / MANIFEST).read_bytes()
    (made_copy / MANIFEST).write_text(json.dumps(json.loads(original)))
    assert [item.file for item in verify(made_copy, quick=True).damage] == [MANIFEST_BACKUP]
    recover_manifest(made_copy)
    assert (made_copy / MANIFEST).read_bytes() == (made_copy / MANIFEST_BACKUP).read_bytes() == original
