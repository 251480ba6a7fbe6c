"""A tensor of a checkpoint that is being written, and a `.bin` shard of tensors as torch.save wrote it in 2022.

The shard is a stored zip: a pickle, and one record of plain bytes for each tensor.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: `buffers()` gives its bytes one after another, row-major, little endian."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    buffers: Callable[[], Iterable[memoryview]]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def write_bin(path: Path, tensors: Sequence[Tensor]) -> None:
    """Write a `.bin` as of 2022: root folder `archive`, no byte order or alignment records."""
    with path.open("wb") as file:
        container = Zip(file)
        data = _pickled(tensors)
        container.add("archive/data.pkl", len(data), [memoryview(data)])
        for number in sorted(range(len(tensors)), key=str):  # torch sorted the records by name then
            container.add(f"archive/data/{number}", tensors[number].nbytes, tensors[number].buffers())
        container.add("archive/version", 2, [memoryview(b"3\n")])
        container.finish()


class _Reduced:
    """Pickles as a call of a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@dataclass(frozen=True, eq=False)
class _Storage:
    """Pickles as a persistent id: the bytes of a tensor are in another record."""

    persistent_id: tuple[Any, ...]


def _pickled(tensors: Sequence[Tensor]) -> bytes:
    """data.pkl of a state dict, made without the tensors' bytes."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.persistent_id if isinstance(obj, _Storage) else None

    kinds = dict(
        zip(DTYPES.values(), (torch.BFloat16Storage, torch.HalfStorage, torch.FloatStorage), strict=True)
    )
    state = OrderedDict()
    for number, tensor in enumerate(tensors):
        storage = _Storage(("storage", kinds[tensor.dtype], str(number), "cpu", tensor.numel))
        strides = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))
        arguments = storage, 0, tensor.shape, strides, False, OrderedDict()
        state[tensor.key] = _Reduced(torch._utils._rebuild_tensor_v2, arguments)
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(state)
    return buffer.getvalue()


class Zip:
    """A stored zip whose records start at multiples of 64 bytes, with data descriptors; no seeking back.

    Zip64 fields appear if a size or an offset needs them; the end record is always a zip64 one. Layout
    and padding are those of torch's writer; the fields' meaning: PKWARE's APPNOTE, 4.3 and 4.5.3.
    """

    # In a narrow field this number means "see the zip64 one"; numbers from LIMIT on need that.
    MARK = LIMIT = 0xFFFFFFFF

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.directory = bytearray()
        self.count = 0

    def add(self, name: str, size: int, buffers: Iterable[memoryview]) -> None:
        encoded = name.encode()
        offset = self.file.tell()
        wide = [size, size] if size >= self.LIMIT else []
        wide += [offset] if offset >= self.LIMIT else []
        zip64 = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        padding = -(offset + 30 + len(encoded) + len(zip64) + 4) % 64
        extra = zip64 + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        lengths = len(encoded), len(extra)
        self.file.write(struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0x808, 0, 0, 0, 0, 0, 0, *lengths))
        self.file.write(encoded + extra)
        crc = written = 0
        for buffer in buffers:
            self.file.write(buffer)
            crc = zlib.crc32(buffer, crc)
            written += len(buffer)
        if written != size:
            raise ValueError(f"{name}: {written} bytes, expected {size}")
        self.file.write(struct.pack("<4sI2Q" if wide else "<4sI2I", b"PK\7\x08", crc, size, size))
        narrow = self._narrow(size), self._narrow(offset)
        self.directory += struct.pack("<4s6H3I", b"PK\1\2", 0, 0, 0x808, 0, 0, 0, crc, narrow[0], narrow[0])
        self.directory += struct.pack("<5H2I", len(encoded), len(zip64), 0, 0, 0, 0, narrow[1])
        self.directory += encoded + zip64
        self.count += 1

    def _narrow(self, number: int) -> int:
        return number if number < self.LIMIT else self.MARK

    def finish(self) -> None:
        start = self.file.tell()
        count, length = self.count, len(self.directory)
        end = start + length
        self.file.write(self.directory)
        self.file.write(
            struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x31E, 45, 0, 0, count, count, length, start)
            + struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
            + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, length, self._narrow(start), 0)
        )
