"""Makes what is damaged or missing in a prepared directory again, and nothing else.

    check every byte ──> forget the damaged parts ──> convert or prepare what is missing

Forgetting is all that repair adds: an interrupted repair is an unfinished preparation, which any of the three goes
on with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.layout import COMPANIONS, MANIFEST_BACKUP
from runner.format.manifest import Manifest, load_manifest
from runner.system.lock import sole_writer
from toolkit.commands import convert, prepare
from toolkit.commands.convert import ConversionPlan
from toolkit.commands.prepare import PreparationPlan
from toolkit.commands.verify import Damage
from toolkit.io.disk import disk_errors
from toolkit.parts.destination import write_manifest
from toolkit.parts.manifest_backup import recover_manifest


def forget(directory: Path, damage: Sequence[Damage], source: Path | None) -> Manifest:
    """Delete the damaged files and take the parts among them out of the manifest: what a whole directory records.

    Raises `BloomdeskError` before that where there is nothing to repair from, or neither manifest.json nor its
    backup can be trusted, another process writes there, or the disk fails.
    """
    damaged = {item.file for item in damage}
    with sole_writer(directory):
        manifest = recover_manifest(directory)
        if source is None and manifest.source.repo is None:
            raise BloomdeskError(
                f"{directory} was made from a checkpoint on disk, so the Hub can't repair it",
                f"give that checkpoint: bloomdesk repair {directory} --source SRC",
            )
        known = _whole(directory, manifest)
        left = {file: record for file, record in manifest.parts.items() if file not in damaged}
        if left != manifest.parts:
            write_manifest(directory, replace(manifest, parts=left))
        for file in damaged & {*known.parts, *COMPANIONS}:
            with disk_errors(directory / file):
                (directory / file).unlink(missing_ok=True)
    return known


def _whole(directory: Path, manifest: Manifest) -> Manifest:
    """The backup, which keeps what was recorded of parts that a repair has forgotten and not made yet."""
    try:
        backup = load_manifest(directory, MANIFEST_BACKUP)
    except BloomdeskError:
        return manifest
    same = (backup.source, backup.model, backup.form) == (manifest.source, manifest.model, manifest.form)
    return backup if same else manifest


def plan_from_source(directory: Path, source: Path, known: Manifest) -> ConversionPlan:
    """Make what is missing from a checkpoint on disk, whose shards must be those that `known` names."""
    return convert.plan_conversion(source, directory, known=known, form=known.form)


def plan_from_hub(directory: Path, known: Manifest) -> PreparationPlan:
    """Make what is missing from the repo and commit that the directory came from."""
    source = known.source
    return prepare.plan_preparation(source.repo or "", directory, source.commit, known.form)
