"""One file from the Hub onto the disk: resumed, hashed as it arrives, and renamed into place if it is sound.

Its two states in a directory:

    model.bin               whole and checked
    model.bin.incomplete    the part that has come; the next run resumes at its end
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from runner.errors import BloomdeskError
from runner.system.atomic import TEMPORARY_SUFFIX, replace_file
from toolkit.hub.client import Location, locate, stream
from toolkit.hub.connection import Unranged
from toolkit.hub.failures import IncompleteAnswer, Resource, endpoint, network_errors
from toolkit.hub.hub_cache import blocks_of, cached_bytes, cached_file
from toolkit.hub.line import Line
from toolkit.hub.partial_file import Damaged, PartialFile
from toolkit.hub.ranges import MOST_CONNECTIONS, Ahead, range_size
from toolkit.hub.retry import RetryPolicy
from toolkit.hub.revision import HubFile, Revision
from toolkit.io.progress import FileProgress, Progress

# Enough to fill a line if a store gives each connection a few dozen MB/s, and no burden for it.
CONNECTIONS = 8


@dataclass(frozen=True)
class Transfer:
    """A file that came: its sha256, and its bytes: of an earlier run, over the network, and out of the Hub's cache."""

    sha256: str
    resumed: int
    received: int
    cached: int = 0


def fetch(
    revision: Revision,
    file: HubFile,
    directory: Path,
    progress: Progress,
    connections: int = CONNECTIONS,
    line: Line | None = None,
) -> Transfer:
    """Bring `file` of `revision` into `directory`, renamed into place only if its size and hash are right.

    A file of more than one range comes over several `connections` at a time, 1 to 32. What has come stays for
    the next run, also after a kill: at most 64 MiB, the window of `ranges`, is fetched twice. Every 64 MiB
    are synced, so that a power loss costs little more; if it leaves a wrong tail, the hash at the end shows it.
    What huggingface_hub's cache has of the file is copied from there.

    Raises `BloomdeskError` if the Hub refuses, cannot be reached, or sends something else, and `OSError` if
    the disk does not take it. What is wrong is deleted.
    """
    if not 1 <= connections <= MOST_CONNECTIONS:
        raise BloomdeskError(f"{connections} connections at a time", f"choose from 1 to {MOST_CONNECTIONS}")
    cached = cached_file(revision, file)
    if cached is not None:
        # What is not right in the cache has gone again, and comes over the network.
        with suppress(Damaged):
            return _fetch(revision, file, directory, progress, connections, line, cached)
    return _fetch(revision, file, directory, progress, connections, line)


def _fetch(
    revision: Revision,
    file: HubFile,
    directory: Path,
    progress: Progress,
    connections: int,
    line: Line | None,
    cached: Path | None = None,
) -> Transfer:
    line, path = line or Line(), directory / file.path
    incomplete = path.with_name(path.name + TEMPORARY_SUFFIX)
    resource = Resource(revision.repo, revision.commit, file.path)
    try:
        with PartialFile(incomplete, file, FileProgress(progress, file.path, file.size)) as partial:
            resumed = partial.position
            for block in blocks_of(cached, resumed) if cached is not None else ():
                partial.write(block)
            copied = partial.position - resumed
            receive(resource, file, partial, connections, line)
            partial.finish()
            difference = file.difference(partial.digest)
            if difference:
                raise Damaged(f"{file.path} of {revision} came damaged: {difference}")
    except Damaged:
        incomplete.unlink(missing_ok=True)
        raise
    replace_file(incomplete, path)
    return Transfer(partial.digest.sha256, resumed, partial.received, copied)


class Sink(Protocol):
    """What takes a file's bytes in their order: `position` is the next one, `received` counts those that came."""

    position: int
    received: int

    def write(self, block: bytes | memoryview) -> None: ...

    def report(self) -> None: ...


def receive(resource: Resource, file: HubFile, sink: Sink, connections: int, line: Line) -> None:
    """Give `sink` all bytes from its position on; raises as `fetch` does."""
    if connections > 1 and file.size - sink.position > range_size(connections):
        _receive_ranges(resource, file, sink, connections, line)
    _receive_rest(resource, file, sink, line)


