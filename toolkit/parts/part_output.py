"""The files that one part goes into: a directory's, or those of several slices, which are written side by side.

A matrix is read once, from its first row to its last, so the hash of the whole is known although each file has some of
its rows, and other slices may be made elsewhere.

    rows of the source    0 ............................................ N
    files                 |-- slice 0's file --|  nobody's  |-- slice 2's --|
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from runner.format.layout import PartSpec
from runner.format.manifest import Manifest
from runner.format.part_record import PartRecord, TensorRecord
from runner.system.atomic import atomic_file
from toolkit.io.disk import disk_errors
from toolkit.io.writer import WriteBehind
from toolkit.parts.part import PlannedPart


@dataclass(frozen=True)
class Output:
    """What a directory gets of a part: the tensors of `spec`, and of each matrix the rows `rows`.

    `known` is the record of a part that is made again; what has its name then is given to `make_way`, right before it
    is replaced. `is_slice` if other directories may have other rows, `is_first` if none of them is written before it.
    """

    directory: Path
    spec: PartSpec
    rows: Mapping[str, range]
    is_slice: bool = False
    is_first: bool = True
    known: PartRecord | None = None
    make_way: Callable[[Path], object] = lambda path: None

    @classmethod
    def of(cls, directory: Path, part: PlannedPart, manifest: Manifest) -> Output:
        """What a directory gets of a part if its manifest is `manifest`, where no such part is yet."""
        model, own = manifest.model, manifest.slice if not part.is_sliced else None
        return cls(directory, part.spec.sliced(model, own), part.spec.rows(model, own), own is not None)

    @property
    def path(self) -> Path:
        return self.directory / self.spec.file


class OutputFile:
    """The file of an output while it is written, under its temporary name."""

    def __init__(self, output: Output, file: BinaryIO, behind: WriteBehind) -> None:
        self.output, self.file, self._behind = output, file, behind

    @property
    def place(self) -> Path:
        """Where its bytes are for now."""
        return Path(self.file.name)

    @property
    def position(self) -> int:
        """Bytes that it has, once all are written."""
        self.wait()
        return self._behind.position

    def write(self, block: bytes | bytearray | memoryview) -> None:
        """Append `block`, which must not change until the next call or `wait` returns.

        Raises `BloomdeskError` if the disk fails.
        """
        with disk_errors(self.output.path):
            self._behind.write(block)

    def wait(self) -> None:
        """Wait until every block is handed to the system; `BloomdeskError` if the disk fails."""
        with disk_errors(self.output.path):
            self._behind.wait()

    def finish(self, late: Mapping[int, bytes] | None = None) -> None:
        """Put the bytes of `late` in their places, and bring all to the disk; `BloomdeskError` if it fails."""
        self.wait()
        with disk_errors(self.output.path):
            for start, data in (late or {}).items():
                self.file.seek(start)
                self.file.write(data)
            self.file.flush()
            # Shards may still be hashed meanwhile.
            os.fsync(self.file.fileno())


@contextmanager
def output_files(outputs: Sequence[Output]) -> Iterator[list[OutputFile]]:
    """The files of all outputs, which get their names when the block ends without an error."""
    with ExitStack() as stack:
        found = []
        for output in outputs:
            stack.enter_context(disk_errors(output.path))
            file = stack.enter_context(atomic_file(output.path))
            found.append(OutputFile(output, file, stack.enter_context(WriteBehind(file.fileno()))))
        yield found


@dataclass(frozen=True)
class Segment:
    """Rows of a matrix that go into `file`, the one at index `index`; nowhere without one."""

    rows: range
    index: int | None = None


def segments(name: str, count: int, outputs: Sequence[Output]) -> list[Segment]:
    """All `count` rows of the matrix `name` in order, each in the output that has it, if one has."""
    found, position = [], 0
    owned = [(output.rows[name], index) for index, output in enumerate(outputs)]
    # One without rows comes before the one that begins where it would.
    for rows, index in sorted(owned, key=lambda each: (each[0].start, each[0].stop)):
        if rows.start > position:
            found.append(Segment(range(position, rows.start)))
        found.append(Segment(rows, index))
        position = rows.stop
    return [*found, Segment(range(position, count))] if position < count else found


class Whole:
    """The hashes of one whole matrix: of what it decodes to, and of what it was made from."""

    def __init__(self) -> None:
        self.decoded, self.original = xxhash.xxh3_128(), xxhash.xxh3_128()

    def records(self, name: str, dtype: str, shape: tuple[int, ...]) -> tuple[TensorRecord, TensorRecord]:
        """The records of both."""
        hashes = self.decoded.hexdigest(), self.original.hexdigest()
        return tuple(TensorRecord(name, dtype, shape, each) for each in hashes)  # type: ignore[return-value]
