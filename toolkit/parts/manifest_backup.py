"""The second copy of a complete directory's manifest: 352 GB should not depend on the bytes of one small file."""

from __future__ import annotations

from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.layout import MANIFEST, MANIFEST_BACKUP
from runner.format.manifest import LARGEST_MANIFEST, Manifest, load_manifest
from runner.format.safetensors import read_small
from toolkit.parts.destination import put_file


def write_backup(directory: Path, manifest: Manifest) -> None:
    """Write the backup atomically, unless the manifest still lacks files."""
    if not manifest.missing:
        put_file(directory / MANIFEST_BACKUP, manifest.to_json().encode())


def find_manifest(directory: Path) -> tuple[Manifest, dict[str, str]]:
    """The manifest of a prepared directory, and what is wrong with manifest.json or its backup, by file name.

    It is that of manifest.json, or else of the backup. Only a complete directory must have a backup. Raises
    `BloomdeskError` if neither can be trusted.
    """
    try:
        manifest = load_manifest(directory)
    except BloomdeskError as error:
        try:
            backup = load_manifest(directory, MANIFEST_BACKUP)
        except BloomdeskError:
            raise error from None
        what = error.message if (directory / MANIFEST).exists() else "it is missing"
        return backup, {MANIFEST: f"{what} ({MANIFEST_BACKUP} is sound)"}
    what = None if manifest.missing else _backup_damage(directory)
    return manifest, {MANIFEST_BACKUP: what} if what else {}


def recover_manifest(directory: Path) -> Manifest:
    """The manifest of a prepared directory, after manifest.json and its backup have been put right.

    Raises `BloomdeskError` if neither can be trusted or the disk fails.
    """
    manifest, wrong = find_manifest(directory)
    if wrong:
        put_file(directory / MANIFEST, manifest.to_json().encode())
        write_backup(directory, manifest)
    return manifest


def _backup_damage(directory: Path) -> str | None:
    try:
        backup, manifest = (
            read_small(directory / name, LARGEST_MANIFEST) for name in (MANIFEST_BACKUP, MANIFEST)
        )
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None if backup == manifest else f"it differs from {MANIFEST}"
