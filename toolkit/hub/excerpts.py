"""An excerpt of a file from the Hub onto the disk, resumed, with the hash of each block that the disk has.

Its two files in a directory:

    model.bin.rows         what has come of the excerpt, its first bytes
    model.bin.rows.json    which bytes of which file these are, and the hashes of those that were synced

The Hub's sha256 covers the whole file, so no part of it proves the rest. What is compared is what the Hub says of the
file, before its bytes come and after them: commit, size and hash. If all of the file is read through, its sha256 is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import xxhash

from runner.format.digest import digest
from runner.system.atomic import write_atomically
from toolkit.hub.failures import Resource, network_errors
from toolkit.hub.hub_cache import blocks_of
from toolkit.hub.line import Line
from toolkit.hub.partial_file import BINARY, NO_LINK, Damaged
from toolkit.hub.ranges import Ahead
from toolkit.hub.retry import RetryPolicy
from toolkit.hub.revision import HubFile, Revision
from toolkit.hub.transfer import Transfer, locate_same, receive
from toolkit.io.disk import read_if_exists
from toolkit.io.progress import FileProgress, Progress
from toolkit.source.excerpt import Excerpt

SUFFIX, RECORD_SUFFIX = ".rows", ".rows.json"
FORMAT, FORMAT_VERSION = "bloomdesk-rows", 1
# Bytes that are synced and then recorded; a kill loses less.
BLOCK = 32 * 2**20
# The excerpt of a shard of BLOOM-176B has some 300 blocks at most.
LARGEST_RECORD = 16 * 2**20


@dataclass(frozen=True)
class ExcerptRecord:
    """Which bytes of which file an excerpt has: `stretches` as in `Excerpt`, `blocks` the xxh3-128 of each block.

    `is_proven` if all of the file was read through, and had the sha256 that the Hub says; `hashes` are then the
    xxh3-128 of other stretches of it, by name.
    """

    repo: str
    commit: str
    file: str
    size: int
    sha256: str
    stretches: tuple[tuple[int, int], ...]
    blocks: tuple[str, ...] = ()
    is_proven: bool = False
    hashes: tuple[tuple[str, str], ...] = ()

    @property
    def excerpt(self) -> Excerpt:
        return Excerpt(self.stretches)

    @property
    def is_complete(self) -> bool:
        """Whether every byte has come."""
        return len(self.blocks) == -(-self.excerpt.nbytes // BLOCK)

    def is_of_same(self, other: ExcerptRecord) -> bool:
        """Whether both are of the same bytes, however many of these have come."""
        return self._bare == other._bare

    @property
    def _bare(self) -> ExcerptRecord:
        return replace(self, blocks=(), is_proven=False, hashes=())

    def to_json(self) -> str:
        """The record's text."""
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps({**body, "sha256_of_record": digest(body)}) + "\n"


def excerpt_path(directory: Path, name: str) -> Path:
    """Where the excerpt of a file is."""
    return directory / (name + SUFFIX)


def record_path(directory: Path, name: str) -> Path:
    """Where the record of an excerpt is."""
    return directory / (name + RECORD_SUFFIX)


def fetch_excerpt(
    revision: Revision,
    file: HubFile,
    excerpt: Excerpt,
    directory: Path,
    progress: Progress,
    connections: int,
    line: Line,
    *,
    whole: bool = False,
    hashed: Mapping[str, tuple[int, int]],
    cached: Path | None = None,
) -> tuple[Transfer, ExcerptRecord]:
    """Bring an excerpt of `file`, whose sha256 is known, into `directory`, or go on with one; and its record.

    With `whole` all of the file is read through, and only the excerpt is kept; so is what is `cached` of the Hub's. The
    stretches `hashed` are then hashed, by name. Raises `Unranged` if the file does not come by ranges, and else what
    `fetch` of a whole file raises.
    """
    resource = Resource(revision.repo, revision.commit, file.path)
    fresh = ExcerptRecord(*_named(revision, file), excerpt.stretches)
    with PartialExcerpt(directory, fresh) as partial:
        if partial.record.is_complete and (partial.record.is_proven or not whole):
            return Transfer(fresh.sha256, excerpt.nbytes, 0), partial.record
        if cached is not None:
            through = _Through(file, partial, hashed, progress)
            for block in blocks_of(cached, 0):
                through.write(block)
            return through.finish(cached=excerpt.nbytes)
        if whole:
            through = _Through(file, partial, hashed, progress)
            receive(resource, file, through, connections, line)
            return through.finish()
        return _receive(resource, file, partial, progress, connections, line)


def _named(revision: Revision, file: HubFile) -> tuple[str, str, str, int, str]:
    assert file.sha256 is not None
    return revision.repo, revision.commit, file.path, file.size, file.sha256


def _receive(
    resource: Resource,
    file: HubFile,
    partial: PartialExcerpt,
    progress: Progress,
    connections: int,
    line: Line,
) -> tuple[Transfer, ExcerptRecord]:
    """Take the ranges that are missing, and ask once more whether the Hub still has the same file there."""
    resumed, excerpt = partial.position, partial.record.excerpt
    seen = FileProgress(progress, file.path, excerpt.nbytes)

    def report() -> None:
        seen(partial.position)

    report()
    wanted = excerpt.after(resumed)
    with Ahead(resource, lambda: locate_same(resource, file), wanted, connections, line, report) as ahead:
        for block in ahead.blocks():
            partial.write(block)
            report()
    _require_same(resource, file, line)
    partial.finish()
    return Transfer(partial.record.sha256, resumed, ahead.received), partial.record


def _require_same(resource: Resource, file: HubFile, line: Line) -> None:
    """Raise `BloomdeskError` if the Hub has another file there by now."""
    retries = RetryPolicy(resource, line)
    while True:
        try:
            locate_same(resource, file)
            return
        except network_errors() as error:
            retries.backoff(error)


