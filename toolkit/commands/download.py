"""A checkpoint's needed files in a directory: planned, fetched one after another, each checked and recorded.

The directory is drawn in record.py, the way of a single file in transfer.py.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runner.errors import BloomdeskError
from runner.system.atomic import TEMPORARY_SUFFIX
from runner.system.disk import free_bytes
from runner.system.lock import sole_writer
from toolkit.hub import client as wire
from toolkit.hub import revision as hub
from toolkit.hub.digest import hash_file
from toolkit.hub.record import DownloadRecord, load_record, save_record
from toolkit.hub.revision import HubFile, Revision
from toolkit.hub.transfer import CONNECTIONS, Transfer, fetch
from toolkit.io.disk import disk_errors
from toolkit.io.progress import Progress, silent

# sound: as it was when it was checked. unchecked: in place with the right size, to be hashed first.
# partial: some of it has come. absent: nothing of it, or a file of another size in its place.
State = Literal["sound", "unchecked", "partial", "absent"]


@dataclass(frozen=True)
class PlannedFile:
    """A needed file, and how much of it is there; `present` and `to_fetch` are bytes."""

    file: HubFile
    state: State
    present: int

    @property
    def to_fetch(self) -> int:
        return self.file.size - self.present


@dataclass(frozen=True)
class Plan:
    """What a download would do now. `free` is what the disk has; all figures are bytes."""

    revision: Revision
    directory: Path
    files: tuple[PlannedFile, ...]
    free: int

    @property
    def total(self) -> int:
        return self.revision.total

    @property
    def to_fetch(self) -> int:
        return sum(planned.to_fetch for planned in self.files)

    @property
    def work(self) -> int:
        """Bytes of which the download's progress tells: those to be fetched, and those there to be hashed."""
        return sum(planned.file.size for planned in self.files if planned.state != "sound")

    @property
    def fits(self) -> bool:
        return self.to_fetch <= self.free

    @property
    def unfinished(self) -> tuple[HubFile, ...]:
        """Files that are not in place, in the order in which they come."""
        return tuple(planned.file for planned in self.files if planned.state in ("partial", "absent"))


@dataclass(frozen=True)
class Download:
    """What a download did. `received` is bytes over the network, `resumed` what earlier runs left."""

    revision: Revision
    directory: Path
    fetched: tuple[str, ...]
    kept: tuple[str, ...]
    received: int
    resumed: int


