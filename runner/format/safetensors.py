"""The header of a safetensors file: read strictly, written so that the data starts on a page boundary.

    8 bytes     header length, little endian
    header      one JSON object: name -> dtype, shape, data_offsets; spaces may pad it
    buffer      the tensors, without gaps, row-major, little endian

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import json
import math
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from runner.errors import BloomdeskError, reading

# The reference reader allows 100 MB, whose JSON can take gigabytes; all of BLOOM-176B in one file needs 0.1 MB.
MAX_HEADER_BYTES = 16 * 2**20
MAX_AXES = 8

BYTES_PER_ELEMENT = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
Shape = tuple[int, ...]
# A tensor's name, dtype and shape.
Described = tuple[str, str, Shape]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file; its bytes are `[start, end)` counted from the start of the file."""

    name: str
    dtype: str
    shape: Shape
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file; `tensors` is in the order of the data."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int


def open_regular(path: Path) -> BinaryIO:
    """The regular file at `path`, links followed, opened to read its bytes.

    Raises `OSError`, also for a file of another kind: a pipe would block, and a device may never end.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return path.open("rb")


def read_small(path: Path, largest: int) -> bytes:
    """All bytes of a regular file. Raises `OSError`, also if they are more than `largest`."""
    with open_regular(path) as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise OSError(errno.EFBIG, f"it is larger than {largest:,} bytes", str(path))
    return data


def read_text(path: Path, largest: int) -> str:
    """The text of a regular file, UTF-8. Raises `BloomdeskError`, also if it has more than `largest` bytes."""
    with reading(path):
        data = read_small(path, largest)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BloomdeskError(f"{path} is not valid UTF-8 text") from None


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a dense tensor."""
    return BYTES_PER_ELEMENT[dtype] * math.prod(shape)


def encode_header(
    tensors: Iterable[Described],
    metadata: Mapping[str, str] | None = None,
    room: int = 0,
    alignment: int = 8,
) -> bytes:
    """The first bytes of a file that stores these tensors in this order without gaps: header length and header.

    They are a multiple of `alignment` long, by default that of the reference library, and at least `room`. `metadata`
    is added to that of every file.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name, dtype, shape in tensors:
        end = position + tensor_nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * max(room - 8 - len(text), 0)
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


def read_header(
    path: Path, opened: Callable[[Path], AbstractContextManager[BinaryIO]] = open_regular
) -> Header:
    """The header of the safetensors file at `path`, checked against the file's size; `opened` gives its bytes.

    Only the header's bytes are read. Raises `BloomdeskError` for anything that the format does not allow: a length
    beyond the file, invalid JSON, a repeated name, gaps, overlaps, data that ends before or after the file does.
    """
    with reading(path), opened(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _damaged(path, f"its header claims {length:,} bytes and the file has {size:,}")
        if length > MAX_HEADER_BYTES:
            raise _damaged(path, f"its header has {length:,} bytes, expected {MAX_HEADER_BYTES:,} at most")
        text = file.read(length)
    entries = _parse(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(path, "its __metadata__ is not an object")
    found = [_entry(path, name, value, 8 + length) for name, value in entries.items()]
    found.sort(key=lambda entry: (entry.start, entry.end))
    _check_gapless(path, found, 8 + length, size)
    return Header({entry.name: entry for entry in found}, metadata, 8 + length)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name is repeated")
        return result

    try:
        entries = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from None
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not a JSON object")
    return entries


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        # Limits first: a product of a million numbers takes minutes.
        whole = len(shape) <= MAX_AXES and all(
            type(number) is int and 0 <= number < 2**63 for number in (*shape, start, end)
        )
        sound = whole and name.isprintable() and tensor_nbytes(dtype, shape) == end - start
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise _damaged(path, f"the header's entry for {name[:120]!r} is not a tensor")
    return TensorEntry(name, dtype, shape, data_start + start, data_start + end)


def _check_gapless(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for entry in entries:
        if entry.start != position:
            name = entry.name[:120]
            raise _damaged(path, f"{name!r} starts at byte {entry.start:,}, expected {position:,}")
        position = entry.end
    if position != size:
        raise _damaged(path, f"its header describes {position:,} bytes and the file has {size:,}")


def _damaged(path: Path, why: str) -> BloomdeskError:
    return BloomdeskError(f"{path} is not a sound safetensors file: {why}")
