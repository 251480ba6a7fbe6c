"""The source shards of a checkpoint as a table of tensors: where their bytes lie, with nothing loaded.

    SOURCE/
      model.safetensors.index.json, shards     or model.safetensors
      pytorch_model.bin.index.json, shards     or pytorch_model.bin

A `.bin` is a stored zip: a pickle that describes the tensors, and a record of plain bytes for each storage.
The pickle is read as data, see state_pickle.py, and what it says of the bytes is checked against the zip.

Links to files are followed, wherever they lead: the Hub's cache is made of them (snapshots/COMMIT/NAME ->
../../blobs/HASH), and shards may be spread over disks. What is no regular file in the end, as a pipe or a
device, is refused unopened.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from runner.errors import BloomdeskError
from runner.format.hyperparameters import DTYPES
from runner.format.layout import is_file_name
from runner.format.safetensors import open_regular, read_header, read_small
from toolkit.source.state_pickle import LARGEST_PICKLE, NotWeights, StoredTensor, read_state

# Best first. Safetensors need no pickle, so they win where a source holds both whole.
FORMS = (
    ("model.safetensors.index.json", "model.safetensors", ".safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", ".bin"),
)
# Far above every BLOOM: the index of BLOOM-176B has 0.06 MB, the directory of a zip that holds all of it 0.1 MB.
LARGEST_INDEX = 16 * 2**20
LARGEST_DIRECTORY = 4 * 2**20
# What describes the tensors stands first in both kinds of file; that of all of BLOOM-176B in one file has 0.1 MB.
HEAD_BYTES = 2**20


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a source shard: its bytes, row-major and little endian, are `[offset, offset + nbytes)`.

    `dtype` is the safetensors name, or torch's own where safetensors has none.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ShardList:
    """The files that hold the weights, and, where an index says so, the file of each key."""

    files: tuple[Path, ...]
    index: Path | None = None
    weight_map: Mapping[str, str] | None = None


def read_source(directory: Path) -> dict[str, SourceTensor]:
    """Every tensor of the checkpoint in `directory`, by key; raises as `find_shards` and `read_listed` do."""
    return read_listed(find_shards(directory))


def read_listed(shards: ShardList) -> dict[str, SourceTensor]:
    """Every tensor of the listed files, by key.

    Raises `BloomdeskError` where files are unsound, of an unknown kind, or hold other tensors than the index says.
    """
    tensors: dict[str, SourceTensor] = {}
    for file in shards.files:
        tensors.update(read_member(shards, file))
    return tensors


def read_member(shards: ShardList, file: Path) -> dict[str, SourceTensor]:
    """The tensors of one of the listed files, which are those that the index promises."""
    found = read_shard(file)
    if shards.weight_map is not None:
        promised = {key for key, name in shards.weight_map.items() if name == file.name}
        _check_against_index(f"{shards.index} disagrees with the shards: {file.name}", promised, set(found))
    return found


def common_dtype(tensors: Mapping[str, SourceTensor]) -> str:
    """The one dtype of all tensors; `BloomdeskError` where they differ or it is none of `DTYPES`."""
    first: SourceTensor | None = None
    for tensor in tensors.values():
        first = first or tensor
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(DTYPES)
            raise BloomdeskError(f"{tensor.file}: {tensor.key} is {tensor.dtype}, expected one of {allowed}")
        if tensor.dtype != first.dtype:
            raise BloomdeskError(
                f"the source mixes dtypes: {first.key} is {first.dtype}, {tensor.key} is {tensor.dtype}"
            )
    if first is None:
        raise BloomdeskError("the source's weights hold no tensors")
    return first.dtype


def find_shards(directory: Path, spared: Collection[str] = ()) -> ShardList:
    """The shards of the checkpoint in `directory`, by its index or by the usual name of a single file.

    Shards named in `spared` are left out of `files` where they are gone. Raises `BloomdeskError` where there are
    no weights, or others are missing.
    """
    if not directory.is_dir():
        raise BloomdeskError(f"{directory} is not a directory")
    gaps = []
    for index_name, single, suffix in FORMS:
        index = directory / index_name
        if index.is_file():
            shards = _by_index(index, suffix)
            missing = [file.name for file in shards.files if not file.is_file() and file.name not in spared]
            if not missing:
                return replace(shards, files=tuple(file for file in shards.files if file.is_file()))
            gaps.append(f"{len(missing)} of {len(shards.files)} shards are missing, {missing[0]} first")
        if (directory / single).is_file():
            return ShardList((directory / single,))
    if gaps:
        raise BloomdeskError(
            f"{directory}: {gaps[0]}", "run the download again: it fetches what is missing and nothing else"
        )
    wanted = ", ".join(name for form in FORMS for name in form[:2])
    raise BloomdeskError(f"{directory} has no weights: none of {wanted} is there")


def read_shard(path: Path) -> dict[str, SourceTensor]:
    """The tensors of one shard, by key; `BloomdeskError` where it is not a sound one of its kind."""
    if path.suffix == ".safetensors":
        return {
            entry.name: SourceTensor(entry.name, entry.dtype, entry.shape, path, entry.start, entry.nbytes)
            for entry in read_header(path).tensors.values()
        }
    return _read_bin(path)


def dtype_of_head(path: Path, head: bytes) -> str:
    """The one dtype of a shard's tensors, from its first `HEAD_BYTES` bytes; `path` only names it.

    Raises `BloomdeskError` if they describe no tensors, tensors of several dtypes, or other things than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            length = int.from_bytes(head[:8], "little")
            entries = json.loads(head[8 : 8 + length])
            dtypes = {key: entries[key]["dtype"] for key in entries if key != "__metadata__"}
        else:
            _check_first_bytes(path, head)
            name_length, extra_length = struct.unpack_from("<2H", head, 26)
            if not head[30 : 30 + name_length].endswith(b"/data.pkl"):
                raise ValueError("it does not begin with data.pkl")
            start = 30 + name_length + extra_length
            state = _read_pickle(path, head[start : start + LARGEST_PICKLE])
            dtypes = {key: tensor.storage.dtype for key, tensor in state.items()}
        if not all(map(str.isprintable, (*dtypes, *dtypes.values()))):
            raise ValueError("its tensors have names that no text shows")
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise BloomdeskError(
            f"the first bytes of {path} do not show the dtype of its tensors: {_reason(error)}",
            "fetch it with bloomdesk download, then run bloomdesk convert",
        ) from None
    return common_dtype({key: SourceTensor(key, dtype, (), path, 0, 0) for key, dtype in dtypes.items()})


