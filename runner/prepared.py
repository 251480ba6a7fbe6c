"""The prepared directory: the contract between the toolkit that writes it and the runner that reads it.

    bloom/
      manifest.json                 version, source, hyperparameters, and per part: size, hashes, tensors, sources
      manifest.backup.json          the same bytes a second time, once the directory is complete
      embedding.safetensors         word_embeddings.weight, word_embeddings_layernorm.{weight,bias}
      block_00.safetensors ...      12 tensors each, `h.N.` stripped
      final_layernorm.safetensors   weight, bias
      config.json, tokenizer.json, tokenizer_config.json, special_tokens_map.json   as the source has them

Tensors lie in each part in the order in which a pass uses them. The manifest is rewritten after each part, so
"complete" is derived from it. In a lossless directory each matrix NAME is coded, strip by strip, and stands as two
tensors: NAME.strips says where each strip begins in NAME. docs/format.md is the long form.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from runner.errors import BloomdeskError
from runner.header import MAX_HEADER_BYTES, encode_header, read_small, tensor_nbytes

FORMAT = "bloomdesk-prepared"
PLAIN, LOSSLESS = "plain", "lossless"
FORMAT_VERSIONS = {PLAIN: 1, LOSSLESS: 2}
MANIFEST = "manifest.json"
MANIFEST_BACKUP = "manifest.backup.json"
REQUIRED_COMPANIONS = ("config.json", "tokenizer.json")
COMPANIONS = (*REQUIRED_COMPANIONS, "tokenizer_config.json", "special_tokens_map.json")
DTYPES = ("BF16", "F16", "F32")
EMBEDDING = "embedding.safetensors"
FINAL_LAYERNORM = "final_layernorm.safetensors"
# Far above every BLOOM; they keep a damaged or hostile config from asking for absurd amounts of anything.
LARGEST_MANIFEST = 64 * 2**20
LIMITS = {"hidden_size": 2**20, "n_head": 2**16, "n_layer": 10_000, "vocab_size": 2**24}

# What is fixed of the coding; runner/lossless.py knows the rest.
CODED_DTYPE = "BF16"
STRIP_ROWS = 12
PANEL_COLUMNS = 4096
CODING_KEY = "bloomdesk.lossless"  # in a part's __metadata__
CODING_VERSION = 1
STRIPS_SUFFIX = ".strips"
CODED_ALIGNMENT = 16
LARGEST_CODED = 10**14  # no matrix comes near; its digits are the room that a header keeps for a size

Shape = tuple[int, ...]
Described = tuple[str, str, Shape]  # a tensor's name, dtype and shape


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers that fix a BLOOM's shapes and arithmetic, normalised from config.json.

    `dtype` is the safetensors name of the one dtype that all tensors have.
    """

    hidden_size: int
    n_head: int
    n_layer: int
    vocab_size: int
    dtype: str
    layer_norm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = 3

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= limit:
                raise BloomdeskError(f"the model's {name} must be from 1 to {limit:,}, found {_shown(value)}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 <= value < self.vocab_size):
                raise BloomdeskError(f"the model's {name} must lie in the vocabulary, found {_shown(value)}")
        if self.hidden_size % self.n_head:
            raise BloomdeskError(
                f"the model's hidden_size {self.hidden_size} is no multiple of its {self.n_head} heads"
            )
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise BloomdeskError(
                f"the model's dtype must be one of {', '.join(DTYPES)}, found {_shown(self.dtype)}"
            )
        epsilon = self.layer_norm_epsilon
        if not isinstance(epsilon, float) or not 0 < epsilon < 1:
            raise BloomdeskError(
                f"the model's layer_norm_epsilon must be between 0 and 1, found {_shown(epsilon)}"
            )
        if not isinstance(self.apply_residual_connection_post_layernorm, bool):
            raise BloomdeskError("the model's apply_residual_connection_post_layernorm must be true or false")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_head


@dataclass(frozen=True)
class PartSpec:
    """What a part must hold: its file name, and its tensors' shapes in the order of a pass."""

    file: str
    tensors: dict[str, Shape]

    @property
    def matrices(self) -> dict[str, Shape]:
        """The tensors that a lossless directory codes."""
        return {name: shape for name, shape in self.tensors.items() if len(shape) == 2}

    def nbytes(self, dtype: str) -> int:
        """Bytes of the tensors alone, uncoded."""
        return sum(tensor_nbytes(dtype, shape) for shape in self.tensors.values())

    def stored(self, dtype: str, coded: Mapping[str, int]) -> tuple[Described, ...]:
        """What the file holds, in its order; `coded` gives the bytes of each coded matrix, none in a plain one."""
        found: list[Described] = []
        for name, shape in self.tensors.items():
            if name in coded:
                found.append((name + STRIPS_SUFFIX, "I64", (strip_count(shape[0]) + 1,)))
                found.append((name, "U8", (coded[name],)))
            else:
                found.append((name, dtype, shape))
        return tuple(found)

    def decoded(self, coding: str) -> tuple[Described, ...]:
        """What its coded tensors decode to; nothing in a plain directory."""
        coded = self.matrices if coding == LOSSLESS else {}
        return tuple((name, CODED_DTYPE, shape) for name, shape in coded.items())


def _shown(value: object) -> str:
    """A value that may be anything, short enough for one sentence."""
    return repr(value)[:80]


def is_file_name(name: object) -> bool:
    """Whether `name` is that of a visible file right in a directory, whatever system the directory is on."""
    if not isinstance(name, str) or not name.isprintable() or len(name.encode()) > 240:
        return False
    device = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d) *(\..*)?", name)  # on Windows, in any directory
    return device is None and re.fullmatch(r"(?!\.)[^/\\:*?\"<>|]+", name) is not None


