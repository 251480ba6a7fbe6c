"""The bytes of source tensors, read from their shards in pieces or in whole rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from runner.errors import BloomdeskError
from toolkit.io import hasher as checksum
from toolkit.source.shards import SourceTensor


def open_shard(shard: Path, open_files: ExitStack) -> BinaryIO:
    """The shard, unbuffered, open as long as `open_files`; `BloomdeskError` where it can't be."""
    try:
        return open_files.enter_context(shard.open("rb", buffering=0))
    except OSError as error:
        raise BloomdeskError(f"{shard}: cannot be read: {error.strerror}") from error


def read_pieces(tensor: SourceTensor, file: BinaryIO, buffers: Iterator[memoryview]) -> Iterator[memoryview]:
    """The tensor's bytes, as `checksum.pieces` gives them; `BloomdeskError` where they can't be read."""
    with _read_errors(tensor):
        yield from checksum.pieces(file, tensor.offset, tensor.nbytes, buffers)


def read_chunks(tensor: SourceTensor, file: BinaryIO, nbytes: int) -> Iterator[bytearray]:
    """The tensor's bytes, `nbytes` at a time and at last what is left, each chunk in memory of its own.

    Seeks once, so no other reader may use the same file object meanwhile.
    """
    file.seek(tensor.offset)
    for start in range(0, tensor.nbytes, nbytes):
        chunk = bytearray(min(nbytes, tensor.nbytes - start))
        rest = memoryview(chunk)
        with _read_errors(tensor):
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise EOFError(
                        f"it ends {len(rest) + tensor.nbytes - start - len(chunk):,} bytes too early"
                    )
                rest = rest[count:]
        yield chunk


@contextmanager
def _read_errors(tensor: SourceTensor) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BloomdeskError(f"{tensor.file}: cannot be read: {error.strerror}") from error
    except EOFError as error:
        raise BloomdeskError(f"{tensor.file}: {error}") from None