def _by_index(index: Path, suffix: str) -> ShardList:
    try:
        body = json.loads(read_small(index, LARGEST_INDEX), object_pairs_hook=_without_repeats)
        weight_map = body["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names:
            raise ValueError("its weight_map is empty")
        if not all(map(str.isprintable, weight_map)):
            raise ValueError("its weight_map names tensors that no text shows")
    except OSError as error:
        raise BloomdeskError(f"{index}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BloomdeskError(
            f"{index} is not a sound index: {type(error).__name__}: {_reason(error)}"
        ) from None
    for name in names:
        # Plain names only: an index may come from anywhere and must not point out of its directory.
        if not is_file_name(name) or not name.endswith(suffix):
            raise BloomdeskError(f"{index}: {str(name)[:120]!r} is not the name of a shard beside it")
    return ShardList(tuple(index.parent / name for name in names), index, weight_map)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def _check_against_index(where: str, promised: set[str], found: set[str]) -> None:
    for keys, what in ((promised - found, "does not hold"), (found - promised, "also holds")):
        if keys:
            more = f" and {len(keys) - 1:,} more" if len(keys) > 1 else ""
            raise BloomdeskError(f"{where} {what} {min(keys)[:120]}{more}")


def _read_bin(path: Path) -> dict[str, SourceTensor]:
    try:
        with open_regular(path) as file:
            records, description = _read_zip(path, file)
    except OSError as error:
        raise BloomdeskError(f"{path}: cannot be read: {error.strerror}") from error
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        EOFError,
        ValueError,
        OverflowError,
        struct.error,
    ) as error:
        raise _unsound(path, _reason(error)) from None
    state = _read_pickle(path, description)
    return {key: _locate(path, key, tensor, records) for key, tensor in state.items()}


def _read_pickle(path: Path, description: bytes) -> dict[str, StoredTensor]:
    try:
        return read_state(description)
    except NotWeights as error:
        raise BloomdeskError(
            f"{path} is not only weights: its pickle asks for {str(error)[:120]!r}; nothing of it was run",
            "do not use this file unless you know where it comes from",
        ) from None
    except ValueError as error:
        raise _unsound(path, _reason(error)) from None


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
    """What lies where in the zip, every record at a place of its own before the directory."""
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
    """Where the tensor's bytes lie; what the pickle says is believed only where the zip says the same."""
    storage = tensor.storage
    start, size = records.get(f"data/{storage.record}", (0, -1))
    if size != storage.numel * storage.itemsize:
        raise _unsound(path, f"the record of {key[:120]} is not where or as large as its description says")
    return SourceTensor(key, storage.dtype, tensor.shape, path, start + tensor.begin, tensor.nbytes)


def _reason(error: Exception) -> str:
    """What the error says, short and without control characters: it may quote the file."""
    return str(error)[:200].encode("unicode_escape").decode()


def _unsound(path: Path, why: str) -> BloomdeskError:
    return BloomdeskError(
        f"{path} is not a sound .bin shard: {why}", "download it again; the download checks every file's hash"
    )
