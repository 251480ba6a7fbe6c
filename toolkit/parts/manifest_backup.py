"""The second copy of a complete directory's manifest: 352 GB should not hang on the bytes of one small file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.layout import MANIFEST, MANIFEST_BACKUP
from runner.format.manifest import LARGEST_MANIFEST, Manifest, load_manifest
from runner.format.safetensors import read_small
from runner.system.atomic import write_atomically
from toolkit.io.disk import disk_errors


@dataclass(frozen=True)
class FoundManifest:
    """The manifest to go by, and what is wrong with manifest.json or its backup, by file name."""

    manifest: Manifest
    wrong: Mapping[str, str]


def write_backup(directory: Path, manifest: Manifest) -> None:
    """Put the backup beside the manifest, on disk for good; nothing while files are missing from the manifest."""
    if not manifest.missing:
        _put(directory / MANIFEST_BACKUP, manifest.to_json().encode())


def find_manifest(directory: Path) -> FoundManifest:
    """The manifest of a prepared directory, from manifest.json or else from the backup.

    Only a complete directory must have a backup. Raises `BloomdeskError` where neither can be trusted.
    """
    try:
        manifest = load_manifest(directory)
    except BloomdeskError as error:
        try:
            backup = load_manifest(directory, MANIFEST_BACKUP)
        except BloomdeskError:
            raise error from None
        what = error.message if (directory / MANIFEST).exists() else "it is missing"
        return FoundManifest(backup, {MANIFEST: f"{what} ({MANIFEST_BACKUP} is sound)"})
    what = None if manifest.missing else _backup_damage(directory)
    return FoundManifest(manifest, {MANIFEST_BACKUP: what} if what else {})


def recover_manifest(directory: Path) -> Manifest:
    """The manifest of a prepared directory, with manifest.json and its backup both as they should be afterwards.

    Raises `BloomdeskError` where neither can be trusted or the disk does not take them.
    """
    found = find_manifest(directory)
    if found.wrong:
        _put(directory / MANIFEST, found.manifest.to_json().encode())
        write_backup(directory, found.manifest)
    return found.manifest


def _put(path: Path, data: bytes) -> None:
    with disk_errors(path):
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data)


def _backup_damage(directory: Path) -> str | None:
    try:
        same = read_small(directory / MANIFEST_BACKUP, LARGEST_MANIFEST) == read_small(
            directory / MANIFEST, LARGEST_MANIFEST
        )
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None if same else f"it differs from {MANIFEST}"
