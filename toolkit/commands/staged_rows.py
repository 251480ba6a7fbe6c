"""The rows of a slice between the network and the parts that are made from them: a share of each shard's bytes.

    DST/.source/
      bloomdesk-download.json     of which commit they are
      SHARD.rows                  the bytes that hold these rows, and the vectors, one stretch after another
      SHARD.rows.json             which bytes of the shard they are, and their hashes

Where the tensors lie is read on the Hub, from the shard's header or its zip's directory and pickle. A shard that does
not come by ranges, or whose sha256 the Hub does not know, is fetched whole, as staged_shards.py says.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import EMBEDDING, part_specs
from runner.format.part_record import SourceShard
from runner.format.safetensors import Shape
from runner.format.slices import Slice
from toolkit.commands.staged_shards import StagedShards, in_the_way
from toolkit.hub.connection import Unranged
from toolkit.hub.excerpts import (
    ExcerptRecord,
    excerpt_path,
    fetch_excerpt,
    is_sound,
    load_record,
    record_path,
)
from toolkit.hub.hub_cache import cached_file
from toolkit.hub.line import Line
from toolkit.hub.partial_file import Damaged
from toolkit.hub.remote_file import RemoteFile
from toolkit.hub.revision import HubFile, Revision
from toolkit.hub.transfer import Transfer
from toolkit.io.disk import disk_errors, read_errors
from toolkit.io.hasher import ShardHashes
from toolkit.io.progress import Progress
from toolkit.parts.destination import STAGING
from toolkit.parts.part import check_shape
from toolkit.source.excerpt import excerpt_of, in_excerpt, rows_of, stretch_of
from toolkit.source.index import ShardList
from toolkit.source.key_map import MATRIX, Assignment, assign
from toolkit.source.shards import check_member, read_shard
from toolkit.source.tensor import SourceTensor


class StagedRows:
    """What a slice `own` has of the shards of a revision; with `whole` each is read through, and so proven."""

    def __init__(
        self,
        destination: Path,
        revision: Revision,
        needed: Sequence[str],
        index: ShardList,
        connections: int,
        line: Line,
        *,
        model: Hyperparameters,
        own: Slice,
        whole: bool = False,
    ) -> None:
        self.own = own
        self._directory, self._revision, self._needed = destination / STAGING, revision, needed
        self._model, self._index, self._whole = model, index, whole
        self._connections, self._line = connections, line
        self._shards = StagedShards(destination, revision, needed, index, connections, line)
        self._records: dict[str, ExcerptRecord] = {}
        self._tensors: dict[str, dict[str, SourceTensor]] = {}
        self._unproven: set[str] = set()
        self._fetched_whole: set[str] = set()
        self._scattered = 0

    @property
    def names(self) -> frozenset[str]:
        return self._shards.names

    def hashing(self) -> ShardHashes:
        return self._shards.hashing()

    def load(self) -> None:
        self._shards.load()
        foreign = [
            path.name
            for name in self._needed
            if os.path.lexists(path := excerpt_path(self._directory, name))
            and load_record(self._directory, name) is None
        ]
        if foreign:
            raise in_the_way(self._directory, self._revision, foreign)

    def fetch(self, name: str, progress: Progress) -> Transfer:
        file = self._revision.find(name)
        assert file is not None
        if file.sha256 is None or os.path.lexists(self._directory / name):
            return self._fetch_whole(name, progress)
        try:
            return self._fetch_rows(file, progress)
        except Unranged:
            return self._fetch_whole(name, progress)

    def _fetch_whole(self, name: str, progress: Progress) -> Transfer:
        self._fetched_whole.add(name)
        return self._shards.fetch(name, progress)

    def _fetch_rows(self, file: HubFile, progress: Progress) -> Transfer:
        if (transfer := self._from_cache(file, progress)) is not None:
            return transfer
        path = self._directory / file.path
        with RemoteFile(
            self._revision, file, self._line, lambda: progress(file.path, 0, file.size)
        ) as remote:
            found = read_shard(path, opened=lambda path: remote)
        transfer = self._keep(file, found, self._cut(path, found), progress)
        return replace(transfer, received=transfer.received + remote.received)

    def _from_cache(self, file: HubFile, progress: Progress) -> Transfer | None:
        """The transfer out of the Hub's cache, or None if that does not have the file, or another one."""
        cached, path = cached_file(self._revision, file), self._directory / file.path
        if cached is None:
            return None
        try:
            found = read_shard(path, cached)
            tensors = self._cut(path, found)
        except BloomdeskError:
            return None
        with suppress(Damaged):
            return self._keep(file, found, tensors, progress, cached)
        return None

    def _keep(
        self,
        file: HubFile,
        found: Mapping[str, SourceTensor],
        tensors: Mapping[str, SourceTensor],
        progress: Progress,
        cached: Path | None = None,
    ) -> Transfer:
        """Fetch the excerpt that has `tensors`, cut out of those that were `found` in a shard."""
        excerpt, place = excerpt_of(tensors.values()), excerpt_path(self._directory, file.path)
        matrices = {key: each for key, each in found.items() if key in tensors and len(each.shape) == 2}
        whole = {key: stretch_of(each) for key, each in matrices.items() if each.strides is None}
        self._shards.note()
        with disk_errors(place):
            transfer, record = fetch_excerpt(
                self._revision,
                file,
                excerpt,
                self._directory,
                progress,
                self._connections,
                self._line,
                whole=self._whole,
                hashed=whole,
                cached=cached,
            )
        self._records[file.path] = record
        self._tensors[file.path] = {key: in_excerpt(each, excerpt, place) for key, each in tensors.items()}
        self._scattered += sum(_is_scattered(each) for each in tensors.values())
        if not record.is_proven:
            self._unproven.add(file.path)
        return transfer

    def _cut(self, path: Path, tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
        """What the slice has of a shard's tensors; `BloomdeskError` if they are others than the model's."""
        check_member(self._index, path, tensors)
        assignment = assign(self._index.weight_map or tensors, self._model)
        found = {}
        for key, (shape, rows) in rows_by_key(self._model, self.own, assignment).items():
            if key in tensors:
                check_shape(tensors[key], shape)
                found[key] = tensors[key] if rows is None else rows_of(tensors[key], rows)
        return found

    def hashes(self, name: str) -> Mapping[str, str]:
        """The xxh3-128 of whole matrices of a shard that was read through, by key, as they are stored there."""
        return dict(self._records[name].hashes) if name in self._records else {}

    def begin(self, name: str) -> None:
        if name in self._fetched_whole:
            self._shards.begin(name)

    def tensors(self, name: str) -> dict[str, SourceTensor]:
        if name in self._fetched_whole:
            return self._cut(self._directory / name, self._shards.tensors(name))
        return self._tensors[name]

    def checked(self, shard: Path) -> SourceShard:
        """The shard with the Hub's sha256, after its rows were compared with those that came."""
        if shard.name in self._fetched_whole:
            return self._shards.checked(shard)
        record = self._records[shard.name]
        place = excerpt_path(self._directory, shard.name)
        with read_errors(place):
            if is_sound(self._directory, record):
                return SourceShard(shard.name, record.sha256, record.size, record.is_proven)
        raise BloomdeskError(
            f"{place} has changed on the disk since it came",
            "check the disk, and run the same command again: it fetches anew what has changed",
        )

    def release(self, name: str, delete: Callable[[Path, str | None], None], *, last: bool) -> None:
        place, record = excerpt_path(self._directory, name), record_path(self._directory, name)
        if os.path.lexists(record):
            if place.is_file() and not place.is_symlink():
                self._shards.delete(place.name, delete, last=last)
            # Without the rows it is of no use, and no harm.
            with suppress(OSError):
                record.unlink()
        self._shards.release(name, delete, last=last)

    def remove(self) -> tuple[str, ...]:
        return (*self._notes(), *self._shards.remove())

    def _notes(self) -> tuple[str, ...]:
        found = []
        if self._unproven:
            found.append(
                f"of {_shards(len(self._unproven))} only the rows of slice {self.own} came, so no sha256 was compared; "
                "the Hub's commit, sizes and hashes, the headers and the shapes were; --check-whole reads all bytes"
            )
        elif self._records:
            found.append(f"all bytes of {_shards(len(self._records))} were read, and have the Hub's sha256")
        if self._fetched_whole:
            found.append(
                f"{_shards(len(self._fetched_whole))} came whole, because no ranges of them could be had"
            )
        if self._scattered:
            found.append(
                f"rows of {self._scattered:,} tensors do not lie together, so more bytes came with them"
            )
        return tuple(found)


def rows_by_key(
    model: Hyperparameters, own: Slice, assignment: Assignment
) -> dict[str, tuple[Shape, range | None]]:
    """The shape of each source key, and the rows that a slice has; None of a vector, which it has whole."""
    found: dict[str, tuple[Shape, range | None]] = {}
    for spec in part_specs(model):
        rows, keys = spec.rows(model, own), assignment.parts[spec.file]
        found |= {keys[name]: (shape, rows.get(name)) for name, shape in spec.tensors.items()}
        if spec.file == EMBEDDING and assignment.lm_head is not None:
            # It must equal the embedding.
            found[assignment.lm_head] = found[keys[MATRIX]]
    return found


def excerpt_sizes(
    model: Hyperparameters,
    own: Slice,
    index: ShardList,
    assignment: Assignment | None,
    shard_sizes: Mapping[str, int],
) -> dict[str, int]:
    """About how many bytes of each file a slice has, by name: its share of the tensors that the model uses."""
    whole, rows = dict.fromkeys(shard_sizes, 0), dict.fromkeys(shard_sizes, 0)
    for spec, cut in zip(part_specs(model), part_specs(model, own), strict=True):
        for name, shape in spec.tensors.items():
            # Without an index one file has every tensor.
            files = shard_sizes
            if index.weight_map is not None and assignment is not None:
                files = {index.weight_map[assignment.parts[spec.file][name]]: 0}
            for file in files:
                whole[file] += math.prod(shape)
                rows[file] += math.prod(cut.tensors[name])
    return {
        file: size * rows[file] // whole[file] if whole[file] else size for file, size in shard_sizes.items()
    }


def _is_scattered(tensor: SourceTensor) -> bool:
    start, stop = stretch_of(tensor)
    return tensor.strides is not None and stop - start > tensor.nbytes


def _shards(count: int) -> str:
    return f"{count:,} shard{'' if count == 1 else 's'}"
