"""The source shards of a checkpoint as a table of tensors: where their bytes lie, with nothing loaded.

    SOURCE/
      model.safetensors.index.json, shards     or model.safetensors
      pytorch_model.bin.index.json, shards     or pytorch_model.bin

A `.bin` is a stored zip: a pickle that describes the tensors, and a record of plain bytes for each storage.
The pickle is only ever read as weights, and where it says that the bytes lie is checked against the zip.
"""

from __future__ import annotations

import json
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from runner.errors import BloomdeskError
from runner.header import read_header
from runner.prepared import DTYPES

# Best first. Safetensors need no pickle, so they win where a source holds both whole.
FORMS = (
    ("model.safetensors.index.json", "model.safetensors", ".safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", ".bin"),
)
LARGEST_INDEX = 64 * 2**20
LARGEST_DESCRIPTION = 16 * 2**20  # of a zip's directory or pickle; a whole BLOOM in one file takes 0.1 MB
# All that the pickle of a state dict needs to name. torch allows more, some of which can be made to take memory.
PICKLE_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch(\.storage)? \w+Storage"
)
PICKLE_CALLS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


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
    """Every tensor of the checkpoint in `directory`, by key.

    Raises `BloomdeskError` where there are no weights, files are missing, unsound or of an unknown kind,
    or hold other tensors than the index says.
    """
    shards = find_shards(directory)
    tensors: dict[str, SourceTensor] = {}
    for file in shards.files:
        found = read_shard(file)
        if shards.weight_map is not None:
            promised = {key for key, name in shards.weight_map.items() if name == file.name}
            _check_against_index(
                f"{shards.index} disagrees with the shards: {file.name}", promised, set(found)
            )
        tensors.update(found)
    return tensors


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


def find_shards(directory: Path) -> ShardList:
    """The shards of the checkpoint in `directory`, by its index or by the usual name of a single file."""
    if not directory.is_dir():
        raise BloomdeskError(f"{directory} is not a directory")
    gaps = []
    for index_name, single, suffix in FORMS:
        index = directory / index_name
        if index.is_file():
            shards = _by_index(index, suffix)
            missing = [file.name for file in shards.files if not file.is_file()]
            if not missing:
                return shards
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


