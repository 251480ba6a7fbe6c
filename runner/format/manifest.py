"""manifest.json: what a prepared directory holds, and proof that nobody has edited that.

    bloom/
      manifest.json                 version, source, hyperparameters, fingerprint, and per part: size, hashes, tensors,
                                    sources
      manifest.backup.json          the same bytes a second time, written after manifest.json
      embedding.safetensors         word_embeddings.weight, word_embeddings_layernorm.{weight,bias}
      block_00.safetensors ...      12 tensors each, `h.N.` stripped
      final_layernorm.safetensors   weight, bias
      head.safetensors              weight; only if the head is not the embedding
      config.json, tokenizer.json, tokenizer_config.json, special_tokens_map.json   as the source has them

The manifest is rewritten after each part; the directory is complete if nothing is missing in it. In a lossless
directory each matrix NAME is coded, row group by row group, and stored as two tensors: NAME.strips has the offsets of
the row groups in NAME. docs/format.md is the long form.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from runner.errors import BloomdeskError, explained, in_shell
from runner.format.coded import CODED_DTYPE, LOSSLESS, PLAIN
from runner.format.digest import digest
from runner.format.hyperparameters import Hyperparameters, quoted
from runner.format.layout import (
    COMPANIONS,
    LATER_COMPANIONS,
    MANIFEST,
    MANIFEST_BACKUP,
    REQUIRED_COMPANIONS,
    PartSpec,
    is_file_name,
    part_specs,
)
from runner.format.part_record import PartRecord, TensorRecord, check_hash, part_body, part_from, shard_sizes
from runner.format.quantised import INT4_FORM, INT8_FORM, QUANTISED_FORMS
from runner.format.safetensors import read_small
from runner.format.slices import Slice

FORMAT = "bloomdesk-prepared"
FORMAT_VERSIONS = {PLAIN: 1, LOSSLESS: 2, INT8_FORM: 4, INT4_FORM: 4}
# Of the first two forms, for what their readers would not expect: a head that is not tied to the embedding, several
# tokens that end a text, and later companions.
EXTENDED_VERSION = 3
# Of every form, if only a slice of each matrix is there.
SLICED_VERSION = 5
# Far above every BLOOM's, so that a damaged or hostile file cannot fill the memory.
LARGEST_MANIFEST = 64 * 2**20
# Error numbers of what is there in place of the file: a directory, a pipe or a device, a loop of links, gigabytes.
_NO_MANIFEST = (errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.EFBIG)


@dataclass(frozen=True)
<<<<<<< HEAD
=======
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


@dataclass(frozen=True)
>>>>>>> main
class CompanionRecord:
    """A small file that was copied unchanged from the source."""

    file: str
    size: int
    xxh3_128: str


@dataclass(frozen=True)
class Source:
    """Where a checkpoint came from; both fields are None for a local directory that no download recorded."""

    repo: str | None = None
    commit: str | None = None


@dataclass(frozen=True)
class Manifest:
    """What a directory holds so far, by file name; `form` is that of all parts.

    `samples` are hashes of a local source's shards while parts are missing, by file name. If only a `slice` of each
    matrix is there, `places` are the directories of all slices when they were made together, in order.
    """

    model: Hyperparameters
    source: Source
    parts: Mapping[str, PartRecord] = field(default_factory=dict)
    companions: Mapping[str, CompanionRecord] = field(default_factory=dict)
    form: str = PLAIN
    samples: Mapping[str, str] = field(default_factory=dict)
    slice: Slice | None = None
    places: tuple[str, ...] = ()

    @property
    def format_version(self) -> int:
        model = self.model
        if self.slice is not None:
            return SLICED_VERSION
        if self.form in QUANTISED_FORMS:
            return FORMAT_VERSIONS[self.form]
        is_extended = (
            not model.tie_word_embeddings
            or len(model.eos_token_ids) > 1
            or not self.companions.keys().isdisjoint(LATER_COMPANIONS)
        )
        return EXTENDED_VERSION if is_extended else FORMAT_VERSIONS[self.form]

    @property
    def specs(self) -> tuple[PartSpec, ...]:
        """The parts of the complete directory, in the order of a pass."""
        return part_specs(self.model, self.slice)

    @property
    def missing(self) -> tuple[str, ...]:
        """Files of a complete directory that this manifest does not record."""
        wanted = (*(spec.file for spec in self.specs), *REQUIRED_COMPANIONS)
        return tuple(file for file in wanted if file not in self.parts and file not in self.companions)

    def command(self, directory: Path) -> str:
        """The command that makes the rest of an unfinished directory."""
        form = "" if self.form == PLAIN else f" --form {self.form}"
        made_by = f"prepare {self.source.repo}" if self.source.repo else "convert SRC"
        return f"bloomdesk {made_by} {in_shell(directory)}{form}{self._slice_options}"

    @property
    def _slice_options(self) -> str:
        """What the command says of the slice."""
        if self.slice is None:
            return ""
        shares = (
            f" --shares {','.join(map(str, self.slice.shares))}" if len(set(self.slice.shares)) > 1 else ""
        )
        others = "".join(f" --also {in_shell(Path(place))}" for place in self.places[1:])
        return f"{others or f' --slice {self.slice}'}{shares}"

    @property
    def unproven_shards(self) -> tuple[str, ...]:
        """The source shards whose sha256 was never compared, because only the rows of a slice came."""
        found = {shard.file for part in self.parts.values() for shard in part.sources if not shard.checked}
        return tuple(sorted(found))

    @property
    def records(self) -> tuple[PartRecord | CompanionRecord, ...]:
        """All records: those of the parts in the order of a pass, then those of the companions."""
        return (*self.parts.values(), *self.companions.values())

    @property
    def fingerprint(self) -> str | None:
        """What distinguishes the weights that a pass uses from all others, whatever their files.

        The sha256 of the hyperparameters and of every tensor's name, dtype, shape and hash; None until all parts are
        made. Plain and lossless weights are the same; those in fewer bits are others. A slice has that of all slices
        together, or None if the hashes of whole matrices are not known.
        """
        return self._digest_of([part.whole_weights for part in self.parts.values()])

    @property
    def source_fingerprint(self) -> str | None:
        """The fingerprint that the source's own weights have: the same for all forms of one model."""
        return self._digest_of([part.source_tensors for part in self.parts.values()])

    def _digest_of(self, tensors: Sequence[Sequence[TensorRecord]]) -> str | None:
        specs = self.specs
        if any(spec.file not in self.parts for spec in specs):
            return None
        if self.slice is not None and not all(
            self.parts[spec.file].wholes for spec in specs if spec.matrices
        ):
            return None
        named = [
            [file, *asdict(tensor).values()]
            for file, of_part in zip(self.parts, tensors, strict=True)
            for tensor in of_part
        ]
        return digest({"model": self.model.recorded, "tensors": named})

    def with_part(self, record: PartRecord) -> Manifest:
        """This manifest with one more part, which gets its place in the order of a pass."""
        parts = {**self.parts, record.file: record}
        order = [spec.file for spec in self.specs]
        return replace(self, parts={file: parts[file] for file in order if file in parts})

    def to_json(self) -> str:
        """The manifest's text; the same manifest always gives the same text."""
        body = {
            "format": FORMAT,
            "format_version": self.format_version,
            **({} if self.form == PLAIN else {"coding": self.form}),
            **({} if self.slice is None else {"slice": asdict(self.slice), "places": list(self.places)}),
            "source": asdict(self.source),
            "model": self.model.recorded,
            "fingerprint": self.fingerprint,
            **({"source_fingerprint": self.source_fingerprint} if self.form in QUANTISED_FORMS else {}),
            "source_shards": shard_sizes(self.parts.values()),
            "parts": [part_body(record, self.form, self.slice) for record in self.parts.values()],
            "companions": [asdict(record) for record in self.companions.values()],
            **({"source_samples": dict(self.samples)} if self.samples and self.missing else {}),
        }
        return json.dumps({**body, "sha256": digest(body)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> Manifest:
        """The manifest in `text`, read from the file `where`.

        Raises `BloomdeskError` if it is no manifest, is of another format version, was changed after it was written,
        or describes files that no BLOOM of these hyperparameters has.
        """
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _unsound(where, f"it is not valid JSON ({error})") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise _unsound(where, f"its format is not {FORMAT!r}")
        claimed = body.pop("sha256", None)
        version = body.get("format_version")
        versions = sorted({*FORMAT_VERSIONS.values(), EXTENDED_VERSION, SLICED_VERSION})
        if type(version) is not int or version not in versions:
            known = " and ".join(map(str, versions))
            # A later version vouches for itself; damage does not.
            kind = BloomdeskError if claimed == digest(body) else UnsoundManifest
            raise kind(
                f"{where}: format version {quoted(version)}, this program reads {known}",
                "prepare the checkpoint again, or use the version of bloomdesk that wrote it",
            )
        try:
            if claimed != digest(body):
                raise ValueError("its own checksum does not match: it was edited or damaged")
            return _decode(body)
        except (LookupError, TypeError, ValueError, RecursionError, BloomdeskError) as error:
            # The error may quote any text of the file, a terminal's codes too.
            why = str(error)[:200].encode("unicode_escape").decode()
            raise _unsound(where, f"{type(error).__name__}: {why}") from None


class UnsoundManifest(BloomdeskError):
    """The manifest is missing, or its bytes are not those that were written."""


def load_manifest(directory: Path) -> Manifest:
    """The manifest of a prepared directory, complete or not.

    Raises `UnsoundManifest` if there is none or it is not sound, and says so if its backup is.
    """
    try:
        return read_manifest(directory / MANIFEST)
    except UnsoundManifest as error:
        try:
            read_manifest(directory / MANIFEST_BACKUP)
        except BloomdeskError:
            raise error from None
        raise UnsoundManifest(
            f"{error.message}; its backup is sound",
            f"bloomdesk repair {in_shell(directory)}",
        ) from None


def read_manifest(path: Path) -> Manifest:
    """The manifest in the file `path`, which may be the backup; raises as `load_manifest` does."""
    try:
        text = read_small(path, LARGEST_MANIFEST).decode()
    except (FileNotFoundError, NotADirectoryError):
        directory = path.parent
        what = f"has no {path.name}" if directory.is_dir() else "is not a directory"
        raise UnsoundManifest(
            f"{directory} is not a prepared checkpoint: it {what}",
            "make one from a downloaded checkpoint, in a new or an empty directory: bloomdesk convert SOURCE DST",
        ) from None
    except UnicodeDecodeError:
        raise _unsound(path, "it is not UTF-8 text") from None
    except OSError as error:
        if error.errno in _NO_MANIFEST:
            raise _unsound(path, str(error.strerror)) from None
        why, step = explained(error, path)
        raise BloomdeskError(f"{path}: cannot be read: {why}", step) from error
    return Manifest.from_json(text, path)


def _unsound(where: Path, why: str) -> UnsoundManifest:
    return UnsoundManifest(
        f"{where} is not a sound manifest: {why}",
        f"convert again into an empty directory, not {where.parent}",
    )


<<<<<<< HEAD
=======
def _part_body(record: PartRecord, form: str, own: Slice | None) -> dict[str, Any]:
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


def _shard_sizes(parts: Iterable[PartRecord]) -> list[dict[str, Any]]:
    """Each source shard whose size is known, once."""
    shards = {
        (shard.file, shard.sha256): shard.size
        for part in parts
        for shard in part.sources
        if shard.size is not None
    }
    return [{"file": file, "sha256": sha256, "size": size} for (file, sha256), size in sorted(shards.items())]


>>>>>>> main
def _decode(body: dict[str, Any]) -> Manifest:
    fields, form = body["model"], body.get("coding", PLAIN)
    if not isinstance(fields, dict):
        raise TypeError(f"its model is {quoted(fields)}")
    if isinstance(fields.get("eos_token_id"), list):
        fields = {**fields, "eos_token_id": tuple(fields["eos_token_id"])}
    model = Hyperparameters(**fields)
    if form not in FORMAT_VERSIONS:
        raise ValueError(f"its form is {quoted(form)}")
    if form == LOSSLESS and model.dtype != CODED_DTYPE:
        raise ValueError(f"its form is lossless, and its dtype is {model.dtype}")
    source = Source(**body["source"])
    for text in (source.repo, source.commit):
        if text is not None and not (isinstance(text, str) and text.isprintable() and len(text) < 200):
            raise ValueError("it does not say where it came from")
    own, places = _decode_slice(body)
    specs = {spec.file: spec for spec in part_specs(model)}
    sizes = {(shard["file"], shard["sha256"]): shard["size"] for shard in body.get("source_shards", ())}
    if any(type(size) is not int or size < 0 for size in sizes.values()):
        raise ValueError("a source shard has no size")
    empty = Manifest(model, source, form=form, slice=own, places=places)
    parts = {
        entry["file"]: part_from(entry, specs[entry["file"]], model, form, own, sizes)
        for entry in body["parts"]
    }
    companions = {entry["file"]: CompanionRecord(**entry) for entry in body["companions"]}
    if len(parts) != len(body["parts"]) or len(companions) != len(body["companions"]):
        raise ValueError("a file is recorded twice")
    if unknown := set(companions) - set(COMPANIONS):
        raise ValueError(f"unknown companion files {sorted(unknown)}")
    for record in (*parts.values(), *companions.values()):
        if type(record.size) is not int or not 0 <= record.size < 2**63:
            raise ValueError(f"{record.file} has no size")
        check_hash(record.xxh3_128, 32)
    samples = body.get("source_samples", {})
    for file, sampled in samples.items():
        if not is_file_name(file):
            raise ValueError(f"{quoted(file)} is not the name of a shard")
        check_hash(sampled, 32)
    manifest = replace(empty, parts=parts, companions=companions, samples=samples)
    if manifest.format_version != body["format_version"]:
        raise ValueError(f"its form is {quoted(form)}")
    if body.get("fingerprint", manifest.fingerprint) != manifest.fingerprint:
        raise ValueError("its fingerprint is not that of its tensors")
    if form in QUANTISED_FORMS and body["source_fingerprint"] != manifest.source_fingerprint:
        raise ValueError("its source's fingerprint is not that of its tensors")
    return manifest


def _decode_slice(body: dict[str, Any]) -> tuple[Slice | None, tuple[str, ...]]:
    """Which slice it is of, if it is one, and where all of them were made."""
    if "slice" not in body:
        return None, ()
    entry, places = body["slice"], tuple(body["places"])
    own = Slice(entry["index"], tuple(entry["shares"]))
    if len(entry) > 2 or len(places) not in (0, own.count):
        raise ValueError("it does not say where each slice is")
    if not all(isinstance(place, str) and 0 < len(place) < 4096 and "\0" not in place for place in places):
        raise ValueError("the place of a slice is no path")
    return own, places
<<<<<<< HEAD
=======


def _decode_part(
    entry: dict[str, Any], manifest: Manifest, whole: PartSpec, sizes: Mapping[tuple[str, str], int]
) -> PartRecord:
    """The record of a part, which must be one that this program writes for a part of these tensors.

    `manifest` has no parts yet, `whole` is the part without slices, and `sizes` are those of the source shards by
    name and sha256.
    """
    spec, dtype, form = whole.sliced(manifest.model, manifest.slice), manifest.model.dtype, manifest.form
    tensors = _decode_tensors(spec.stored(dtype, _coded_sizes(entry, spec, form), form), entry["tensors"])
    decoded = _decode_tensors(spec.decoded(form, dtype), entry.get("decoded", ()))
    is_quantised = form in QUANTISED_FORMS
    # A slice of what is rounded already never saw what its own rows were made from.
    has_originals = is_quantised and (manifest.slice is None or entry["originals"])
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
    if digest(_part_body(record, form, manifest.slice)) != digest(entry):
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
        _check_hash(shard.sha256, 64)
        if not is_file_name(shard.file):
            raise ValueError(f"{quoted(entry['file'])} has a source that is no file name")
    return sources


def _decode_tensors(expected: Sequence[Described], entries: Sequence[Any]) -> tuple[TensorRecord, ...]:
    """The expected tensors with the hashes of `entries`; whether the rest of these fits is not checked."""
    tensors = tuple(
        TensorRecord(*each, found["xxh3_128"]) for each, found in zip(expected, entries, strict=True)
    )
    for tensor in tensors:
        _check_hash(tensor.xxh3_128, 32)
    return tensors


def _check_hash(text: str, length: int) -> None:
    if not re.fullmatch(rf"[0-9a-f]{{{length}}}", text):
        raise ValueError(f"{quoted(text)} is not a hash")
>>>>>>> main
