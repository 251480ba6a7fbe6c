"""The second copy of a directory's manifest: 352 GB should not depend on the bytes of one small file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.layout import MANIFEST, MANIFEST_BACKUP
from runner.format.manifest import LARGEST_MANIFEST, Manifest, UnsoundManifest, read_manifest
from runner.format.part_record import PartRecord
from toolkit.io.disk import read_if_exists
from toolkit.parts.destination import write_manifest


def find_manifest(directory: Path) -> tuple[Manifest, dict[str, str]]:
    """The manifest of a prepared directory, and what is wrong with manifest.json or its backup, by file name.

    It is that of manifest.json, or else of the backup, which is written after it and may lag behind. Raises
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
    # While parts are missing, there need be no backup yet.
    if wrong or not manifest.missing or (directory / MANIFEST_BACKUP).exists():
        write_manifest(directory, manifest)
    return manifest


def known_parts(directory: Path, manifest: Manifest) -> dict[str, PartRecord]:
    """The parts that `manifest` records, and those that the backup does.

    Earlier versions removed damaged parts from the first alone. Raises `BloomdeskError` if the two are of different
    checkpoints: the parts are of one of them.
    """
    try:
        backup = read_manifest(directory / MANIFEST_BACKUP)
    except UnsoundManifest:
        return dict(manifest.parts)
    if not _are_of_one_checkpoint(manifest, backup):
        raise BloomdeskError(
            f"{directory}: {MANIFEST} and {MANIFEST_BACKUP} are of different checkpoints",
            "put back the one that belongs to the parts, or delete the other",
        )
    return {**backup.parts, **manifest.parts}


def _are_of_one_checkpoint(manifest: Manifest, backup: Manifest) -> bool:
    """Whether one of the two may be an earlier state of the other.

    A directory without parts may still change its form, dtype and head, and a later version find more ends of text.
    """
    model = replace(backup.model, eos_token_id=manifest.model.eos_token_id)
    if not manifest.parts or not backup.parts:
        mine = manifest.model
        model = replace(model, dtype=mine.dtype, tie_word_embeddings=mine.tie_word_embeddings)
    elif manifest.form != backup.form:
        return False
    both = manifest.parts.keys() & backup.parts.keys()
    return (
        (backup.source, model) == (manifest.source, manifest.model)
        and len(both) == min(len(manifest.parts), len(backup.parts))
        and all(manifest.parts[file].source_tensors == backup.parts[file].source_tensors for file in both)
    )


def _backup_damage(directory: Path, manifest: Manifest) -> str | None:
    backup = directory / MANIFEST_BACKUP
    try:
        copy = read_manifest(backup)
    except UnsoundManifest as error:
        if backup.exists():
            return error.message
        return "it is missing" if not manifest.missing else None
    if not _are_of_one_checkpoint(manifest, copy):
        return f"it is of another checkpoint than {MANIFEST}"
    # An earlier state is none that differs.
    texts = {read_if_exists(path, LARGEST_MANIFEST) for path in (directory / MANIFEST, backup)}
    return f"it differs from {MANIFEST}" if copy == manifest and len(texts) > 1 else None
