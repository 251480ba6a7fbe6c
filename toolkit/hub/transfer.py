"""One file from the Hub onto the disk: resumed where it stopped, hashed as it arrives, in place when sound.

Its two states in a directory:

    model.bin               whole and checked
    model.bin.incomplete    what has come so far; the next run goes on at its end
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runner.errors import BloomdeskError
from runner.system.atomic import TEMPORARY_SUFFIX, replace_file
from toolkit.hub import client as wire
from toolkit.hub.connection import Unranged
from toolkit.hub.partial_file import Damaged, Incomplete
from toolkit.hub.ranges import MOST_CONNECTIONS, Ahead, range_size
from toolkit.hub.revision import HubFile, Revision
from toolkit.io.progress import FileProgress, Progress

# Enough to fill a line where a store gives each connection a few dozen MB/s, and no burden for it.
CONNECTIONS = 8


@dataclass(frozen=True)
class Transfer:
    """A file that came: its sha256, the bytes that an earlier run had left, and those over the network."""

    sha256: str
    resumed: int
    received: int


def fetch(
    revision: Revision, file: HubFile, directory: Path, progress: Progress, connections: int = CONNECTIONS
) -> Transfer:
    """Bring `file` of `revision` into `directory`, in place only when its size and hash are right.

    A file of more than one range comes over several `connections` at a time, 1 to 32. What has come stays for
    the next run, also after a kill: at most 64 MiB, the window of `ranges`, is fetched twice. Every 256 MiB
    are synced, so that a power loss costs little more; if it leaves a wrong tail, the hash at the end shows it.

    Raises `BloomdeskError` where the Hub refuses, stays away, or sends something else, and `OSError` where
    the disk does not take it. What is wrong is deleted.
    """
    if not 1 <= connections <= MOST_CONNECTIONS:
        raise BloomdeskError(f"{connections} connections at a time", f"choose from 1 to {MOST_CONNECTIONS}")
    path = directory / file.path
    incomplete = path.with_name(path.name + TEMPORARY_SUFFIX)
    asked = wire.Asked(revision.repo, revision.commit, file.path)
    try:
        with Incomplete(incomplete, file, FileProgress(progress, file.path, file.size)) as incoming:
            resumed = incoming.position
            if connections > 1 and file.size - resumed > range_size(connections):
                _receive_ranges(asked, file, incoming, connections)
            _receive_rest(asked, file, incoming)
            incoming.finish()
            difference = incoming.digest.difference()
            if difference:
                raise Damaged(f"{file.path} of {revision} came damaged: {difference}")
    except Damaged:
        incomplete.unlink(missing_ok=True)
        raise
    replace_file(incomplete, path)
    return Transfer(incoming.digest.sha256, resumed, incoming.received)


def _receive_ranges(asked: wire.Asked, file: HubFile, incoming: Incomplete, connections: int) -> None:
    """Take what comes over several connections: all of it, or what a server without ranges leaves to one."""
    ahead = Ahead(asked, lambda: _locate(asked, file), incoming.position, file.size, connections)
    try:
        with ahead:
            for piece in ahead.pieces():
                incoming.write(piece)
    except Unranged:
        pass
    finally:
        incoming.received += ahead.received


def _receive_rest(asked: wire.Asked, file: HubFile, incoming: Incomplete) -> None:
    """Take the rest over one connection at a time, as long as each brings something."""
    patience = wire.Patience(asked)
    while incoming.position < file.size:
        before = incoming.position
        try:
            _receive(asked, file, incoming)
        except wire.network_errors() as error:
            if incoming.position > before:
                patience.calm()
            patience.bear(error)


def _receive(asked: wire.Asked, file: HubFile, incoming: Incomplete) -> None:
    """Take what one answer of the Hub brings; raises one of `wire.network_errors` where that is not all."""
    with wire.stream(_locate(asked, file), incoming.position) as (start, pieces):
        known = incoming.position - start  # not 0 where the server ignored the range and sends it all again
        for piece in pieces:
            incoming.received += len(piece)
            if known < len(piece):
                incoming.write(piece[known:])
            known = max(0, known - len(piece))
    if incoming.position < file.size:
        raise wire.CutShort(f"{incoming.position:,} of {file.size:,} bytes came")


def read_head(revision: Revision, file: HubFile, nbytes: int) -> bytes:
    """The first `nbytes` bytes of a file, or all of a smaller one, not checked against its hash.

    A Hub that ignores ranges sends the whole file, and the connection is closed once these bytes are there. Raises
    `BloomdeskError` if the Hub refuses, stays away, or has another file there.
    """
    asked = wire.Asked(revision.repo, revision.commit, file.path)
    wanted, patience = min(nbytes, file.size), wire.Patience(asked)
    while True:
        head = b""
        try:
            with wire.stream(_locate(asked, file), 0, wanted) as (_, pieces):
                for piece in pieces:
                    head += piece
                    if len(head) >= wanted:
                        return head[:wanted]
            raise wire.CutShort(f"{len(head):,} of {wanted:,} bytes came")
        except wire.network_errors() as error:
            patience.bear(error)


def _locate(asked: wire.Asked, file: HubFile) -> wire.Location:
    location = wire.locate(asked)
    _refuse_other(asked, file, location)
    return location


def _refuse_other(asked: wire.Asked, file: HubFile, location: wire.Location) -> None:
    """Before gigabytes come: the Hub must speak of the commit, the size and the hash that are expected."""
    kinds = {64: ("sha256", file.sha256), 40: ("git blob sha1", file.git_sha1)}
    found = location.content_id or ""
    kind, expected = kinds.get(len(found), ("", None))  # mirrors may have marks of their own
    claims = [
        ("commit", asked.revision, location.commit),
        ("size in bytes", file.size, location.size),
        (kind, expected, found),
    ]
    for what, wanted, said in claims:
        if wanted is not None and said is not None and wanted != said:
            raise BloomdeskError(
                f"{asked} is another file: its {what} should be {wanted}, {wire.endpoint()} says {said}",
                "check HF_ENDPOINT: this Hub holds something else under that name",
            )
