"""The prepared directory: the contract between the toolkit that writes it and the runner that reads it.

    bloom/
      manifest.json                 version, source, hyperparameters, and per part: size, hashes, tensors, sources
      manifest.backup.json          the same bytes a second time, once the directory is complete
      embedding.safetensors         word_embeddings.weight, word_embeddings_layernorm.{weight,bias}
      block_00.safetensors ...      12 tensors each, `h.N.` stripped
      final_layernorm.safetensors   weight, bias
      config.json, tokenizer.json, tokenizer_config.json, special_tokens_map.json   as the source has them

Tensors lie in each part in the order in which a pass uses them. The manifest is rewritten after each part, so
"complete" is derived from it. In a lossless directory each matrix NAME is coded, row group by row group, and stored
as two tensors: NAME.strips says where each row group begins in NAME. docs/format.md is the long form.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from runner.errors import BloomdeskError
from runner.format.coded import (
    CODED_ALIGNMENT,
    CODED_DTYPE,
    LARGEST_CODED,
    LOSSLESS,
    PLAIN,
    Described,
    Shape,
    part_header,
)
from runner.format.hyperparameters import Hyperparameters, quoted
from runner.format.layout import (
    COMPANIONS,
    MANIFEST,
    REQUIRED_COMPANIONS,
    PartSpec,
    is_file_name,
    part_specs,
)
from runner.format.safetensors import MAX_HEADER_BYTES, read_small, tensor_nbytes

FORMAT = "bloomdesk-prepared"
FORMAT_VERSIONS = {PLAIN: 1, LOSSLESS: 2}
# Far above every BLOOM; they keep a damaged or hostile config from asking for absurd amounts of anything.
LARGEST_MANIFEST = 64 * 2**20


@dataclass(frozen=True)
class TensorRecord:
    """A tensor of a part as the manifest has it; `xxh3_128` is of the tensor's bytes."""

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
    """A file of the source that bytes of a part came from."""

    file: str
    sha256: str


@dataclass(frozen=True)
class PartRecord:
    """A part as written: its size and hash, header included, its tensors, and where they came from.

    `tensors` are those that the file stores, with the hashes of the stored bytes; `decoded` says what those that
    are coded decode to, with the hashes of the decoded bytes.
    """

    file: str
    size: int
    xxh3_128: str
    tensors: tuple[TensorRecord, ...]
    sources: tuple[SourceShard, ...]
    decoded: tuple[TensorRecord, ...] = ()

    @property
    def header(self) -> bytes:
        """The file's first bytes, up to its data; they follow from the rest."""
        stored = [tensor.described for tensor in self.tensors]
        return part_header(stored, [tensor.described for tensor in self.decoded])


@dataclass(frozen=True)
class CompanionRecord:
    """A small file that was carried over unchanged."""

    file: str
    size: int
    xxh3_128: str


@dataclass(frozen=True)
class Source:
    """Where a checkpoint came from; both are None for a local directory that no download recorded."""

    repo: str | None = None
    commit: str | None = None


