"""A `.bin` shard of torch.save: a stored zip with a pickle that describes the tensors, and a record for each storage.

The pickle is read as data (state_pickle.py), and what it says of the bytes is checked against the zip.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from runner.errors import BloomdeskError
from runner.format.safetensors import open_regular
from toolkit.io.disk import read_errors, reason
from toolkit.source import state_pickle
from toolkit.source.state_pickle import LARGEST_PICKLE, NotWeights, StoredTensor, read_state
from toolkit.source.tensor import SourceTensor

# Far above every BLOOM: the directory of a zip that holds all of BLOOM-176B has 0.1 MB.
LARGEST_DIRECTORY = 4 * 2**20
# Gives a shard's bytes, which may be elsewhere.
Opened = Callable[[Path], AbstractContextManager[BinaryIO]]


def read_torch_zip(path: Path, opened: Opened = open_regular) -> dict[str, SourceTensor]:
    """The tensors of a `.bin` shard, by key; `BloomdeskError` if it can't be read or is not sound.

    `opened` gives its bytes.
    """
    records, description = _read_directory(path, opened)
    state = _read_pickle(path, description)
    return {key: _locate(path, key, tensor, records) for key, tensor in state.items()}


def names_beside_state(path: Path) -> tuple[str, ...]:
    """What else a `.bin` that can be read holds beside the table of its tensors."""
    return state_pickle.names_beside_state(_read_directory(path)[1])


def _read_directory(path: Path, opened: Opened = open_regular) -> tuple[dict[str, tuple[int, int]], bytes]:
    try:
        with read_errors(path), opened(path) as file:
            return _read_zip(path, file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        raise _unsound(path, reason(error)) from None


def read_head(path: Path, head: bytes) -> dict[str, StoredTensor]:
    """The tensors that a shard's first bytes describe; raises `ValueError` and others if they show none."""
    _check_first_bytes(path, head)
    name_length, extra_length = struct.unpack_from("<2H", head, 26)
    if not head[30 : 30 + name_length].endswith(b"/data.pkl"):
        raise ValueError("it does not begin with data.pkl")
    start = 30 + name_length + extra_length
    return _read_pickle(path, head[start : start + LARGEST_PICKLE])


def _read_pickle(path: Path, description: bytes) -> dict[str, StoredTensor]:
    try:
        return read_state(description)
    except NotWeights as error:
        raise BloomdeskError(
            f"{path} is not only weights: its pickle asks for {str(error)[:120]!r}; nothing of it was run",
            "do not use this file unless you know where it comes from",
        ) from None
    except ValueError as error:
        raise _unsound(path, reason(error)) from None


class _BoundedReads:
    """A file for zipfile, which would allocate as much as a damaged zip asks for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size > LARGEST_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory claims {size:,} bytes")
        return self._file.read(size if size >= 0 else LARGEST_DIRECTORY)


def _read_zip(path: Path, file: BinaryIO) -> tuple[dict[str, tuple[int, int]], bytes]:
    """Each record's first byte and length, by its name in the root folder; and the pickle of the tensors."""
    _check_first_bytes(path, file.read(4))
    with zipfile.ZipFile(_BoundedReads(file)) as container:  # type: ignore[arg-type]
        records = _records(file, container)
        names = {name.partition("/")[2]: info for name, info in container.NameToInfo.items()}
        if "byteorder" in records and (
            records["byteorder"][1] != 6 or container.read(names["byteorder"]) != b"little"
        ):
            raise zipfile.BadZipFile("its tensors are not little endian")
        if "data.pkl" not in records:
            raise zipfile.BadZipFile("it has no data.pkl, so it is no file of torch.save")
        if records["data.pkl"][1] > LARGEST_PICKLE:
            raise zipfile.BadZipFile(f"its data.pkl claims {records['data.pkl'][1]:,} bytes")
        return records, container.read(names["data.pkl"])


def _check_first_bytes(path: Path, start: bytes) -> None:
    if not start:
        raise _unsound(path, "it is empty")
    if start[:1] == b"\x80":
        raise BloomdeskError(
            f"{path} is in torch's old format from before 2020, which bloomdesk does not read",
            "load it with torch and save it again, or use a revision of the model that has safetensors",
        )
    if start[:4] != b"PK\3\4":
        raise zipfile.BadZipFile("it does not begin as a zip of torch.save does")


def _records(file: BinaryIO, container: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
    """First byte and length of each record of the zip; no two overlap, and all precede the directory."""
    infos = container.infolist()
    places = sorted((*_place(file, info), info.header_offset, info.filename) for info in infos)
    position = 0
    for _, end, header, name in places:
        if header < position or end > container.start_dir:
            raise zipfile.BadZipFile(f"the record {name[:120]!r} lies over others")
        position = end
    if len({info.filename for info in infos}) != len(infos):
        raise zipfile.BadZipFile("two of its records have one name")
    if len({info.filename.partition("/")[0] for info in infos}) > 1:
        raise zipfile.BadZipFile("its records are not in one folder")
    return {name.partition("/")[2]: (start, end - start) for start, end, _, name in places}


def _place(file: BinaryIO, info: zipfile.ZipInfo) -> tuple[int, int]:
    """The first byte of a record's data and the one after its last, by the record's own header."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise zipfile.BadZipFile(f"the record {info.filename!r} is compressed or encrypted")
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise zipfile.BadZipFile(f"the record {info.filename!r} is not where the zip's directory says")
    name_length, extra_length = struct.unpack("<2H", header[26:])
    if file.read(name_length) != info.orig_filename.encode():
        raise zipfile.BadZipFile(f"the record {info.filename!r} has another name at its place")
    start = info.header_offset + 30 + name_length + extra_length
    return start, start + info.file_size


def _locate(
    path: Path, key: str, tensor: StoredTensor, records: Mapping[str, tuple[int, int]]
) -> SourceTensor:
    """Where the tensor's bytes lie; what the pickle says must agree with the zip."""
    storage = tensor.storage
    start, size = records.get(f"data/{storage.record}", (0, -1))
    if size != storage.numel * storage.itemsize:
        raise _unsound(path, f"the record of {key[:120]} is not where or as large as its description says")
    begin = start + tensor.begin
    return SourceTensor(key, storage.dtype, tensor.shape, path, begin, tensor.nbytes, tensor.strides)


def _unsound(path: Path, why: str) -> BloomdeskError:
    return BloomdeskError(
        f"{path} is not a sound .bin shard: {why}", "download it again; the download checks every file's hash"
    )
