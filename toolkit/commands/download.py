"""A checkpoint's needed files in a directory: planned, fetched one after another, each checked and recorded.

    lock ──> look ──> hash what no record vouches for ──> refuse what is foreign ──> set aside, drop ──> fetch, record

record.py draws the directory; place.py says whose a file is; transfer.py fetches a single one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from runner.errors import BloomdeskError
from runner.format.layout import MANIFEST, MANIFEST_BACKUP
from runner.format.manifest import FORMAT, LARGEST_MANIFEST
from runner.system.atomic import TEMPORARY_SUFFIX
from runner.system.disk import free_bytes
from toolkit.hub import revision as hub
from toolkit.hub.failures import offline, offline_error
from toolkit.hub.hub_cache import cached_file
from toolkit.hub.line import Line
from toolkit.hub.place import MOVE, Finding, check, look, set_aside, state_of_file, whose
from toolkit.hub.record import DownloadRecord, load_record, save_record
from toolkit.hub.revision import HubFile, Revision
from toolkit.hub.transfer import CONNECTIONS, Transfer, fetch, fetch_bytes
from toolkit.io.disk import disk_errors, read_if_exists, require_large_files, sole_writer_of
from toolkit.io.progress import Progress, silent
from toolkit.parts.export_record import EXPORT_RECORD

# What was found out by reading files is recorded after so long.
SECONDS_OF_HASHING = 5.0
# A file's place, by place.py, and "partial": no file yet, or one that makes way, and the first bytes have arrived.
State = Finding | Literal["partial"]


@dataclass(frozen=True)
class PlannedFile:
    """A needed file, its state, and how many of its bytes are `present`; the rest may be in the Hub's cache."""

    file: HubFile
    state: State
    present: int
    is_cached: bool = False

    @property
    def to_fetch(self) -> int:
        return self.file.size - self.present


@dataclass(frozen=True)
class DownloadPlan:
    """What a download would do now. `free` is what the disk has; all figures are bytes.

    With `everything`, files are hashed that size and date vouch for.
    """

    revision: Revision
    directory: Path
    files: tuple[PlannedFile, ...]
    free: int
    everything: bool = False

    @property
    def to_fetch(self) -> int:
        return sum(planned.to_fetch for planned in self.files)

    @property
    def to_copy(self) -> int:
        """Those of `to_fetch` that the Hub's cache has."""
        return sum(planned.to_fetch for planned in self.files if planned.is_cached)

    @property
    def work(self) -> int:
        """Bytes that progress counts in all: of files to be fetched, and of unchecked ones, which are hashed."""
        return sum(planned.file.size for planned in self.files if planned.state != "sound")

    @property
    def fits(self) -> bool:
        return self.to_fetch <= self.free

    @property
    def unfinished(self) -> tuple[HubFile, ...]:
        """Files that are not in place, in the order in which they are fetched."""
        return tuple(planned.file for planned in self.files if planned.state not in ("sound", "unchecked"))

    def names(self, state: State) -> tuple[str, ...]:
        """The files that are in this state."""
        return tuple(planned.file.path for planned in self.files if planned.state == state)


@dataclass(frozen=True)
class DownloadSummary:
    """What a download did; `received` are bytes over the network, `resumed` those that earlier runs left.

    Of the `kept` files, the `hashed` ones were read in this run, the others have the size and date that they had when
    an earlier run checked them. `dropped` ones were damaged. `set_aside` has the new paths of files that had changed.
    `cached` are bytes that were copied from the Hub's cache.
    """

    revision: Revision
    fetched: tuple[str, ...]
    kept: tuple[str, ...]
    received: int
    resumed: int
    hashed: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    set_aside: tuple[Path, ...] = ()
    cached: int = 0


def plan_download(
    repo: str,
    directory: Path,
    revision: str | None = None,
    line: Line | None = None,
    *,
    everything: bool = False,
) -> DownloadPlan:
    """What `download` would fetch into `directory`, which need not exist; nothing is written or hashed.

    Raises `BloomdeskError` if the Hub does not give the list, the directory is another download's or no download's, or
    something that is no file is in the place of one.
    """
    _refuse_prepared(directory)
    record = load_record(directory)
    with disk_errors(directory):
        return _plan(_choose(repo, directory, revision, record, line), directory, record, everything)


def download(
    repo: str,
    directory: Path,
    revision: str | None = None,
    progress: Progress = silent,
    connections: int = CONNECTIONS,
    line: Line | None = None,
    *,
    everything: bool = False,
) -> DownloadSummary:
    """Fetch the needed files of `repo`, or resume that: `plan_download` and `carry_out` in one."""
    line = line or Line()
    plan = plan_download(repo, directory, revision, line, everything=everything)
    return carry_out(plan, progress, connections, line)