@dataclass(frozen=True)
class Manifest:
    """manifest.json: what the directory holds so far, by file name; `form` is that of all parts."""

    model: Hyperparameters
    source: Source
    parts: Mapping[str, PartRecord] = field(default_factory=dict)
    companions: Mapping[str, CompanionRecord] = field(default_factory=dict)
    form: str = PLAIN

    @property
    def format_version(self) -> int:
        return FORMAT_VERSIONS[self.form]

    @property
    def missing(self) -> tuple[str, ...]:
        """Files that a whole prepared directory has and this manifest does not."""
        wanted = [spec.file for spec in part_specs(self.model)]
        return (*(file for file in wanted if file not in self.parts), *self._missing_companions)

    @property
    def _missing_companions(self) -> tuple[str, ...]:
        return tuple(file for file in REQUIRED_COMPANIONS if file not in self.companions)

    @property
    def records(self) -> tuple[PartRecord | CompanionRecord, ...]:
        """Everything recorded, parts first, each in the order of a pass."""
        return (*self.parts.values(), *self.companions.values())

    def with_part(self, record: PartRecord) -> Manifest:
        """This manifest with one more part, kept in the order of a pass."""
        parts = {**self.parts, record.file: record}
        order = [spec.file for spec in part_specs(self.model)]
        return replace(self, parts={file: parts[file] for file in order if file in parts})

    def to_json(self) -> str:
        """The manifest's text; the same manifest always gives the same text."""
        body = {
            "format": FORMAT,
            "format_version": self.format_version,
            **({} if self.form == PLAIN else {"coding": self.form}),
            "source": asdict(self.source),
            "model": asdict(self.model),
            "parts": [self._part_body(record) for record in self.parts.values()],
            "companions": [asdict(record) for record in self.companions.values()],
        }
        return json.dumps({**body, "sha256": _digest(body)}, indent=1) + "\n"

    def _part_body(self, record: PartRecord) -> dict[str, Any]:
        body = asdict(record)
        if self.form == PLAIN:
            del body["decoded"]
        return body

    @classmethod
    def from_json(cls, text: str, where: Path) -> Manifest:
        """The manifest in `text`, read from `where`.

        Raises `BloomdeskError` where it is no manifest, is of another format version, was changed after it
        was written, or describes files that no BLOOM of these hyperparameters has.
        """
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _unsound(where, f"it is not valid JSON ({error})") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise _unsound(where, f"its format is not {FORMAT!r}")
        version = body.get("format_version")
        if type(version) is not int or version not in FORMAT_VERSIONS.values():
            known = " and ".join(map(str, FORMAT_VERSIONS.values()))
            raise BloomdeskError(
                f"{where}: format version {quoted(version)}, this program reads {known}",
                "prepare the checkpoint again, or use the version of bloomdesk that wrote it",
            )
        claimed = body.pop("sha256", None)
        try:
            if claimed != _digest(body):
                raise ValueError("its own checksum does not match: it was edited or damaged")
            return _decode(body)
        except (KeyError, TypeError, ValueError, RecursionError, BloomdeskError) as error:
            why = (
                str(error)[:200].encode("unicode_escape").decode()
            )  # it may quote any text, also a terminal's codes
            raise _unsound(where, f"{type(error).__name__}: {why}") from None


def load_manifest(directory: Path, name: str = MANIFEST) -> Manifest:
    """The manifest of a prepared directory, complete or not; `BloomdeskError` where there is none to trust.

    `name` is `MANIFEST_BACKUP` to read the copy in its stead.
    """
    path = directory / name
    try:
        text = read_small(path, LARGEST_MANIFEST).decode()
    except FileNotFoundError:
        what = f"has no {name}" if directory.is_dir() else "is not a directory"
        raise BloomdeskError(
            f"{directory} is not a prepared checkpoint: it {what}",
            f"make one from a downloaded checkpoint: bloomdesk convert SOURCE {directory}",
        ) from None
    except UnicodeDecodeError:
        raise _unsound(path, "it is not UTF-8 text") from None
    except OSError as error:
        raise BloomdeskError(f"{path}: cannot be read: {error.strerror}") from error
    return Manifest.from_json(text, path)


