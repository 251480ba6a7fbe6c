"""A checkpoint's needed files in a directory: planned, fetched one after another, each checked and recorded.

record.py draws the directory; transfer.py fetches a single file.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from runner.errors import BloomdeskError
from runner.system.atomic import TEMPORARY_SUFFIX
from runner.system.disk import free_bytes
from toolkit.hub import revision as hub
from toolkit.hub.failures import offline, offline_error
from toolkit.hub.record import DownloadRecord, load_record, save_record
from toolkit.hub.revision import HubFile, Revision
from toolkit.hub.transfer import CONNECTIONS, Transfer, fetch
from toolkit.io.disk import disk_errors, sole_writer_of
from toolkit.io.progress import Progress, silent

# sound: as it was when it was checked. unchecked: in place with the right size, to be hashed first.
# partial: its first bytes have arrived. absent: no file, or one of another size in its place.
State = Literal["sound", "unchecked", "partial", "absent"]


@dataclass(frozen=True)
class PlannedFile:
    """A needed file, its state, and how many of its bytes are `present`."""

    file: HubFile
    state: State
    present: int

    @property
    def to_fetch(self) -> int:
        return self.file.size - self.present


@dataclass(frozen=True)
class DownloadPlan:
    """What a download would do now. `free` is what the disk has; all figures are bytes."""

    revision: Revision
    directory: Path
    files: tuple[PlannedFile, ...]
    free: int

    @property
    def to_fetch(self) -> int:
        return sum(planned.to_fetch for planned in self.files)

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
        return tuple(planned.file for planned in self.files if planned.state in ("partial", "absent"))


@dataclass(frozen=True)
class DownloadSummary:
    """What a download did; `received` are bytes over the network, `resumed` those that earlier runs left."""

    revision: Revision
    fetched: tuple[str, ...]
    kept: tuple[str, ...]
    received: int
    resumed: int


def plan_download(repo: str, directory: Path, revision: str | None = None) -> DownloadPlan:
    """What `download` would fetch into `directory`, which need not exist; nothing is written or hashed.

    Raises `BloomdeskError` if the Hub does not give the list, or the directory is another download's.
    """
    record = load_record(directory)
    with disk_errors(directory):
        return _plan(_choose(repo, directory, revision, record), directory, record)


def download(
    repo: str,
    directory: Path,
    revision: str | None = None,
    progress: Progress = silent,
    connections: int = CONNECTIONS,
) -> DownloadSummary:
    """Fetch the needed files of `repo`, or resume that: `plan_download` and `carry_out` in one."""
    return carry_out(plan_download(repo, directory, revision), progress, connections)


def carry_out(
    plan: DownloadPlan, progress: Progress = silent, connections: int = CONNECTIONS
) -> DownloadSummary:
    """Fetch what is missing into the plan's directory, until every needed file is in place with the right hash.

    The directory is inspected again; the Hub is asked only for files. `progress` is called for the files that are
    hashed because no record has them, and for those fetched, each over up to `connections` connections.

    Raises `BloomdeskError` if the Hub or the disk fails, if a file is not what was expected, or if the directory is
    another download's or another process writes there.
    """
    chosen, directory = plan.revision, plan.directory
    _refuse_impossible(plan)
    with disk_errors(directory), sole_writer_of(directory):
        earlier = load_record(directory)
        if earlier is not None and (earlier.repo, earlier.commit) != (chosen.repo, chosen.commit):
            raise _another(directory, earlier, str(chosen))
        now = _plan(chosen, directory, earlier)
        left, record = _check_present(now, DownloadRecord.of(chosen, earlier), progress)
        _refuse_impossible(left)
        if record != earlier:
            save_record(directory, record)
        transfers: dict[str, Transfer] = {}
        for file in left.unfinished:
            transfers[file.path], record = fetch_recorded(
                chosen, file, directory, record, progress, connections
            )
        missing = record.missing_in(directory)
        if missing:
            raise BloomdeskError(
                f"{directory}: {missing[0]} changed or vanished while the download ran",
                "leave the directory alone and run the same command again",
            )
    kept = tuple(file.path for file in chosen.files if file.path not in transfers)
    received = sum(transfer.received for transfer in transfers.values())
    resumed = sum(transfer.resumed for transfer in transfers.values())
    return DownloadSummary(chosen, tuple(transfers), kept, received, resumed)


def fetch_recorded(
    revision: Revision,
    file: HubFile,
    directory: Path,
    record: DownloadRecord,
    progress: Progress,
    connections: int,
) -> tuple[Transfer, DownloadRecord]:
    """The transfer of a file that is then in place, and the saved record that has it; raises as `fetch` does."""
    transfer = fetch(revision, file, directory, progress, connections)
    modified = (directory / file.path).stat().st_mtime_ns
    record = record.with_file(file.path, transfer.sha256, modified)
    save_record(directory, record)
    return transfer, record


def read_small_file(revision: Revision, file: HubFile, scratch: Path, directory: Path) -> bytes:
    """A small file's checked bytes, from `directory` if it is sound there, else from the Hub; a copy is in `scratch`.

    It is never fetched into `directory`: a plan writes nothing, and the directory may turn out to be another's.
    """
    copy, path = scratch / file.path, directory / file.path
    if not copy.exists():
        if _size(path) == file.size and file.check(path, silent):
            copy.write_bytes(path.read_bytes())
        else:
            fetch(revision, file, scratch, silent)
    return copy.read_bytes()


def _choose(repo: str, directory: Path, revision: str | None, record: DownloadRecord | None) -> Revision:
    """The revision with only its needed files; `BloomdeskError` if the directory belongs to another download."""
    hub.check_repo_name(repo)
    if record is not None and record.repo != repo:
        raise _another(directory, record, repo)
    recorded = record is not None and revision in (None, record.commit)
    if recorded and offline() and hub.pinned(repo, revision) is None:
        return record.revision
    found = hub.resolve(repo, revision)
    if record is not None and record.commit != found.commit:
        raise _another(directory, record, str(found))
    with tempfile.TemporaryDirectory(prefix="bloomdesk-") as scratch:
        return hub.needed(found, lambda index: read_small_file(found, index, Path(scratch), directory))


def _another(directory: Path, record: DownloadRecord, wanted: str) -> BloomdeskError:
    return BloomdeskError(
        f"{directory} holds a download of {record.repo} at {record.commit[:12]}, not of {wanted}",
        f"choose another directory, or resume that download: --revision {record.commit}",
    )


def _plan(revision: Revision, directory: Path, record: DownloadRecord | None) -> DownloadPlan:
    """What is in the directory now."""
    known = DownloadRecord.of(revision, record)
    files = []
    for file in revision.files:
        path, state, present = directory / file.path, "absent", 0
        partial = _size(path.with_name(path.name + TEMPORARY_SUFFIX))
        if known.files[file.path].sound_in(directory):
            state, present = "sound", file.size
        elif _size(path) == file.size:
            state, present = "unchecked", file.size
        elif 0 < partial <= file.size:
            state, present = "partial", partial
        files.append(PlannedFile(file, state, present))
    return DownloadPlan(revision, directory, tuple(files), free_bytes(directory))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _check_present(
    plan: DownloadPlan, record: DownloadRecord, progress: Progress
) -> tuple[DownloadPlan, DownloadRecord]:
    """The plan without unchecked files whose hash is wrong, and the record with those whose hash is right."""
    files = []
    for planned in plan.files:
        file, path = planned.file, plan.directory / planned.file.path
        if planned.state == "unchecked":
            # Taken first, so that a change while the file is read shows.
            modified = path.stat().st_mtime_ns
            sha256 = file.check(path, progress)
            if sha256 is None:
                planned = PlannedFile(file, "absent", 0)
            else:
                record = record.with_file(file.path, sha256, modified)
        files.append(planned)
    return replace(plan, files=tuple(files)), record


def _refuse_impossible(plan: DownloadPlan) -> None:
    """Raise `BloomdeskError` if files are missing and offline mode is on, or the disk is too small."""
    unfinished = plan.unfinished
    if unfinished and offline():
        count = f"{len(unfinished)} of {len(plan.files)} files of {plan.revision} are missing"
        raise offline_error(f"{plan.directory}: {count} ({unfinished[0].path} first)")
    if not plan.fits:
        raise BloomdeskError(
            f"{plan.directory}: {plan.to_fetch:,} bytes are still to come, the disk has {plan.free:,} free",
            f"free {plan.to_fetch - plan.free:,} bytes more, or choose a directory on another disk",
        )