def _receive_ranges(resource: Resource, file: HubFile, sink: Sink, connections: int, line: Line) -> None:
    """Take what comes over several connections: all of it, or what a server without ranges leaves to one."""
    wanted = [(sink.position, file.size)]
    ahead = Ahead(resource, lambda: locate_same(resource, file), wanted, connections, line, sink.report)
    try:
        with ahead:
            for block in ahead.blocks():
                sink.write(block)
    except Unranged:
        pass
    finally:
        sink.received += ahead.received


def _receive_rest(resource: Resource, file: HubFile, sink: Sink, line: Line) -> None:
    """Take the rest over one connection at a time, as long as each brings something."""
    retries = RetryPolicy(resource, line, sink.report)
    while sink.position < file.size:
        before = sink.position
        try:
            _receive(resource, file, sink, line)
        except network_errors() as error:
            if sink.position > before:
                retries.reset()
            retries.backoff(error)


def _receive(resource: Resource, file: HubFile, sink: Sink, line: Line) -> None:
    """Take what one answer of the Hub brings; raises one of `network_errors` if that is not all."""
    with stream(locate_same(resource, file), sink.position) as (start, blocks):
        # Not 0 if the server ignored the range and sends all of the file again.
        known = sink.position - start
        for block in blocks:
            sink.received += len(block)
            line.keep_rate(len(block), sink.report)
            if known < len(block):
                sink.write(block[known:])
                # What came a second time is no progress.
                line.came(len(block) - known)
            known = max(0, known - len(block))
    if sink.position < file.size:
        raise IncompleteAnswer(f"{sink.position:,} of {file.size:,} bytes came")


def locate_same(resource: Resource, file: HubFile) -> Location:
    """Where a file is; raises one of `network_errors`, and `BloomdeskError` if the Hub has another one there now."""
    location = locate(resource)
    _refuse_other(resource, file, location)
    return replace(location, size=file.size)


def _refuse_other(resource: Resource, file: HubFile, location: Location) -> None:
    """Before gigabytes come: the Hub must speak of the commit, the size and the hash that are expected."""
    kinds = {64: ("sha256", file.sha256), 40: ("git blob sha1", file.git_sha1)}
    found = location.content_id or ""
    kind, expected = kinds.get(len(found), ("", None))  # mirrors may have marks of their own
    claims = [
        ("commit", resource.revision, location.commit),
        ("size in bytes", file.size, location.size),
        (kind, expected, found),
    ]
    for what, wanted, said in claims:
        if wanted is not None and said is not None and wanted != said:
            raise BloomdeskError(
                f"{resource} is another file: its {what} should be {wanted}, {endpoint()} says {said}",
                "check HF_ENDPOINT: this Hub holds something else under that name",
            )


def fetch_bytes(revision: Revision, file: HubFile, line: Line | None = None) -> bytes:
    """All bytes of a small file of `revision`, checked; raises `BloomdeskError` as `fetch` does."""
    if (known := cached_bytes(revision, file)) is not None:
        return known
    data, digest = read_range(revision, file, 0, file.size, line), file.digest()
    digest.update(data)
    difference = file.difference(digest)
    if difference:
        raise Damaged(f"{file.path} of {revision} came damaged: {difference}")
    return data


def read_range(revision: Revision, file: HubFile, start: int, nbytes: int, line: Line | None = None) -> bytes:
    """The bytes `[start, start + nbytes)` of a file of `revision`, not checked against its hash.

    Raises `BloomdeskError` if the file is shorter, or the Hub refuses, cannot be reached, or has another file there.
    """
    stop = start + nbytes
    if not 0 <= start <= stop <= file.size:
        raise BloomdeskError(f"{file.path} of {revision} has {file.size:,} bytes, not {stop:,}")
    resource = Resource(revision.repo, revision.commit, file.path)
    line = line or Line()
    retries, data = RetryPolicy(resource, line), bytearray()
    while len(data) < nbytes:
        before = len(data)
        try:
            with stream(locate_same(resource, file), start + before, stop) as (position, blocks):
                for block in blocks:
                    # A server that ignores ranges sends the file from its first byte, and is stopped at `stop`.
                    line.keep_rate(len(block))
                    new = block[max(0, start + len(data) - position) : stop - position]
                    data += new
                    position += len(block)
                    if new:
                        line.came(len(new))
                    if position >= stop:
                        break
            if len(data) < nbytes:
                raise IncompleteAnswer(f"{len(data):,} of {nbytes:,} bytes of a range came")
        except network_errors() as error:
            if len(data) > before:
                retries.reset()
            retries.backoff(error)
    return bytes(data)
