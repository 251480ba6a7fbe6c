"""The figures of a prepared directory, from its manifest and the sizes of its files, so they take no time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runner.format.coded import PLAIN
from runner.format.layout import part_specs, pass_nbytes
from runner.format.manifest import Manifest
from runner.format.safetensors import BYTES_PER_ELEMENT
from runner.format.slice_set import SliceSet, find_slices
from toolkit.commands.verify import refuse_download
from toolkit.parts.check import Unread, quick_check
from toolkit.parts.destination import missing_parts
from toolkit.parts.part import part_size


@dataclass(frozen=True)
class Info:
    """A prepared directory in figures.

    `bytes` are those of the recorded files, `pass_bytes` the weights that one pass reads once all parts are made,
    `ratio` these against those of a plain directory, `kv_cache_bytes_per_token` what each token of prompt and output
    adds to memory. `damaged` are recorded files that are missing, or whose size is another; `unread` are those of which
    the system does not tell. Sizes of parts that a lossless directory lacks are estimates from above. Those of a slice
    are its own; `slices` are all of the checkpoint's that were found.
    """

    directory: Path
    manifest: Manifest
    damaged: tuple[str, ...] = ()
    unread: tuple[Unread, ...] = ()
    slices: SliceSet | None = None

    @property
    def parameters(self) -> int:
        """Elements of all tensors of the whole model."""
        specs = part_specs(self.manifest.model)
        return sum(math.prod(shape) for spec in specs for shape in spec.tensors.values())

    @property
    def plain_bytes(self) -> int:
        """Bytes of all its tensors, uncoded."""
        return sum(spec.nbytes(self.manifest.model.dtype) for spec in self.manifest.specs)

    @property
    def pass_bytes(self) -> int:
        stored, model = self.stored_bytes, self.manifest.model
        whole = self.parameters * BYTES_PER_ELEMENT[model.dtype]
        return stored if model.tie_word_embeddings else stored * pass_nbytes(model) // whole

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        manifest = self.manifest
        if manifest.form == PLAIN:
            return self.plain_bytes
        made = sum(tensor.nbytes for record in manifest.parts.values() for tensor in record.tensors)
        missing = missing_parts(manifest)
        return made + sum(part_size(spec, manifest.model.dtype, manifest.form) for spec in missing)

    @property
    def ratio(self) -> float:
        return self.stored_bytes / self.plain_bytes

    @property
    def kv_cache_bytes_per_token(self) -> int:
        model = self.manifest.model
        return 2 * model.n_layer * model.hidden_size * BYTES_PER_ELEMENT[model.dtype]

    @property
    def bytes(self) -> int:
        return sum(record.size for record in self.manifest.records)

    @property
    def places(self) -> list[dict[str, Any]]:
        """Of each slice where it is now, or None if it was not found, and where it was made, or None."""
        found, made_in = self.slices.directories if self.slices else {}, self.manifest.places
        return [
            {
                "index": index,
                "directory": str(found[index]) if index in found else None,
                "made_in": made_in[index] if made_in else None,
            }
            for index in range(self.slices.count if self.slices else 0)
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything for `--json`."""
        manifest = self.manifest
        return {
            "directory": str(self.directory),
            "format_version": manifest.format_version,
            "coding": manifest.form,
            "complete": not manifest.missing and not self.damaged and not self.unread,
            "damaged": list(self.damaged),
            "unread": [item.file for item in self.unread],
            **({"slice": asdict(manifest.slice), "slices": self.places} if manifest.slice else {}),
            "fingerprint": manifest.fingerprint,
            "source_fingerprint": manifest.source_fingerprint,
            "missing": list(manifest.missing),
            "source": asdict(manifest.source),
            **({"unproven_shards": list(manifest.unproven_shards)} if manifest.slice else {}),
            "model": manifest.model.recorded,
            "parts": len(manifest.parts),
            "parameters": self.parameters,
            "bytes": self.bytes,
            "pass_bytes": self.pass_bytes,
            "ratio": round(self.ratio, 4),
            "kv_cache_bytes_per_token": self.kv_cache_bytes_per_token,
        }


def inspect(directory: Path, also: Sequence[Path] = ()) -> Info:
    """The figures of `directory`; `BloomdeskError` if it has no sound manifest.

    If it is a slice, the others are looked for as `find_slices` does, in `also` first.
    """
    refuse_download(directory)
    slices = find_slices(directory, also)
    manifest = slices.first
    found = [quick_check(directory / record.file, record, by_header=False) for record in manifest.records]
    damaged = tuple(item.file for each in found for item in each.damage)
    return Info(
        directory, manifest, damaged, tuple(item for each in found for item in each.unchecked), slices
    )