def _by_index(index: Path, suffix: str) -> ShardList:
    try:
        with index.open("rb") as file:
            text = file.read(LARGEST_INDEX + 1)
        if len(text) > LARGEST_INDEX:
            raise ValueError(f"it is larger than {LARGEST_INDEX:,} bytes")
        body = json.loads(text, object_pairs_hook=_without_repeats)
        weight_map = body["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names:
            raise ValueError("its weight_map is empty")
    except OSError as error:
        raise BloomdeskError(f"{index}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BloomdeskError(f"{index} is not a sound index: {type(error).__name__}: {error}") from None
    for name in names:
        # Plain names only: an index may come from anywhere and must not point out of its directory.
        plain = isinstance(name, str) and re.fullmatch(r"[^./\\:\0][^/\\:\0]*", name)
        if not plain or not name.endswith(suffix):
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
            raise BloomdeskError(f"{where} {what} {min(keys)}{more}")


def _read_bin(path: Path) -> dict[str, SourceTensor]:
    try:
        with path.open("rb") as file:
            records, description = _read_zip(path, file)
    except OSError as error:
        raise BloomdeskError(f"{path}: cannot be read: {error.strerror}") from error
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, struct.error) as error:
        raise _unsound(path, str(error)) from None
    _check_pickle(path, description)
    return {key: _locate(path, key, value, records) for key, value in _describe(path).items()}


class _BoundedReads:
    """A file for zipfile, which would allocate as much as a damaged zip asks for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size > LARGEST_DESCRIPTION:
            raise zipfile.BadZipFile(f"its directory claims {size:,} bytes")
        return self._file.read(size if size >= 0 else LARGEST_DESCRIPTION)


def _read_zip(path: Path, file: BinaryIO) -> tuple[dict[int, int], bytes]:
    """Where each storage's bytes start -> how many they are; and the pickle that describes the tensors."""
    start = file.read(4)
    if not start:
        raise _unsound(path, "it is empty")
    if start[:1] == b"\x80":
        raise BloomdeskError(
            f"{path} is in torch's old format from before 2020, which bloomdesk does not read",
            "load it with torch and save it again, or use a revision of the model that has safetensors",
        )
    with zipfile.ZipFile(_BoundedReads(file)) as container:  # type: ignore[arg-type]
        places = [(*_place(file, info), info) for info in container.infolist()]
        places.sort(key=lambda place: place[:2])
        position = 0
        for _, end, info in places:
            if info.header_offset < position or end > container.start_dir:
                raise zipfile.BadZipFile(f"the record {info.filename!r} lies over others")
            position = end
        names = [info.filename for info in container.infolist()]
        if len(set(names)) != len(names):
            raise zipfile.BadZipFile("two of its records have one name")
        by_name = {
            name.partition("/")[2]: info for name, info in zip(names, container.infolist(), strict=True)
        }
        if "byteorder" in by_name and container.read(by_name["byteorder"]) != b"little":
            raise zipfile.BadZipFile("its tensors are not little endian")
        if "data.pkl" not in by_name:
            raise zipfile.BadZipFile("it has no data.pkl, so it is no file of torch.save")
        if by_name["data.pkl"].file_size > LARGEST_DESCRIPTION:
            raise zipfile.BadZipFile(f"its data.pkl claims {by_name['data.pkl'].file_size:,} bytes")
        records = {at: end - at for at, end, info in places if "/data/" in info.filename}
        return records, container.read(by_name["data.pkl"])


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


def _check_pickle(path: Path, data: bytes) -> None:
    """Refuse a pickle that names anything but tensors, before anything interprets it."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            is_global = opcode.name == "GLOBAL"
            if opcode.name in PICKLE_CALLS or (is_global and not PICKLE_GLOBALS.fullmatch(argument)):
                what = argument if is_global else opcode.name
                raise BloomdeskError(
                    f"{path} is not only weights: its pickle asks for {str(what)[:120]!r}; nothing of it was run",
                    "do not use this file unless you know where it comes from",
                )
    except (ValueError, IndexError, struct.error, RecursionError) as error:
        raise _unsound(path, f"its data.pkl is no sound pickle ({error})") from None


def _describe(path: Path) -> dict[str, Any]:
    """The shard's tensors without their bytes, as torch reads them."""
    import torch

    try:
        # On the meta device nothing is read or allocated, and each storage notes where its record starts.
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # the pickle is anyone's; torch raises nearly every kind of error over it
        reason = str(error).strip().partition("\n")[0]
        raise _unsound(path, f"torch cannot read it as weights ({reason[:200]})") from None
    if not isinstance(state, dict):
        raise _unsound(path, "it does not hold a table of tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise _unsound(path, f"under {str(key)[:120]!r} it holds no tensor")
    return state


def _locate(path: Path, key: str, tensor: Any, records: Mapping[int, int]) -> SourceTensor:
    """Where the tensor's bytes lie; torch's word for it is believed only where the zip says the same."""
    import torch

    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise _unsound(path, f"{key} is not stored as one row-major run of bytes")
    storage = tensor.untyped_storage()
    start = getattr(storage, "_checkpoint_offset", None)
    size = records.get(start) if start is not None else None
    begin = tensor.storage_offset() * tensor.itemsize
    nbytes = tensor.numel() * tensor.itemsize
    if size is None or size != storage.nbytes() or begin + nbytes > size:
        raise _unsound(path, f"the record of {key} is not where or as large as its description says")
    dtype = names.get(tensor.dtype, str(tensor.dtype))
    return SourceTensor(key, dtype, tuple(tensor.shape), path, start + begin, nbytes)


def _unsound(path: Path, why: str) -> BloomdeskError:
    return BloomdeskError(
        f"{path} is not a sound .bin shard: {why}", "download it again; the download checks every file's hash"
    )