def carry_out(
    plan: DownloadPlan,
    progress: Progress = silent,
    connections: int = CONNECTIONS,
    line: Line | None = None,
) -> DownloadSummary:
    """Fetch what is missing into the plan's directory, until every needed file is in place with the right hash.

    The directory is inspected again; the Hub is asked only for files, each over up to `connections` connections of
    `line`. `progress` is called for files that are hashed because no record vouches for them, and for those fetched.

    Raises `BloomdeskError` if the Hub or the disk fails, if a file is not what was expected, or if the directory is
    another download's, another process writes there, or a file is in the way that is not from this download.
    """
    chosen, directory, line = plan.revision, plan.directory, line or Line()
    _refuse_impossible(plan)
    with disk_errors(directory), sole_writer_of(directory):
        _refuse_prepared(directory)
        earlier = load_record(directory)
        if earlier is not None and (earlier.repo, earlier.commit) != (chosen.repo, chosen.commit):
            raise _another(directory, earlier, str(chosen))
        now = _plan(chosen, directory, earlier, plan.everything)
        # Whatever its hash would be.
        _refuse_foreign(directory, str(chosen), now.names("foreign"))
        left, record = _check_present(now, DownloadRecord.of(chosen, earlier), progress)
        _refuse_foreign(directory, str(chosen), left.names("foreign"))
        _refuse_impossible(left)
        aside = tuple(set_aside(directory / name) for name in left.names("changed"))
        if record != earlier:
            save_record(directory, record)
        transfers: dict[str, Transfer] = {}
        for file in left.unfinished:
            transfers[file.path], record = fetch_recorded(
                chosen, file, directory, record, progress, connections, line
            )
        missing = record.missing_in(directory)
        if missing:
            raise BloomdeskError(
                f"{directory}: {missing[0]} changed or vanished while the download ran",
                "leave the directory alone and run the same command again",
            )
    return DownloadSummary(
        chosen,
        tuple(transfers),
        kept=tuple(file.path for file in chosen.files if file.path not in transfers),
        received=sum(transfer.received for transfer in transfers.values()),
        resumed=sum(transfer.resumed for transfer in transfers.values()),
        hashed=tuple(name for name in now.names("unchecked") if name not in transfers),
        dropped=left.names("decayed"),
        set_aside=aside,
        cached=sum(transfer.cached for transfer in transfers.values()),
    )


def fetch_recorded(
    revision: Revision,
    file: HubFile,
    directory: Path,
    record: DownloadRecord,
    progress: Progress,
    connections: int,
    line: Line,
) -> tuple[Transfer, DownloadRecord]:
    """The transfer of a file that is then in place, and the saved record that has it; raises as `fetch` does."""
    transfer = fetch(revision, file, directory, progress, connections, line)
    modified = (directory / file.path).stat().st_mtime_ns
    record = record.with_file(file.path, transfer.sha256, modified)
    save_record(directory, record)
    return transfer, record


def read_small_file(revision: Revision, file: HubFile, directory: Path, line: Line | None = None) -> bytes:
    """A small file's checked bytes, from `directory` if it is sound there, else from the Hub.

    Nothing is written: a plan writes nothing, and the directory may turn out to be another's.
    """
    found = state_of_file(directory / file.path)
    if found is not None and found.st_size == file.size:
        data, digest = read_if_exists(directory / file.path, file.size) or b"", file.digest()
        digest.update(data)
        if not file.difference(digest):
            return data
    return fetch_bytes(revision, file, line)


def _choose(
    repo: str, directory: Path, revision: str | None, record: DownloadRecord | None, line: Line | None
) -> Revision:
    """The revision with only its needed files; `BloomdeskError` if the directory belongs to another download."""
    hub.check_repo_name(repo)
    if record is not None and record.repo != repo:
        raise _another(directory, record, repo)
    recorded = record is not None and revision in (None, record.commit)
    if recorded and offline() and hub.pinned(repo, revision) is None:
        return record.revision
    found = hub.resolve(repo, revision, line)
    if record is not None and record.commit != found.commit:
        raise _another(directory, record, str(found))
    return hub.needed(found, lambda index: read_small_file(found, index, directory, line))


def _another(directory: Path, record: DownloadRecord, wanted: str) -> BloomdeskError:
    return BloomdeskError(
        f"{directory} holds a download of {record.repo} at {record.commit[:12]}, not of {wanted}",
        f"choose another directory, or resume that download: --revision {record.commit}",
    )


