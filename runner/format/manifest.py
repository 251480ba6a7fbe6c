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
        """The command that makes the rest of an unfinished directory, and of those that hold the other slices."""
        first = (
            directory
            if self.slice is None or self.slice.index == 0 or not self.places
            else Path(self.places[0])
        )
        form = "" if self.form == PLAIN else f" --form {self.form}"
        made_by = f"prepare {self.source.repo}" if self.source.repo else "convert SRC"
        return f"bloomdesk {made_by} {in_shell(first)}{form}{self._slice_options}"

    def command_to_spread(self, directory: Path) -> str:
        """The command that spreads a directory, the first of these places, over the others."""
        return f"bloomdesk spread {in_shell(directory)}{self._others}"

    @property
    def _others(self) -> str:
        return "".join(f" --also {in_shell(Path(place))}" for place in self.places[1:])

    @property
    def _slice_options(self) -> str:
        """What the command says of the slice."""
        if self.slice is None:
            return ""
        shares = (
            f" --shares {','.join(map(str, self.slice.shares))}" if len(set(self.slice.shares)) > 1 else ""
        )
        return f"{self._others or f' --slice {self.slice}'}{shares}"

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
