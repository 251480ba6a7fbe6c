"""What the manifest records of a part: its tensors, what they were made from, and the JSON object that says so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from runner.format.coded import CODED_ALIGNMENT, LARGEST_CODED, LOSSLESS, PLAIN, ROW_GROUPS_SUFFIX
from runner.format.digest import digest
from runner.format.hyperparameters import Hyperparameters, quoted
from runner.format.layout import PartSpec, codings_of, is_file_name, part_header
from runner.format.quantised import QUANTISED_FORMS, SCALES_SUFFIX, Coding
from runner.format.safetensors import MAX_HEADER_BYTES, Described, Shape, tensor_nbytes
from runner.format.slices import Slice


@dataclass(frozen=True)
class TensorRecord:
    """A tensor of a part; `xxh3_128` is the hash of its bytes."""

    name: str
    dtype: str
    shape: Shape
    xxh3_128: str

    @property
    def described(self) -> Described:
        return self.name, self.dtype, self.shape

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class SourceShard:
    """A file of the source that a part was made from; `size` is None in manifests of earlier versions.

    It is not `checked` if only the rows of a slice came: its sha256 is what the Hub says then.
    """

    file: str
    sha256: str
    size: int | None = None
    checked: bool = True


@dataclass(frozen=True)
class PartRecord:
    """A part as written: size and hash of the whole file, its tensors, and what they were made from.

    `tensors` are those that the file stores, with hashes of the stored bytes; `decoded` are those that the coded ones
    decode to, with hashes of the decoded bytes. In fewer bits these are not what the source has: `originals` are its
    tensors, with hashes of their bytes.

    In a slice these have fewer rows. `wholes` are the matrices of which they are rows, as all slices together decode
    to them, and `whole_originals`, in fewer bits, what those were made from; none if they were never read whole. With
    these a slice needs no `originals` of its own.
    """

    file: str
    size: int
    xxh3_128: str
    tensors: tuple[TensorRecord, ...]
    sources: tuple[SourceShard, ...]
    decoded: tuple[TensorRecord, ...] = ()
    originals: tuple[TensorRecord, ...] = ()
    wholes: tuple[TensorRecord, ...] = ()
    whole_originals: tuple[TensorRecord, ...] = ()

    @property
    def is_proven(self) -> bool:
        """Whether the sha256 of every source shard was compared."""
        return all(shard.checked for shard in self.sources)

    @property
    def header(self) -> bytes:
        """The file's first bytes, up to its data; they follow from the record."""
        stored = [tensor.described for tensor in self.tensors]
        return part_header(stored, [tensor.described for tensor in self.decoded])

    @property
    def codings(self) -> dict[str, Coding]:
        """How each tensor that is stored in fewer bits is stored, by name."""
        return codings_of(
            [each.described for each in self.tensors], [each.described for each in self.decoded]
        )

    @property
    def weights(self) -> tuple[TensorRecord, ...]:
        """The tensors as a pass uses them, in the order of a pass: the coded ones decoded."""
        return self._with(self.decoded)

    @property
    def whole_weights(self) -> tuple[TensorRecord, ...]:
        """The same of all slices together, as an export has them; the own rows if only these are known."""
        return self._with(self.wholes or self.decoded)

    @property
    def source_tensors(self) -> tuple[TensorRecord, ...]:
        """The source's tensors that the part was made from, in the order of a pass, with hashes of uncoded bytes."""
        return self._with(self.whole_originals or self.wholes or self.originals or self.decoded)

    @property
    def source_rows(self) -> tuple[TensorRecord, ...]:
        """The same, but of matrices only the own rows."""
        return self._with(self.originals or self.decoded)

    def _with(self, others: Sequence[TensorRecord]) -> tuple[TensorRecord, ...]:
        """The stored tensors, those that have one of `others` replaced by it."""
        by_name = {tensor.name: tensor for tensor in others}
        beside = {name + suffix for name in by_name for suffix in (ROW_GROUPS_SUFFIX, SCALES_SUFFIX)}
        return tuple(by_name.get(each.name, each) for each in self.tensors if each.name not in beside)


def part_body(record: PartRecord, form: str, own: Slice | None) -> dict[str, Any]:
    """The record as a JSON object, in a manifest of this form and slice."""
    body = asdict(record)
    # Where earlier versions look, sizes would be unknown fields.
    body["sources"] = [
        {"file": shard.file, "sha256": shard.sha256, **({} if shard.checked else {"checked": False})}
        for shard in record.sources
    ]
    if form == PLAIN:
        del body["decoded"]
    if form not in QUANTISED_FORMS:
        del body["originals"]
    if own is None:
        del body["wholes"]
    if own is None or form not in QUANTISED_FORMS:
        del body["whole_originals"]
    return body


