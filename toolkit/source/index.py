"""A checkpoint's index, and the files that hold its weights.

    SOURCE/
      model.safetensors.index.json, shards     or model.safetensors
      pytorch_model.bin.index.json, shards     or pytorch_model.bin

Links to files are followed, wherever they lead: the Hub's cache is made of them (snapshots/COMMIT/NAME ->
../../blobs/HASH), and shards may be spread over disks.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.errors import BloomdeskError
from runner.format.layout import is_file_name
from toolkit.io.disk import read_errors, reason
from toolkit.source.foreign import check_finished, what_is_there
from toolkit.source.lfs import LfsObject, find_objects, read_small_file

# Best first. Safetensors need no pickle, so they win if a source holds both whole.
FORMS = (
    ("model.safetensors.index.json", "model.safetensors", ".safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", ".bin"),
)
# Far above every BLOOM: the index of BLOOM-176B has 0.06 MB.
LARGEST_INDEX = 16 * 2**20


@dataclass(frozen=True)
class ShardList:
    """The files that hold the weights and, if there is an index, the name of the file of each key.

    `objects` are those of the files that are pointers of Git LFS.
    """

    files: tuple[Path, ...]
    index: Path | None = None
    weight_map: Mapping[str, str] | None = None
    objects: Mapping[Path, LfsObject] = field(default_factory=dict)

    def place(self, file: Path) -> Path:
        """Where the bytes of one of the files lie."""
        return self.objects[file].path if file in self.objects else file


class NoWeights(BloomdeskError):
    """Not a single file of a checkpoint's weights is there, nor an index."""


def find_shards(directory: Path, spared: Collection[str] = ()) -> ShardList:
    """The shards of the checkpoint in `directory`, by its index or by the usual name of a single file.

    Shards named in `spared` are left out of `files` if they are gone. Raises `NoWeights` if there are none, and
    another `BloomdeskError` if others are missing, or can't be trusted.
    """
    if not directory.is_dir():
        raise BloomdeskError(f"{directory} is not a directory")
    gaps = []
    for index_name, single, suffix in FORMS:
        index = directory / index_name
        if index.is_file():
            weight_map = parse_index(read_small_file(index, LARGEST_INDEX) or b"", suffix, str(index))
            files = [directory / name for name in sorted(set(weight_map.values()))]
            if (directory / single).is_file() and directory / single not in files:
                raise BloomdeskError(
                    f"{directory} holds two checkpoints, {single} and the shards of {index_name}; transformers would "
                    f"load {single}",
                    "move the one that you don't want out of the directory",
                )
            missing = [file.name for file in files if not file.is_file() and file.name not in spared]
            if not missing:
                there = tuple(file for file in files if file.is_file())
                check_finished(there)
                return ShardList(there, index, weight_map, find_objects(there))
            gaps.append(f"{len(missing)} of {len(files)} shards are missing, {missing[0]} first")
        if (directory / single).is_file():
            check_finished([directory / single])
            return ShardList((directory / single,), objects=find_objects([directory / single]))
    if gaps:
        raise BloomdeskError(
            f"{directory}: {gaps[0]}",
            "run what made it again, as bloomdesk download or export: that makes what is missing and nothing else",
        )
    wanted = ", ".join(name for form in FORMS for name in form[:2])
    raise NoWeights(f"{directory} has no weights: none of {wanted} is there")


def refuse_foreign(directory: Path) -> None:
    """Raise `BloomdeskError` if `directory` has other things than weights that bloomdesk reads, and not those too."""
    with read_errors(directory):
        names = {path.name for path in directory.iterdir()}
    if not names.isdisjoint(name for form in FORMS for name in form[:2]):
        return
    found = what_is_there(names, lambda name: read_small_file(directory / name, LARGEST_INDEX))
    if found is not None:
        raise BloomdeskError(f"{directory} holds {found[0]}", found[1])


def parse_index(data: bytes, suffix: str, where: str) -> dict[str, str]:
    """The file of each key, from the bytes of the index named `where`.

    Raises `BloomdeskError` if it is damaged, or names anything but files beside it that end in `suffix`.
    """
    try:
        weight_map = json.loads(data, object_pairs_hook=_without_repeats)["weight_map"]
        names = sorted(set(weight_map.values()), key=str)
        if not names:
            raise ValueError("its weight_map is empty")
        if not all(map(str.isprintable, weight_map)):
            raise ValueError("its weight_map has keys that are not printable")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {reason(error)}"
        raise BloomdeskError(f"{where} is not a sound index: {what}") from None
    for name in names:
        # Plain names only: an index may come from anywhere and must not point out of its directory.
        if not is_file_name(name) or not name.endswith(suffix):
            raise BloomdeskError(
                f"{where}: {str(name)[:120]!r} is not the name of a shard beside it, which ends in {suffix}",
                "do not use this checkpoint: a sound one names only its own files",
            )
    return weight_map


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result
