"""Makes what is damaged or missing in a prepared directory again, and nothing else.

    lock ──> check every byte ──> plan ──> for each damaged part: made beside it ──> as recorded? ──> replaces it

Nothing is deleted, and the manifest stays as it is: an interrupted repair leaves a directory with less damage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from runner.errors import BloomdeskError, in_shell
from runner.format.layout import MANIFEST, MANIFEST_BACKUP
from runner.format.manifest import Manifest
from runner.format.part_record import PartRecord
from runner.system.lock import sole_writer
from toolkit.commands.build import BuildPlan, build
from toolkit.commands.convert import plan_conversion
from toolkit.commands.prepare import plan_preparation
from toolkit.commands.verify import VerifyReport, plan_verify, refuse_download
from toolkit.commands.verify import carry_out as check
from toolkit.hub.line import Line
from toolkit.hub.transfer import CONNECTIONS
from toolkit.io.progress import Work, silent_work
from toolkit.parts.manifest_backup import find_manifest, known_parts, recover_manifest


@dataclass(frozen=True)
class Repaired:
    """What a repair did: what the check had found, and the files that were made again.

    `manifest` is the directory's afterwards; it is not complete if the directory was not before.
    """

    report: VerifyReport
    manifest: Manifest
    parts: tuple[str, ...]
    small_files: tuple[str, ...]


def repair(
    directory: Path,
    source: Path | None = None,
    connections: int = CONNECTIONS,
    line: Line | None = None,
    *,
    adapter: Path | None = None,
    work: Work = silent_work,
    found: Callable[[VerifyReport], None] = lambda report: None,
) -> Repaired:
    """Check every byte, and mend what is damaged from the checkpoint `source`, or else from the Hub.

    `adapter` is that which was merged when the directory was made, if one was. `found` gets what the check says before
    anything is mended. Parts that were never made are left to the command that makes the directory.

    Raises `BloomdeskError` if another process writes there, neither manifest.json nor its backup can be trusted, there
    is nothing to mend from, the source has other tensors than are recorded, the disk fails, or files can't be read,
    after all others were mended.
    """
    refuse_download(directory)
    # Without a manifest there is nothing to lock for.
    find_manifest(directory)
    with sole_writer(directory):
        manifest, _ = find_manifest(directory)
        known = known_parts(directory, manifest)
        mendable = source is not None or manifest.source.repo is not None
        if not mendable:
            # Seconds, before hours are spent on finding what can't be mended.
            _refuse_unmendable(check(plan_verify(directory, quick=True)), manifest, known)
        plan = plan_verify(directory)
        with work("verifying", plan.bytes_to_read) as progress:
            report = check(plan, progress)
        found(report)
        if not mendable:
            _refuse_unmendable(report, manifest, known)
        manifest = recover_manifest(directory)
        # What was not read whole is not replaced, even if a part of it is wrong.
        files = {item.file for item in report.damage} - {item.file for item in report.unchecked}
        parts = tuple(file for file in known if file in files)
        if parts or files & manifest.companions.keys():
            mending = _plan(directory, manifest, frozenset(parts), source, connections, line, adapter)
            small = {name: data for name, data in mending.companions.items() if name in files}
            mending = replace(mending, companions=small, is_repair=True)
            with work("repairing", mending.work) as progress:
                build(mending, progress)
        if report.unchecked:
            first = report.unchecked[0]
            raise BloomdeskError(
                f"{directory / first.file}: {first.what}; so it was not replaced ({len(report.unchecked)} such files)",
                f"bloomdesk verify {in_shell(directory)} says what to do",
            )
        small_files = files & {MANIFEST, MANIFEST_BACKUP, *manifest.companions}
        return Repaired(report, manifest, parts, tuple(small_files))


def _refuse_unmendable(report: VerifyReport, manifest: Manifest, known: Mapping[str, PartRecord]) -> None:
    """Raise `BloomdeskError` if a file is damaged that only the source has; the manifest has a backup."""
    for item in report.damage:
        if item.file in known or item.file in manifest.companions:
            raise BloomdeskError(
                f"{report.directory / item.file}: {item.what}; the directory was made from a checkpoint on disk, "
                "so the Hub can't repair it",
                f"give that checkpoint: bloomdesk repair {in_shell(report.directory)} --source SRC",
            )


def _plan(
    directory: Path,
    manifest: Manifest,
    damaged: frozenset[str],
    source: Path | None,
    connections: int,
    line: Line | None,
    adapter: Path | None,
) -> BuildPlan:
    """The plan that makes the `damaged` parts again from the checkpoint `source`, or else from the Hub."""
    if source is not None:
        return plan_conversion(source, directory, form=manifest.form, adapter=adapter, mend=damaged)
    origin = manifest.source
    return plan_preparation(
        origin.repo or "", directory, origin.commit, manifest.form, connections, mend=damaged, line=line
    )
