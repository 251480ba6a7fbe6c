"""The second copy of a directory's manifest: 352 GB should not depend on the bytes of one small file."""

from __future__ import annotations

from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.layout import MANIFEST, MANIFEST_BACKUP
from runner.format.manifest import Manifest, PartRecord, UnsoundManifest, read_manifest
from toolkit.parts.destination import write_manifest


def find_manifest(directory: Path) -> tuple[Manifest, dict[str, str]]:
    """The manifest of a prepared directory, and what is wrong with manifest.json or its backup, by file name.

    It is that of manifest.json, or else of the backup. While parts are missing, the backup may lag behind. Raises
    `BloomdeskError` if neither can be trusted, or one can't be read.
    """
    try:
        manifest = read_manifest(directory / MANIFEST)
    except UnsoundManifest as error:
        try:
            backup = read_manifest(directory / MANIFEST_BACKUP)
        except UnsoundManifest:
            raise error from None
        what = error.message if (directory / MANIFEST).exists() else "it is missing"
        return backup, {MANIFEST: f"{what} ({MANIFEST_BACKUP} is sound)"}
    what = _backup_damage(directory, manifest)
    return manifest, {MANIFEST_BACKUP: what} if what else {}


def recover_manifest(directory: Path) -> Manifest:
    """The manifest of a prepared directory, after manifest.json and its backup have been put right.

    Raises `BloomdeskError` if neither can be trusted or the disk fails.
    """
    manifest, wrong = find_manifest(directory)
    if wrong:
        write_manifest(directory, manifest)
    return manifest


def refuse_two_checkpoints(directory: Path, manifest: Manifest) -> None:
    """Raise `BloomdeskError` if `manifest` and the backup vouch for different weights: the parts are of one of them."""
    try:
        backup = read_manifest(directory / MANIFEST_BACKUP)
    except UnsoundManifest:
        return
    if backup.fingerprint and manifest.fingerprint and backup.fingerprint != manifest.fingerprint:
        raise BloomdeskError(
            f"{directory}: {MANIFEST} and {MANIFEST_BACKUP} are of different checkpoints",
            "put back the one that belongs to the parts, or delete the other",
        )


def known_parts(directory: Path, manifest: Manifest) -> dict[str, PartRecord]:
    """The parts that `manifest` records, and those that the backup does.

    Earlier versions removed damaged parts from the first alone.
    """
    try:
        backup = read_manifest(directory / MANIFEST_BACKUP)
    except UnsoundManifest:
        return dict(manifest.parts)
    same = (backup.source, backup.model, backup.form) == (manifest.source, manifest.model, manifest.form)
    return {**backup.parts, **manifest.parts} if same else dict(manifest.parts)


def _backup_damage(directory: Path, manifest: Manifest) -> str | None:
    backup, path = directory / MANIFEST_BACKUP, directory / MANIFEST
    try:
        read_manifest(backup)
    except UnsoundManifest as error:
        if backup.exists():
            return error.message
        return "it is missing" if not manifest.missing else None
    differs = not manifest.missing and backup.read_bytes() != path.read_bytes()
    return f"it differs from {MANIFEST}" if differs else None