def _digest(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _unsound(where: Path, why: str) -> BloomdeskError:
    return BloomdeskError(
        f"{where} is not a sound manifest: {why}",
        f"convert again into an empty directory, not {where.parent}",
    )


def _decode(body: dict[str, Any]) -> Manifest:
    model = Hyperparameters(**body["model"])
    form = body["coding"] if body["format_version"] != FORMAT_VERSIONS[PLAIN] else PLAIN
    if FORMAT_VERSIONS.get(form) != body["format_version"]:
        raise ValueError(f"its form is {quoted(form)}")
    if form == LOSSLESS and model.dtype != CODED_DTYPE:
        raise ValueError(f"its form is lossless, and its dtype is {model.dtype}")
    source = Source(**body["source"])
    for text in (source.repo, source.commit):
        if text is not None and not (isinstance(text, str) and text.isprintable() and len(text) < 200):
            raise ValueError("it does not say where it came from")
    specs = {spec.file: spec for spec in part_specs(model)}
    parts = [_decode_part(entry, specs, model.dtype, form) for entry in body["parts"]]
    companions = [CompanionRecord(**entry) for entry in body["companions"]]
    for record in (*parts, *companions):
        _check_record(record)
    unknown = {record.file for record in companions} - set(COMPANIONS)
    if unknown:
        raise ValueError(f"unknown companion files {sorted(unknown)}")
    for records in (parts, companions):
        if len({record.file for record in records}) != len(records):
            raise ValueError("a file is recorded twice")
    return Manifest(
        model,
        source,
        {record.file: record for record in parts},
        {record.file: record for record in companions},
        form,
    )


def _decode_part(entry: dict[str, Any], specs: Mapping[str, PartSpec], dtype: str, form: str) -> PartRecord:
    spec = specs[entry["file"]]
    known = {item.name for item in fields(PartRecord)} - ({"decoded"} if form == PLAIN else set())
    if set(entry) != known:
        raise ValueError(f"{spec.file} is recorded with unknown fields")
    tensors = _decode_tensors(entry["tensors"])
    decoded = _decode_tensors(entry["decoded"]) if form != PLAIN else ()
    names = {name for name, _, _ in spec.decoded(form)}
    coded = {tensor.name: tensor.shape[0] for tensor in tensors if tensor.name in names and tensor.shape}
    described = tuple(tensor.described for tensor in tensors)
    if set(coded) != names or described != spec.stored(dtype, coded):
        raise ValueError(f"{spec.file} does not list the tensors that the model needs")
    if tuple(tensor.described for tensor in decoded) != spec.decoded(form):
        raise ValueError(f"{spec.file} does not list what its tensors decode to")
    if not all(0 < size <= LARGEST_CODED and size % CODED_ALIGNMENT == 0 for size in coded.values()):
        raise ValueError(f"{spec.file} is recorded with a coded tensor of a size that it cannot have")
    sources = tuple(SourceShard(**shard) for shard in entry["sources"])
    for shard in sources:
        _check_hex(shard.sha256, 64)
        if not is_file_name(shard.file):
            raise ValueError(f"{spec.file} is of a source that is no file's name")
    record = PartRecord(spec.file, entry["size"], entry["xxh3_128"], tensors, sources, decoded)
    if type(record.size) is not int or not _is_possible(record):
        raise ValueError(f"{spec.file} is recorded with a size that it cannot have")
    return record


def _is_possible(record: PartRecord) -> bool:
    """Whether the size is that of the tensors and a header; a coded part's header has one length alone."""
    rest = record.size - sum(tensor.nbytes for tensor in record.tensors)
    return rest == len(record.header) if record.decoded else 8 < rest <= 8 + MAX_HEADER_BYTES


def _decode_tensors(entries: list[dict[str, Any]]) -> tuple[TensorRecord, ...]:
    tensors = tuple(TensorRecord(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in entries)
    for tensor in tensors:
        _check_hex(tensor.xxh3_128, 32)
        if not all(type(number) is int for number in tensor.shape):  # 8.0 == 8, and is no size
            raise ValueError(f"{quoted(tensor.name)} has no shape")
    return tensors


def _check_record(record: PartRecord | CompanionRecord) -> None:
    if type(record.size) is not int or not 0 <= record.size < 2**63:
        raise ValueError(f"{record.file} has no size")
    _check_hex(record.xxh3_128, 32)


def _check_hex(digest: str, length: int) -> None:
    if not re.fullmatch(rf"[0-9a-f]{{{length}}}", digest):
        raise ValueError(f"{quoted(digest)} is not a hash")