def shard_sizes(parts: Iterable[PartRecord]) -> list[dict[str, Any]]:
    """Each source shard whose size is known, once."""
    shards = {
        (shard.file, shard.sha256): shard.size
        for part in parts
        for shard in part.sources
        if shard.size is not None
    }
    return [{"file": file, "sha256": sha256, "size": size} for (file, sha256), size in sorted(shards.items())]


def part_from(
    entry: dict[str, Any],
    whole: PartSpec,
    model: Hyperparameters,
    form: str,
    own: Slice | None,
    sizes: Mapping[tuple[str, str], int],
) -> PartRecord:
    """The record in the JSON object `entry`, which must be one that this program writes for a part of these tensors.

    `whole` is the part without slices, `own` the slice if it is of one, and `sizes` are those of the source shards by
    name and sha256. Raises LookupError, TypeError or ValueError for what is not sound.
    """
    spec, dtype = whole.sliced(model, own), model.dtype
    tensors = _decode_tensors(spec.stored(dtype, _coded_sizes(entry, spec, form), form), entry["tensors"])
    decoded = _decode_tensors(spec.decoded(form, dtype), entry.get("decoded", ()))
    is_quantised = form in QUANTISED_FORMS
    # A slice of what is rounded already never saw what its own rows were made from.
    has_originals = is_quantised and (own is None or entry["originals"])
    originals = _decode_tensors(spec.decoded(form, dtype), entry["originals"]) if has_originals else ()
    of_all = [(name, dtype, shape) for name, shape in whole.matrices.items()]
    wholes, whole_originals = (
        _decode_tensors(of_all, entry[name]) if entry.get(name) else ()
        for name in ("wholes", "whole_originals")
    )
    if is_quantised and (len(wholes) != len(whole_originals) or len(originals or wholes) < len(decoded)):
        raise ValueError(f"{spec.file} is recorded without what its matrices were made from")
    sources = _decode_sources(entry, sizes)
    tensor_records = (tensors, sources, decoded, originals, wholes, whole_originals)
    record = PartRecord(spec.file, entry["size"], entry["xxh3_128"], *tensor_records)
    if digest(part_body(record, form, own)) != digest(entry):
        raise ValueError(
            f"{spec.file} is recorded with other tensors than the model has, or with unknown fields"
        )
    # The header of a coded part has one possible length, that of a plain part may be longer than ours.
    rest = record.size - sum(tensor.nbytes for tensor in tensors)
    if not (rest == len(record.header) if decoded else 8 < rest <= 8 + MAX_HEADER_BYTES):
        raise ValueError(f"{spec.file} is recorded with a size that it cannot have")
    return record


def _coded_sizes(entry: dict[str, Any], spec: PartSpec, form: str) -> dict[str, int]:
    """The bytes of each losslessly coded matrix of a part, by name."""
    matrices = spec.matrices if form == LOSSLESS else {}
    coded = {each["name"]: each["shape"][0] for each in entry["tensors"] if each["name"] in matrices}
    for name, size in coded.items():
        has_rows = matrices[name][0] > 0
        if (
            type(size) is not int
            or not has_rows <= size <= LARGEST_CODED * has_rows
            or size % CODED_ALIGNMENT
        ):
            raise ValueError(f"{spec.file} is recorded with a coded tensor of a size that it cannot have")
    return coded


def _decode_sources(entry: dict[str, Any], sizes: Mapping[tuple[str, str], int]) -> tuple[SourceShard, ...]:
    sources = tuple(
        SourceShard(
            each["file"],
            each["sha256"],
            sizes.get((each["file"], each["sha256"])),
            each.get("checked", True),
        )
        for each in entry["sources"]
    )
    for shard in sources:
        check_hash(shard.sha256, 64)
        if not is_file_name(shard.file):
            raise ValueError(f"{quoted(entry['file'])} has a source that is no file name")
    return sources


def _decode_tensors(expected: Sequence[Described], entries: Sequence[Any]) -> tuple[TensorRecord, ...]:
    """The expected tensors with the hashes of `entries`; whether the rest of these fits is not checked."""
    tensors = tuple(
        TensorRecord(*each, found["xxh3_128"]) for each, found in zip(expected, entries, strict=True)
    )
    for tensor in tensors:
        check_hash(tensor.xxh3_128, 32)
    return tensors


def check_hash(text: str, length: int) -> None:
    """Raise ValueError if `text` is no hash of `length` hexadecimal digits."""
    if not re.fullmatch(rf"[0-9a-f]{{{length}}}", text):
        raise ValueError(f"{quoted(text)} is not a hash")