def block_file(index: int, n_layer: int) -> str:
    """`block_07.safetensors`; two digits, more where the model has more than 100 blocks."""
    return f"block_{index:0{max(2, len(str(n_layer - 1)))}d}.safetensors"


def block_tensors(hidden_size: int) -> dict[str, Shape]:
    """The 12 tensors of a block in the order in which a pass uses them."""
    E = hidden_size
    return {
        "input_layernorm.weight": (E,),
        "input_layernorm.bias": (E,),
        "self_attention.query_key_value.weight": (3 * E, E),
        "self_attention.query_key_value.bias": (3 * E,),
        "self_attention.dense.weight": (E, E),
        "self_attention.dense.bias": (E,),
        "post_attention_layernorm.weight": (E,),
        "post_attention_layernorm.bias": (E,),
        "mlp.dense_h_to_4h.weight": (4 * E, E),
        "mlp.dense_h_to_4h.bias": (4 * E,),
        "mlp.dense_4h_to_h.weight": (E, 4 * E),
        "mlp.dense_4h_to_h.bias": (E,),
    }


def part_specs(model: Hyperparameters) -> tuple[PartSpec, ...]:
    """All parts of a model in the order of a pass: embedding, blocks, final LayerNorm."""
    E = model.hidden_size
    embedding = {
        "word_embeddings.weight": (model.vocab_size, E),
        "word_embeddings_layernorm.weight": (E,),
        "word_embeddings_layernorm.bias": (E,),
    }
    blocks = [PartSpec(block_file(i, model.n_layer), block_tensors(E)) for i in range(model.n_layer)]
    final = {"weight": (E,), "bias": (E,)}
    return (PartSpec(EMBEDDING, embedding), *blocks, PartSpec(FINAL_LAYERNORM, final))


