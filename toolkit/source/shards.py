"""The source shards of a checkpoint as a table of tensors: where their bytes lie, with nothing loaded.

What is no regular file in the end, as a pipe or a device, is refused unopened.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.safetensors import open_regular, read_header
from toolkit.io.disk import reason
from toolkit.source.index import ShardList, find_shards
from toolkit.source.tensor import SourceTensor
from toolkit.source.torch_zip import Opened, read_head, read_torch_zip

# What describes the tensors stands first in both kinds of file; that of all of BLOOM-176B in one file has 0.1 MB.
HEAD_BYTES = 2**20


def read_source(directory: Path) -> dict[str, SourceTensor]:
    """Every tensor of the checkpoint in `directory`, by key; raises as `find_shards` and `read_listed` do."""
    return read_listed(find_shards(directory))


def read_listed(shards: ShardList) -> dict[str, SourceTensor]:
    """Every tensor of the listed files, by key.

    Raises `BloomdeskError` if files are unsound, of an unknown kind, or hold other tensors than the index says.
    """
    tensors: dict[str, SourceTensor] = {}
    for file in shards.files:
        tensors.update(read_member(shards, file))
    return tensors


def read_member(shards: ShardList, file: Path) -> dict[str, SourceTensor]:
    """The tensors of one of the listed files, which are those that the index promises."""
    found = read_shard(file, shards.place(file))
    check_member(shards, file, found)
    return found


def check_member(shards: ShardList, file: Path, found: Mapping[str, SourceTensor]) -> None:
    """Raise `BloomdeskError` if the tensors that were `found` in one of the files are not those of the index."""
    if shards.weight_map is not None:
        promised = {key for key, name in shards.weight_map.items() if name == file.name}
        _check_against_index(f"{shards.index} disagrees with the shards: {file.name}", promised, set(found))


def read_shard(
    path: Path, place: Path | None = None, opened: Opened = open_regular
) -> dict[str, SourceTensor]:
    """The tensors of one shard, whose bytes may lie at another `place`, by key; `opened` gives the first of them.

    Raises `BloomdeskError` if it is not a sound one of its kind.
    """
    place = place or path
    if path.suffix == ".safetensors":
        found = {
            entry.name: SourceTensor(entry.name, entry.dtype, entry.shape, path, entry.start, entry.nbytes)
            for entry in read_header(place, opened).tensors.values()
        }
    else:
        found = read_torch_zip(place, opened)
    if place == path:
        return found
    return {key: replace(tensor, file=path, object=place) for key, tensor in found.items()}


def read_head_of_shard(path: Path, head: bytes) -> dict[str, SourceTensor]:
    """A shard's tensors by key, with their dtypes alone, from its first `HEAD_BYTES` bytes; `path` only names it.

    Raises `BloomdeskError` if they describe no tensors, or other things than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            length = int.from_bytes(head[:8], "little")
            entries = json.loads(head[8 : 8 + length])
            dtypes = {key: entries[key]["dtype"] for key in entries if key != "__metadata__"}
        else:
            state = read_head(path, head)
            dtypes = {key: tensor.storage.dtype for key, tensor in state.items()}
        if not all(map(str.isprintable, (*dtypes, *dtypes.values()))):
            raise ValueError("its tensors have names that no text shows")
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise BloomdeskError(
            f"the first bytes of {path} do not show the dtype of its tensors: {reason(error)}",
            "fetch it with bloomdesk download, then run bloomdesk convert",
        ) from None
    return {key: SourceTensor(key, dtype, (), path, 0, 0) for key, dtype in dtypes.items()}


def _check_against_index(where: str, promised: set[str], found: set[str]) -> None:
    for keys, what in ((promised - found, "does not hold"), (found - promised, "also holds")):
        if keys:
            more = f" and {len(keys) - 1:,} more" if len(keys) > 1 else ""
            raise BloomdeskError(f"{where} {what} {min(keys)[:120]}{more}")