class PartialExcerpt:
    """What has come of an excerpt: on the disk, of which `record` has all that was synced."""

    def __init__(self, directory: Path, fresh: ExcerptRecord) -> None:
        self._path, self._directory = excerpt_path(directory, fresh.file), directory
        self.record = fresh
        self.position = 0

    def __enter__(self) -> PartialExcerpt:
        path, known = self._path, load_record(self._directory, self.record.file)
        if path.is_symlink() or (path.exists() and path.stat().st_nlink > 1):
            # It would write somewhere else.
            path.unlink()
        if known is not None and known.is_of_same(self.record) and path.exists():
            sound = tuple(_sound_blocks(path, known))
            self.record = replace(known, blocks=sound, is_proven=known.is_proven and sound == known.blocks)
        self._save()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK | BINARY, 0o644)
        try:
            self._go_to(min(len(self.record.blocks) * BLOCK, self.record.excerpt.nbytes))
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def restart(self) -> None:
        """Forget what has come."""
        self.record = replace(self.record, blocks=(), is_proven=False, hashes=())
        self._save()
        self._go_to(0)

    def write(self, block: bytes | memoryview) -> None:
        """Append what came; raises `OSError` if the disk does not take it."""
        rest = memoryview(block)
        while rest:
            now = rest[: BLOCK - self.position % BLOCK]
            self._hash.update(now)
            rest = rest[len(now) :]
            while now:
                count = os.write(self._descriptor, now)
                now, self.position = now[count:], self.position + count
            if self.position % BLOCK == 0:
                self._seal()

    def finish(self, hashes: tuple[tuple[str, str], ...] | None = None) -> None:
        """Record that all is there and, if there are `hashes`, proven."""
        if self.position % BLOCK:
            self._seal()
        if hashes is not None:
            self.record = replace(self.record, is_proven=True, hashes=hashes)
            self._save()

    def _seal(self) -> None:
        os.fsync(self._descriptor)
        self.record = replace(self.record, blocks=(*self.record.blocks, self._hash.hexdigest()))
        self._hash = xxhash.xxh3_128()
        self._save()

    def _go_to(self, position: int) -> None:
        os.ftruncate(self._descriptor, position)
        os.lseek(self._descriptor, position, os.SEEK_SET)
        self.position, self._hash = position, xxhash.xxh3_128()

    def _save(self) -> None:
        write_atomically(record_path(self._directory, self.record.file), self.record.to_json().encode())


class _Through:
    """All bytes of a file on their way: hashed, and those of an excerpt kept."""

    def __init__(
        self,
        file: HubFile,
        partial: PartialExcerpt,
        hashed: Mapping[str, tuple[int, int]],
        progress: Progress,
    ) -> None:
        self.position = self.received = 0
        self._hashed = [(name, Excerpt((stretch,)), xxhash.xxh3_128()) for name, stretch in hashed.items()]
        self._file, self._partial, self._excerpt = file, partial, partial.record.excerpt
        self._seen, self._digest = FileProgress(progress, file.path, file.size), file.digest()
        # The hash of what had come is not known any more.
        partial.restart()

    def write(self, block: bytes | memoryview) -> None:
        for kept in self._excerpt.kept(self.position, block):
            self._partial.write(kept)
        for _, stretch, own in self._hashed:
            for part in stretch.kept(self.position, block):
                own.update(part)
        self._digest.update(block)
        self.position += len(block)
        self.report()

    def report(self) -> None:
        self._seen(self.position)

    def finish(self, *, cached: int = 0) -> tuple[Transfer, ExcerptRecord]:
        """Raises `Damaged`, and forgets the excerpt, if the file's bytes are not the Hub's."""
        difference = self._file.difference(self._digest)
        if difference:
            self._partial.restart()
            raise Damaged(f"{self._file.path} of {self._partial.record.repo} came damaged: {difference}")
        self._partial.finish(tuple((name, own.hexdigest()) for name, _, own in self._hashed))
        record = self._partial.record
        return Transfer(record.sha256, 0, self.received, cached), record


def load_record(directory: Path, name: str) -> ExcerptRecord | None:
    """The sound record of the excerpt of a file, or None if there is none."""
    data = read_if_exists(record_path(directory, name), LARGEST_RECORD)
    try:
        body = json.loads(data or b"")
        if body.pop("sha256_of_record") != digest(body) or body.pop("format") != FORMAT:
            return None
        if body.pop("format_version") != FORMAT_VERSION:
            return None
        stretches = tuple((start, stop) for start, stop in body["stretches"])
        hashes = tuple((name, found) for name, found in body["hashes"])
        lists = {"stretches": stretches, "blocks": tuple(body["blocks"]), "hashes": hashes}
        return ExcerptRecord(**{**body, **lists})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def is_sound(directory: Path, record: ExcerptRecord) -> bool:
    """Whether the excerpt on the disk is, to the last byte, the one that came. Raises `OSError` if it can't be read."""
    return tuple(_sound_blocks(excerpt_path(directory, record.file), record)) == record.blocks


def _sound_blocks(path: Path, record: ExcerptRecord) -> Iterator[str]:
    """The hashes of the blocks on the disk, as long as they are the recorded ones."""
    with path.open("rb", buffering=0) as file:
        left, buffer = record.excerpt.nbytes, memoryview(bytearray(min(BLOCK, record.excerpt.nbytes)))
        for expected in record.blocks:
            size = min(BLOCK, left)
            count, filled = -1, 0
            while filled < size and count:
                count = file.readinto(buffer[filled:size])
                filled += count
            if filled < size or xxhash.xxh3_128_hexdigest(buffer[:size]) != expected:
                return
            left -= size
            yield expected
