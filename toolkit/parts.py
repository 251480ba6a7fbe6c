"""One part of a prepared directory: planned, gathered from source shards, written, hashed and in place.

Tensors go from file to file in pieces, so memory stays small at any size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import xxhash

from runner.errors import BloomdeskError
from runner.header import encode_header, open_regular
from runner.prepared import PartRecord, PartSpec, SourceShard, TensorRecord
from toolkit import checksum
from toolkit.disk import disk_errors
from toolkit.durable import durable_file
from toolkit.progress import Progress
from toolkit.shards import SourceTensor

WRITE_BACK = 64 * 2**20


@dataclass(frozen=True)
class PlannedPart:
    """A part to write: its header, and where its tensors are, in the order of `spec`."""

    spec: PartSpec
    header: bytes
    tensors: tuple[SourceTensor, ...]

    @property
    def size(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    @property
    def sources(self) -> tuple[Path, ...]:
        """The shards that its bytes come from, in the order in which they are needed."""
        return tuple(dict.fromkeys(tensor.file for tensor in self.tensors))


def plan_part(
    spec: PartSpec, dtype: str, keys: Mapping[str, str], tensors: Mapping[str, SourceTensor]
) -> PlannedPart:
    """The part that `spec` describes, from source `tensors` whose keys `keys` gives for each name in the part.

    Raises `BloomdeskError` where a tensor has another shape than the model calls for.
    """
    chosen = tuple(tensors[keys[name]] for name in spec.tensors)
    for tensor, expected in zip(chosen, spec.tensors.values(), strict=True):
        check_shape(tensor, expected)
    return PlannedPart(spec, part_header(spec, dtype), chosen)


def part_header(spec: PartSpec, dtype: str) -> bytes:
    """The first bytes of a part, up to its data."""
    return encode_header((name, dtype, shape) for name, shape in spec.tensors.items())


def check_shape(tensor: SourceTensor, shape: tuple[int, ...]) -> None:
    """Raise `BloomdeskError` where the tensor's shape is not `shape`."""
    if tensor.shape != shape:
        found, expected = list(tensor.shape), list(shape)
        raise BloomdeskError(
            f"{tensor.file}: {tensor.key} has shape {found}, config.json makes it {expected}"
        )


def write_part(
    part: PlannedPart, destination: Path, sha256: Callable[[Path], SourceShard], progress: Progress
) -> PartRecord:
    """Put a part in place in `destination`, whole or not at all; what the manifest says of it.

    `sha256` gives a source shard's checked hash and raises where it is wrong; it is asked once the bytes are
    written, before the part is in place. Raises `BloomdeskError` where a shard or the disk fails.
    """
    path = destination / part.spec.file
    whole = xxhash.xxh3_128(part.header)
    records = []
    with disk_errors(path), durable_file(path) as file:
        with _WriteBehind(file) as behind, ExitStack() as open_files:
            behind.write(memoryview(part.header))
            done = len(part.header)
            readers = {shard: _open(shard, open_files) for shard in part.sources}
            for (name, shape), tensor in zip(part.spec.tensors.items(), part.tensors, strict=True):
                own = xxhash.xxh3_128()
                for piece in _read(tensor, readers[tensor.file], behind.buffers):
                    behind.write(piece)
                    own.update(piece)
                    whole.update(piece)
                    done += len(piece)
                    progress(path.name, done, part.size)
                records.append(TensorRecord(name, tensor.dtype, shape, own.hexdigest()))
        file.flush()
        os.fsync(file.fileno())  # shards may still be hashed meanwhile
        sources = tuple(sha256(shard) for shard in part.sources)
    return PartRecord(path.name, part.size, whole.hexdigest(), tuple(records), sources)


def is_in_place(path: Path, header: bytes, record: PartRecord) -> bool:
    """Whether the file at `path` has the recorded size and begins with `header`."""
    try:
        with open_regular(path) as file:
            return file.read(len(header)) == header and file.seek(0, os.SEEK_END) == record.size
    except OSError:
        return False


def check_lm_head(lm_head: SourceTensor, embedding: SourceTensor) -> None:
    """Raise `BloomdeskError` where the two differ: the runner's head is the embedding, and another would be lost."""
    with ExitStack() as open_files:
        ours = _read(lm_head, _open(lm_head.file, open_files), checksum.new_buffers())
        theirs = _read(embedding, _open(embedding.file, open_files), checksum.new_buffers())
        for left, right in zip(ours, theirs, strict=True):
            if left != right:
                raise BloomdeskError(
                    f"{lm_head.file}: {lm_head.key} differs from the embedding, "
                    "and only models whose head is the embedding can be run"
                )


class _WriteBehind:
    """Writes to `file` in a thread, so that the next piece is read and hashed meanwhile.

    A piece from `buffers` is written before its buffer's turn comes again. Leaving the block waits for all.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.buffers = checksum.new_buffers(3)  # one is read into, one waits, one is written
        self._file = file
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._pending: Future[None] | None = None
        self._unsynced = 0

    def __enter__(self) -> _WriteBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if kind is None and self._pending is not None:
            self._pending.result()

    def write(self, piece: memoryview) -> None:
        """Have `piece` written; raises what went wrong with the one before."""
        if self._pending is not None:
            self._pending.result()
        self._pending = self._thread.submit(self._write, piece)

    def _write(self, piece: memoryview) -> None:
        self._file.write(piece)
        self._unsynced += len(piece)
        if self._unsynced >= WRITE_BACK and hasattr(os, "posix_fadvise"):
            # The disk starts now on what it has not, and the page cache forgets what it has; without this all
            # is left to fsync, and the part pushes out the shard that two readers share. It changes no bytes.
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._unsynced = 0


def _open(shard: Path, open_files: ExitStack) -> BinaryIO:
    try:
        return open_files.enter_context(shard.open("rb", buffering=0))
    except OSError as error:
        raise BloomdeskError(f"{shard}: cannot be read: {error.strerror}") from error


def _read(tensor: SourceTensor, file: BinaryIO, buffers: Iterator[memoryview]) -> Iterator[memoryview]:
    try:
        yield from checksum.pieces(file, tensor.offset, tensor.nbytes, buffers)
    except OSError as error:
        raise BloomdeskError(f"{tensor.file}: cannot be read: {error.strerror}") from error
    except EOFError as error:
        raise BloomdeskError(f"{tensor.file}: {error}") from None
