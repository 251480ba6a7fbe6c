"""Makes what is damaged or missing in a prepared directory again, and nothing else.

    check every byte ──> forget the damaged parts ──> build what is missing, from the Hub or a checkpoint on disk

Forgetting is all that repair adds: an interrupted repair is an unfinished preparation, which repair, convert and
prepare resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.layout import COMPANIONS, MANIFEST_BACKUP
from runner.format.manifest import Manifest, load_manifest
from runner.system.lock import sole_writer
from toolkit.commands.build import BuildPlan
from toolkit.commands.convert import plan_conversion
from toolkit.commands.prepare import plan_preparation
from toolkit.commands.verify import Damage
from toolkit.hub.transfer import CONNECTIONS
from toolkit.io.disk import disk_errors
from toolkit.parts.destination import write_manifest
from toolkit.parts.manifest_backup import recover_manifest


def plan_repair(
    directory: Path, known: Manifest, source: Path | None, connections: int = CONNECTIONS
) -> BuildPlan:
    """The plan that makes what is missing from the checkpoint `source`, or else from the Hub.

    `known` is what the complete directory records, as `forget` returns it: the source must be the one it names.
    """
    if source is not None:
        return plan_conversion(source, directory, known=known, form=known.form)
    repo, commit = known.source.repo or "", known.source.commit
    return plan_preparation(repo, directory, commit, known.form, connections)


def forget(directory: Path, damage: Sequence[Damage], source: Path | None) -> Manifest:
    """Delete the damaged files and remove their parts from the manifest; what the complete directory records.

    Raises `BloomdeskError` before that if there is nothing to repair from, neither manifest.json nor its backup can
    be trusted, another process writes there, or the disk fails.
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
    """The backup, which keeps the records of parts that an earlier repair has forgotten and not made yet."""
    try:
        backup = load_manifest(directory, MANIFEST_BACKUP)
    except BloomdeskError:
        return manifest
    same = (backup.source, backup.model, backup.form) == (manifest.source, manifest.model, manifest.form)
    return backup if same else manifest
