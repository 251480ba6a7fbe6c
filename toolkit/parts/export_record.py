"""bloomdesk-export.json: what an exported checkpoint holds, so that it can be checked, and resumed by its content.

    HUB_DIR/
      bloomdesk-export.json                 this record, written before all else
      model.safetensors.index.json          small files, each by its hash
      config.json, tokenizer.json, ...
      model-00001-of-00072.safetensors      shards, each by the hashes of its tensors
      ...

The hashes follow from the prepared directory's manifest, so they are known before a shard is written.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.errors import BloomdeskError, in_shell
from runner.format.digest import digest
from runner.format.layout import is_file_name
from runner.format.manifest import CompanionRecord
from runner.format.part_record import TensorRecord
from runner.format.safetensors import BYTES_PER_ELEMENT, MAX_AXES, encode_header
from toolkit.io.disk import read_if_exists, reason

EXPORT_RECORD = "bloomdesk-export.json"
FORMAT = "bloomdesk-export"
FORMAT_VERSION = 1
# That of BLOOM-176B has 0.2 MB.
LARGEST_RECORD = 16 * 2**20


@dataclass(frozen=True)
class ShardRecord:
    """A shard as it should be: its tensors by key, in the order of the file."""

    file: str
    tensors: tuple[TensorRecord, ...]

    @cached_property
    def header(self) -> bytes:
        """The shard's first bytes, up to its data."""
        return encode_header(tensor.described for tensor in self.tensors)

    @property
    def size(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


class UnsoundExportRecord(BloomdeskError):
    """The record's bytes are not those that were written."""


@dataclass(frozen=True)
class ExportRecord:
    """All that an export holds; `fingerprint` is that of the manifest, the same for every form of the weights."""

    fingerprint: str | None
    shards: tuple[ShardRecord, ...]
    small_files: tuple[CompanionRecord, ...]

    @property
    def records(self) -> tuple[ShardRecord | CompanionRecord, ...]:
        """All records, shards first."""
        return (*self.shards, *self.small_files)

    def to_json(self) -> str:
        """The record's text; the same record always gives the same text."""
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "shards": [_shard_body(shard) for shard in self.shards],
            "small_files": [asdict(record) for record in self.small_files],
        }
        return json.dumps({**body, "sha256": digest(body)}, indent=1) + "\n"


def load_export_record(directory: Path) -> ExportRecord | None:
    """The record of the export in `directory`, or None if there is none.

    Raises `UnsoundExportRecord` if it is damaged, another `BloomdeskError` if it can't be read.
    """
    path = directory / EXPORT_RECORD
    data = read_if_exists(path, LARGEST_RECORD)
    if data is None:
        return None
    try:
        return _decode(json.loads(data))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UnsoundExportRecord(
            f"{path} is not a sound export record: {reason(error)}",
            "run the same bloomdesk export again: it compares every shard and writes the record anew",
        ) from None


def not_as_exported(path: Path, key: str = "") -> BloomdeskError:
    """The error for a source that is an export, and whose file, or tensor in it, is not the recorded one."""
    return BloomdeskError(
        f"{path}{f': {key}' if key else ''} is damaged or has changed: it is not what {EXPORT_RECORD} records",
        f"bloomdesk verify {in_shell(path.parent)} names all such files; if you have changed them yourself, "
        f"delete {EXPORT_RECORD}",
    )


def _shard_body(shard: ShardRecord) -> dict[str, Any]:
    return {"file": shard.file, "size": shard.size, "tensors": [asdict(tensor) for tensor in shard.tensors]}


def _decode(body: dict[str, Any]) -> ExportRecord:
    if body["format"] != FORMAT or body["format_version"] != FORMAT_VERSION:
        raise ValueError(f"its format is not {FORMAT} {FORMAT_VERSION}")
    if body.pop("sha256") != digest(body):
        raise ValueError("its own checksum does not match: it was edited or damaged")
    shards = tuple(ShardRecord(each["file"], tuple(map(_tensor, each["tensors"]))) for each in body["shards"])
    small = tuple(CompanionRecord(**each) for each in body["small_files"])
    names = [record.file for record in (*shards, *small)]
    if not shards or len(set(names)) != len(names) or not all(map(is_file_name, names)):
        raise ValueError("it lists no shards, or names that are none, or one of them twice")
    for shard, each in zip(shards, body["shards"], strict=True):
        if len({tensor.name for tensor in shard.tensors}) != len(shard.tensors) or digest(
            _shard_body(shard)
        ) != digest(each):
            raise ValueError(f"{shard.file} is recorded with a size or with fields that it cannot have")
    for record in small:
        if type(record.size) is not int or record.size < 0:
            raise ValueError(f"{record.file} has no size")
        _check_hash(record.xxh3_128)
    return ExportRecord(body["fingerprint"], shards, small)


def _tensor(entry: dict[str, Any]) -> TensorRecord:
    tensor = TensorRecord(entry["name"], entry["dtype"], tuple(entry["shape"]), entry["xxh3_128"])
    _check_hash(tensor.xxh3_128)
    fits = len(tensor.shape) <= MAX_AXES and all(type(n) is int and 0 <= n < 2**63 for n in tensor.shape)
    if not fits or tensor.dtype not in BYTES_PER_ELEMENT or not isinstance(tensor.name, str):
        raise ValueError("an entry is no tensor")
    return tensor


def _check_hash(text: str) -> None:
    if not re.fullmatch(r"[0-9a-f]{32}", text):
        raise ValueError(f"{text!r} is not a hash")