def _plan(
    revision: Revision, directory: Path, record: DownloadRecord | None, everything: bool
) -> DownloadPlan:
    """What is in the directory now."""
    known = DownloadRecord.of(revision, record)
    files = []
    for file in revision.files:
        state: State = look(directory, known.files[file.path], everything=everything)
        present = file.size
        if state not in ("sound", "unchecked"):
            present = bytes_begun(directory, file, recorded=record is not None)
            state = "partial" if state == "absent" and present else state
        is_cached = present < file.size and cached_file(revision, file) is not None
        files.append(PlannedFile(file, state, present, is_cached))
    return DownloadPlan(revision, directory, tuple(files), free_bytes(directory), everything)


def bytes_begun(directory: Path, file: HubFile, *, recorded: bool) -> int:
    """Bytes of a file's beginning that an earlier run has left, which has written its record first.

    Raises `BloomdeskError` if something is there that no run of this program has begun.
    """
    path = directory / (file.path + TEMPORARY_SUFFIX)
    # A link is replaced.
    found = None if path.is_symlink() else state_of_file(path)
    if found is not None and found.st_size and not recorded:
        raise BloomdeskError(
            f"{path} is in the way, and there is no record that this program has begun it",
            "move it out of the directory, and run the same command again",
        )
    return found.st_size if found is not None and found.st_size <= file.size else 0


def _check_present(
    plan: DownloadPlan, record: DownloadRecord, progress: Progress
) -> tuple[DownloadPlan, DownloadRecord]:
    """The plan after every unchecked file has been hashed, and the record with those whose content is right."""
    files, saved = [], time.monotonic()
    for planned in plan.files:
        if planned.state == "unchecked":
            known = record.files[planned.file.path]
            found = check(plan.directory, known, progress)
            if found is None:
                begun = bytes_begun(plan.directory, planned.file, recorded=True)
                planned = PlannedFile(planned.file, whose(plan.directory, known), begun)
            else:
                record = record.with_file(known.path, *found)
                if time.monotonic() - saved > SECONDS_OF_HASHING:
                    # An interruption loses no more than that.
                    save_record(plan.directory, record)
                    saved = time.monotonic()
        files.append(planned)
    return replace(plan, files=tuple(files)), record


def _refuse_prepared(directory: Path) -> None:
    """Raise `BloomdeskError` if a prepared directory was given, or what is no directory."""
    if os.path.lexists(directory) and not directory.is_dir():
        raise BloomdeskError(f"{directory} is not a directory", "give a new directory to write to")
    for name in (MANIFEST, MANIFEST_BACKUP):
        data = read_if_exists(directory / name, LARGEST_MANIFEST)
        if data is not None and not _is_of_others(data):
            raise BloomdeskError(
                f"{directory} is a prepared directory ({name}), and a download has no place in it",
                "choose another directory",
            )
    if (directory / EXPORT_RECORD).exists():
        raise BloomdeskError(
            f"{directory} is an export ({EXPORT_RECORD}), and a download has no place in it",
            "choose another directory",
        )


def _is_of_others(data: bytes) -> bool:
    """Whether a manifest.json is another program's: sound, and not of our format."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return not isinstance(body, dict) or body.get("format") != FORMAT


def _refuse_foreign(directory: Path, wanted: str, names: Sequence[str]) -> None:
    """Raise `BloomdeskError` if there are files of other content that this program did not put there."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        them, files = ("them", "files that are") if len(names) > 1 else ("it", "a file that is")
        raise BloomdeskError(
            f"{directory} has {files} not of {wanted}, nor from this program: {', '.join(names[:3])}{more}",
            MOVE.replace("it", them, 1),
        )


def _refuse_impossible(plan: DownloadPlan) -> None:
    """Raise `BloomdeskError` if files are missing and offline mode is on, or the disk is too small."""
    cached = {planned.file.path for planned in plan.files if planned.is_cached}
    unfinished = tuple(file for file in plan.unfinished if file.path not in cached)
    if unfinished and offline():
        count = f"{len(unfinished)} of {len(plan.files)} files of {plan.revision} are missing"
        raise offline_error(f"{plan.directory}: {count} ({unfinished[0].path} first)")
    require_large_files(plan.directory, {file.path: file.size for file in plan.unfinished})
    if not plan.fits:
        raise BloomdeskError(
            f"{plan.directory}: {plan.to_fetch:,} bytes are still to come, the disk has {plan.free:,} free",
            f"free {plan.to_fetch - plan.free:,} bytes more, or choose a directory on another disk",
        )