def strip_count(rows: int) -> int:
    """Strips of a coded matrix: `STRIP_ROWS` rows each, the last one what is left."""
    return -(-rows // STRIP_ROWS)


def largest_strip(columns: int) -> int:
    """Bytes that no coded strip exceeds: twice those of its rows, and a page for each panel."""
    return 2 * STRIP_ROWS * columns * 2 + 4096 * -(-columns // PANEL_COLUMNS)


def read_strips(data: bytes | bytearray | memoryview, rows: int, columns: int, nbytes: int) -> array[int]:
    """The offsets of the strips of a coded matrix [rows, columns] of `nbytes` bytes, from the bytes of NAME.strips.

    Raises `ValueError` where they are not those of strips that lie one after another, each of a size that it can have.
    """
    offsets = array("q")
    offsets.frombytes(data)
    if sys.byteorder == "big":
        offsets.byteswap()
    if len(offsets) != strip_count(rows) + 1 or offsets[0] != 0 or offsets[-1] != nbytes:
        raise ValueError("its strips do not begin and end where the coded bytes do")
    largest = largest_strip(columns)
    for index in range(len(offsets) - 1):
        if not 0 < offsets[index + 1] - offsets[index] <= largest:
            raise ValueError(f"strip {index:,} cannot have {offsets[index + 1] - offsets[index]:,} bytes")
    return offsets


def part_header(stored: Sequence[Described], decoded: Sequence[Described] = ()) -> bytes:
    """The first bytes of a part, up to its data: it holds `stored`, of which `decoded` are coded.

    The length does not depend on the sizes of the coded tensors, so it is known before they are.
    """
    if not decoded:
        return encode_header(stored)
    tensors = {name: {"dtype": dtype, "shape": list(shape)} for name, dtype, shape in decoded}
    coding = {"version": CODING_VERSION, "tensors": tensors}
    metadata = {CODING_KEY: json.dumps(coding, separators=(",", ":"))}
    largest = [(name, dtype, (LARGEST_CODED,) if name in tensors else shape) for name, dtype, shape in stored]
    return encode_header(stored, metadata, room=len(encode_header(largest, metadata)))


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
    """manifest.json: what the directory holds so far, by file name; `coding` is that of all parts."""

    model: Hyperparameters
    source: Source
    parts: Mapping[str, PartRecord] = field(default_factory=dict)
    companions: Mapping[str, CompanionRecord] = field(default_factory=dict)
    coding: str = PLAIN

    @property
    def format_version(self) -> int:
        return FORMAT_VERSIONS[self.coding]

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
            **({} if self.coding == PLAIN else {"coding": self.coding}),
            "source": asdict(self.source),
            "model": asdict(self.model),
            "parts": [self._part_body(record) for record in self.parts.values()],
            "companions": [asdict(record) for record in self.companions.values()],
        }
        return json.dumps({**body, "sha256": _digest(body)}, indent=1) + "\n"

    def _part_body(self, record: PartRecord) -> dict[str, Any]:
        body = asdict(record)
        if self.coding == PLAIN:
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
                f"{where}: format version {_shown(version)}, this program reads {known}",
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
    coding = body["coding"] if body["format_version"] != FORMAT_VERSIONS[PLAIN] else PLAIN
    if FORMAT_VERSIONS.get(coding) != body["format_version"]:
        raise ValueError(f"its coding is {_shown(coding)}")
    if coding == LOSSLESS and model.dtype != CODED_DTYPE:
        raise ValueError(f"its coding is lossless, and its dtype is {model.dtype}")
    source = Source(**body["source"])
    for text in (source.repo, source.commit):
        if text is not None and not (isinstance(text, str) and text.isprintable() and len(text) < 200):
            raise ValueError("it does not say where it came from")
    specs = {spec.file: spec for spec in part_specs(model)}
    parts = [_decode_part(entry, specs, model.dtype, coding) for entry in body["parts"]]
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
        coding,
    )


def _decode_part(entry: dict[str, Any], specs: Mapping[str, PartSpec], dtype: str, coding: str) -> PartRecord:
    spec = specs[entry["file"]]
    known = {item.name for item in fields(PartRecord)} - ({"decoded"} if coding == PLAIN else set())
    if set(entry) != known:
        raise ValueError(f"{spec.file} is recorded with unknown fields")
    tensors = _decode_tensors(entry["tensors"])
    decoded = _decode_tensors(entry["decoded"]) if coding != PLAIN else ()
    names = {name for name, _, _ in spec.decoded(coding)}
    coded = {tensor.name: tensor.shape[0] for tensor in tensors if tensor.name in names and tensor.shape}
    described = tuple(tensor.described for tensor in tensors)
    if set(coded) != names or described != spec.stored(dtype, coded):
        raise ValueError(f"{spec.file} does not list the tensors that the model needs")
    if tuple(tensor.described for tensor in decoded) != spec.decoded(coding):
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
            raise ValueError(f"{_shown(tensor.name)} has no shape")
    return tensors


def _check_record(record: PartRecord | CompanionRecord) -> None:
    if type(record.size) is not int or not 0 <= record.size < 2**63:
        raise ValueError(f"{record.file} has no size")
    _check_hex(record.xxh3_128, 32)


def _check_hex(digest: str, length: int) -> None:
    if not re.fullmatch(rf"[0-9a-f]{{{length}}}", digest):
        raise ValueError(f"{_shown(digest)} is not a hash")