def plan_download(repo: str, directory: Path, revision: str | None = None) -> Plan:
    """What `download` would fetch into `directory`, which need not exist; nothing is written or hashed.

    Raises `BloomdeskError` where the Hub does not give the list, or the directory is another download's.
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
) -> Download:
    """`plan_download` and `carry_out` in one."""
    return carry_out(plan_download(repo, directory, revision), progress, connections)


def carry_out(plan: Plan, progress: Progress = silent, connections: int = CONNECTIONS) -> Download:
    """Bring what is needed of a BLOOM repository into the plan's directory; to run it again is to go on.

    It returns only when every needed file is in place and its hash was checked. What is there is looked at
    anew; the Hub is asked only for files. `progress` hears of the files that are hashed because nothing is
    recorded of them, and of those that come, each over up to `connections` connections at a time.

    Raises `BloomdeskError` where the Hub or the disk fails, where a file is not what was expected, or where
    the directory is another download's or another process is writing there.
    """
    directory = plan.directory
    with disk_errors(directory):
        _refuse_impossible(_plan(plan.revision, directory, load_record(directory)))
        directory.mkdir(parents=True, exist_ok=True)
        with sole_writer(directory):
            return _bring(plan.revision, directory, progress, connections)


def _bring(chosen: Revision, directory: Path, progress: Progress, connections: int) -> Download:
    earlier = load_record(directory)
    if earlier is not None and (earlier.repo, earlier.commit) != (chosen.repo, chosen.commit):
        raise _another(directory, earlier, str(chosen))
    record, refuted = _check_present(chosen, directory, earlier, progress)
    plan = _plan(chosen, directory, record, refuted)
    _refuse_impossible(plan)
    if record != earlier:
        save_record(directory, record)
    transfers: dict[str, Transfer] = {}
    for file in plan.unfinished:
        transfer = fetch(chosen, file, directory, progress, connections)
        modified = (directory / file.path).stat().st_mtime_ns
        record = record.with_file(file.path, transfer.sha256, modified)
        save_record(directory, record)
        transfers[file.path] = transfer
    missing = record.missing_in(directory)
    if missing:
        raise BloomdeskError(
            f"{directory}: {missing[0]} changed or vanished while the download ran",
            "leave the directory alone and run the same command again",
        )
    kept = tuple(file.path for file in chosen.files if file.path not in transfers)
    received = sum(transfer.received for transfer in transfers.values())
    resumed = sum(transfer.resumed for transfer in transfers.values())
    return Download(chosen, directory, tuple(transfers), kept, received, resumed)


def _choose(repo: str, directory: Path, revision: str | None, record: DownloadRecord | None) -> Revision:
    """The revision with just its needed files; refuses a directory that belongs to another download."""
    hub.check_repo_name(repo)
    if record is not None and record.repo != repo:
        raise _another(directory, record, repo)
    chosen = hub.pinned(repo, revision)
    if chosen is None and record is not None and wire.offline() and revision in (None, record.commit):
        chosen = record.revision
    if chosen is None:
        found = hub.resolve(repo, revision)
        if record is not None and record.commit != found.commit:
            raise _another(directory, record, str(found))
        chosen = hub.needed(found, lambda index: _read_checked(found, index, directory))
    if record is not None and record.commit != chosen.commit:
        raise _another(directory, record, str(chosen))
    return chosen


def _another(directory: Path, record: DownloadRecord, wanted: str) -> BloomdeskError:
    return BloomdeskError(
        f"{directory} holds a download of {record.repo} at {record.commit[:12]}, not of {wanted}",
        f"choose another directory, or go on with that one: --revision {record.commit}",
    )


def _read_checked(revision: Revision, file: HubFile, directory: Path) -> bytes:
    """The bytes of a small file: from the directory where it is there and sound, else from the Hub."""
    path = directory / file.path
    if path.is_file() and path.stat().st_size == file.size and not hash_file(path, file, silent).difference():
        return path.read_bytes()
    # Not into the directory: a plan writes nothing, and the directory may yet turn out to be another's.
    with tempfile.TemporaryDirectory(prefix="bloomdesk-") as scratch:
        fetch(revision, file, Path(scratch), silent)
        return (Path(scratch) / file.path).read_bytes()


def _plan(
    revision: Revision, directory: Path, record: DownloadRecord | None, refuted: frozenset[str] = frozenset()
) -> Plan:
    known = DownloadRecord.of(revision, record)
    files = tuple(_look(file, directory, known, file.path in refuted) for file in revision.files)
    return Plan(revision, directory, files, free_bytes(directory))


def _look(file: HubFile, directory: Path, record: DownloadRecord, refuted: bool) -> PlannedFile:
    path = directory / file.path
    if record.files[file.path].sound_in(directory):
        return PlannedFile(file, "sound", file.size)
    if _size(path) == file.size and not refuted:
        return PlannedFile(file, "unchecked", file.size)
    begun = _size(path.with_name(path.name + TEMPORARY_SUFFIX))
    if 0 < begun <= file.size:
        return PlannedFile(file, "partial", begun)
    return PlannedFile(file, "absent", 0)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _check_present(
    revision: Revision, directory: Path, record: DownloadRecord | None, progress: Progress
) -> tuple[DownloadRecord, frozenset[str]]:
    """Hash what is in place and not recorded as sound: the record with what is, and the names of the rest."""
    refuted = set()
    known = DownloadRecord.of(revision, record)
    for planned in _plan(revision, directory, known).files:
        if planned.state != "unchecked":
            continue
        file = planned.file
        modified = (directory / file.path).stat().st_mtime_ns  # taken first: a change while it is read shows
        digest = hash_file(directory / file.path, file, progress)
        if digest.difference():
            refuted.add(file.path)
        else:
            known = known.with_file(file.path, digest.sha256, modified)
    return known, frozenset(refuted)


def _refuse_impossible(plan: Plan) -> None:
    """Before anything is fetched or written: the Hub may be asked, and the disk is large enough."""
    unfinished = plan.unfinished
    if unfinished and wire.offline():
        count = f"{len(unfinished)} of {len(plan.files)} files of {plan.revision} are missing"
        raise wire.offline_error(f"{plan.directory}: {count} ({unfinished[0].path} first)")
    if not plan.fits:
        raise BloomdeskError(
            f"{plan.directory}: {plan.to_fetch:,} bytes are still to come, the disk has {plan.free:,} free",
            f"make room for {plan.to_fetch - plan.free:,} bytes more, or choose a directory on another disk",
        )
