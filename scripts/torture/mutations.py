"""Inputs for fuzzing each reader, which must give a sound result or raise one clear BloomdeskError.

`READERS` is used by tests/scripts/test_fuzz.py for seconds and by scripts/torture/fuzz.py for any time.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import itertools
import json
import math
import struct
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from runner.errors import BloomdeskError
from runner.format import coded, hyperparameters, layout
from runner.format import manifest as manifests
from runner.format.digest import digest
from runner.format.part_record import PartRecord, SourceShard, TensorRecord
from runner.format.quantised import INT4_FORM, QUANTISED_FORMS
from runner.format.safetensors import encode_header, read_header
from scripts.fakehub import checkpoint as make_checkpoint
from toolkit.hub import record as downloads
from toolkit.hub.revision import HubFile, Revision
from toolkit.parts.part_reader import DamagedTensor, PartReader, StoredTensor
from toolkit.parts.regions import Region
from toolkit.parts.row_groups import Coders
from toolkit.source.config import read_config
from toolkit.source.index import find_shards
from toolkit.source.shards import read_shard

LONGEST_MESSAGE = 1200
COMPANIONS = ("config.json", "tokenizer.json")
NUMBERS = (0, 1, 2, 3, 7, 8, 63, 64, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)  # fmt: skip  # noqa: E501
OPCODES = (
    *(bytes([code]) for code in b"}])(N021\x85\x86\x87tsuaeRbQo\x81\x93"),
    *(b"q\0", b"h\0", b"q\1", b"h\1", b"K\2", b"X\1\0\0\0a", b"\x8a\x08" + b"\xff" * 8, b"P1\n"),
    *(b"cos\nsystem\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n", b"ctorch.hub\nload\n"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"L1L\n", b"I01\n"),
    *(b"\x8d" + b"\xff" * 8, b"\x8b\xff\xff\xff\x7f", b"\x95" + b"\xff" * 8),
)
STRINGS = ("", "..", "../x", "/x", "a/b", "a\\b", "NUL.bin", "x\0", "\x1b[2J", "\ud800", "é" * 300)
json_leaves = (
    st.none()
    | st.booleans()
    | st.sampled_from([*NUMBERS, -1, -(2**63), 10**400, 0.5, 1e300, math.nan, math.inf, *STRINGS])
    | st.text(max_size=6)
)
json_values = st.recursive(
    json_leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
) | st.integers(1, 1500).map(lambda depth: functools.reduce(lambda inner, _: [inner], range(depth), []))


@dataclass(frozen=True)
class Reader:
    """A reader under test: it reads `file`, which holds one of the `inputs`.

    `read` returns a result for which `holds` is true, or raises `BloomdeskError`.
    """

    file: str
    inputs: Callable[[], st.SearchStrategy[bytes]]
    read: Callable[[Path], Any]
    holds: Callable[[Any, Path], bool] = lambda result, path: True


def check(reader: Reader, directory: Path, data: bytes) -> bool:
    """Whether the reader took `data`; raises `AssertionError`, or what the reader raised, if it did neither well."""
    path = directory / reader.file
    path.write_bytes(data)
    try:
        result = reader.read(path)
    except BloomdeskError as error:
        assert error.message.isprintable(), error.message
        assert len(error.message) < LONGEST_MESSAGE + len(str(path)), error.message
        return False
    assert reader.holds(result, path), result
    return True


@st.composite
def damaged(draw: st.DrawFn, *seeds: bytes) -> bytes:
    """One of the sound `seeds` with up to four changes to its bytes."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        upto = min(len(data), at + draw(st.sampled_from([1, 2, 4, 8, 46, 64, 1000])))
        match draw(st.sampled_from(["flip", "number", "cut", "drop", "double", "insert", "splice"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "number":
                form = draw(st.sampled_from(["<B", "<H", "<I", "<Q", ">I"]))
                width = struct.calcsize(form)
                data[at : at + width] = struct.pack(form, draw(st.sampled_from(NUMBERS)) % 256**width)
            case "cut":
                del data[at:]
            case "drop":
                del data[at:upto]
            case "double":
                data[at:at] = data[at:upto]
            case "insert":
                long = st.sampled_from([b"[" * 3000, b"\0" * 100, b"9" * 5000])
                data[at:at] = draw(st.binary(max_size=20) | long)
            case "splice":
                other = draw(st.sampled_from(seeds))
                start = draw(st.integers(0, len(other)))
                data[at:upto] = other[start : start + upto - at]
    return bytes(data)


@st.composite
def forged(draw: st.DrawFn, seed: dict[str, Any], signed: bool = False) -> bytes:
    """The JSON of `seed` with up to three values replaced, removed or doubled, and its checksum made right."""
    body = copy.deepcopy(seed)
    for _ in range(draw(st.integers(0, 3))):
        place, key = draw(st.sampled_from(_places(body)))
        match draw(st.sampled_from(["replace", "replace", "remove", "double", "rename"])):
            case "replace":
                place[key] = draw(json_values)
            case "remove":
                del place[key]
            case "double" if isinstance(place, list):
                place.insert(key, place[key])
            case "rename" if isinstance(place, dict):
                place[draw(st.text(max_size=4))] = place.pop(key)
        if not _places(body):
            break
    try:
        return _dumped({**body, "sha256": digest(body)} if signed else body)
    except RecursionError:
        return b"[" * 2000


def _places(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """Every container and key or index within `value`, but not the insides of what is nested deeply."""
    if not isinstance(value, dict | list) or depth > 8:
        return []
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    inside = (place for _, inner in items for place in _places(inner, depth + 1))
    return [*((value, key) for key, _ in items), *inside]


def _json_inputs(text: str) -> st.SearchStrategy[bytes]:
    """Inputs for a reader of JSON such as `text`, signed again if that has a checksum."""
    body = json.loads(text)
    signed = body.pop("sha256", None) is not None
    made = json_values.map(_dumped)
    return forged(body, signed) | damaged(text.encode()) | st.binary(max_size=100) | made


def _dumped(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"{"


def _manifest(form: str, dtype: str, n_layer: int, vocab_size: int) -> st.SearchStrategy[bytes]:
    model = hyperparameters.Hyperparameters(8, 2, n_layer, vocab_size, dtype)
    companions = {name: manifests.CompanionRecord(name, 3, "01" * 16) for name in COMPANIONS}
    made = manifests.Manifest(model, manifests.Source("me/bloom", "0" * 40), form=form, companions=companions)
    for spec in layout.part_specs(model):
        coded_bytes = dict.fromkeys(spec.matrices, 160) if form == coded.LOSSLESS else {}
        tensors, decoded = (
            tuple(TensorRecord(*each, "ab" * 16) for each in described)
            for described in (spec.stored(dtype, coded_bytes, form), spec.decoded(form, dtype))
        )
        originals = decoded if form in QUANTISED_FORMS else ()
        shards = (SourceShard("s.bin", "ef" * 32),)
        record = PartRecord(spec.file, 0, "cd" * 16, tensors, shards, decoded, originals)
        size = len(record.header) + sum(tensor.nbytes for tensor in tensors)
        made = made.with_part(dataclasses.replace(record, size=size))
    return _json_inputs(made.to_json())


CODED_ROWS, CODED_COLUMNS = 30, 50
CODED_BYTES = 2 * CODED_ROWS * CODED_COLUMNS
TABLE_BYTES = 8 * (coded.row_group_count(CODED_ROWS) + 1)


@functools.cache
def _matrices() -> tuple[bytes, ...]:
    """Offsets of row groups, then the row groups, of a matrix of normal weights and of one of all 16-bit patterns."""
    import torch

    from runner.kernel.encode import encode_row_groups

    count = CODED_ROWS * CODED_COLUMNS
    normal = torch.randn(count, generator=torch.Generator().manual_seed(1)).bfloat16().view(torch.int16)
    patterns = (torch.arange(count) * 43).to(torch.int16)
    made = []
    for bits in (normal, patterns):
        coded, lengths = encode_row_groups(bytes(bits.view(torch.uint8).numpy()), CODED_COLUMNS)
        offsets = itertools.accumulate(lengths, initial=0)
        made.append(struct.pack(f"<{len(lengths) + 1}q", *offsets) + coded)
    return tuple(made)


def _decode(path: Path) -> bytes:
    """The bytes of a coded matrix, read as export does before it compares their hash."""
    size = path.stat().st_size - TABLE_BYTES
    table = Region(path.name, "m.strips", 0, TABLE_BYTES, "")
    tensor = TensorRecord("m", "BF16", (CODED_ROWS, CODED_COLUMNS), "")
    stored = StoredTensor(tensor, Region(path.name, "m", TABLE_BYTES, size, ""), table)
    try:
        with Coders() as coders, PartReader(path, [stored], coders) as reader:
            return b"".join(reader.bits(0))
    except DamagedTensor as error:
        raise BloomdeskError(str(error)) from None


def _manifest_holds(manifest: manifests.Manifest, path: Path) -> bool:
    return manifests.Manifest.from_json(manifest.to_json(), path) == manifest and manifest.missing is not None


def _header() -> st.SearchStrategy[bytes]:
    sound = encode_header([("b", "BF16", (3, 5)), ("a", "F32", (7,)), ("empty", "F16", (0, 2))]) + bytes(58)
    header = json.loads(sound[8:-58])

    def framed(text: bytes, error: int, tail: int) -> bytes:
        return ((len(text) + error) % 2**64).to_bytes(8, "little") + text + bytes(max(0, 58 + tail))

    errors = st.sampled_from([0, 0, 0, 0, 1, -1, 2**40, 2**63])
    made = st.builds(framed, forged(header), errors, st.sampled_from([0, 0, 0, 1, -1]))
    return made | damaged(sound) | st.binary(max_size=60)


def _header_holds(header: Any, path: Path) -> bool:
    return sum(entry.nbytes for entry in header.tensors.values()) == path.stat().st_size - header.data_start


def _record() -> st.SearchStrategy[bytes]:
    files = (HubFile("model.bin", 5, "ab" * 32), HubFile("config.json", 2, None, "cd" * 20))
    revision = Revision("someone/bloom-small", "0" * 40, files)
    record = downloads.DownloadRecord.of(revision, None).with_file("config.json", "ef" * 32, 7)
    return _json_inputs(record.to_json())


def _tokenize(path: Path) -> Any:
    from runner.model.tokenizer import Tokenizer

    tokenizer = Tokenizer(path)
    stream = tokenizer.stream()
    text = "".join(map(stream.push, tokenizer.encode("a房 b</s>")))
    return text + stream.finish() + tokenizer.decode([5, 299])


@functools.cache
def _bins() -> tuple[bytes, ...]:
    """Small shards: as torch saved them in 2022, and as it does today."""
    import torch

    state = {"ln_f.weight": torch.arange(8).bfloat16(), "ln_f.bias": torch.ones(2, 4).half()[1]}
    with tempfile.TemporaryDirectory() as scratch:
        make_checkpoint.write_bin(Path(scratch) / "x.bin", make_checkpoint.from_state(state))
        old = (Path(scratch) / "x.bin").read_bytes()
    today = io.BytesIO()
    torch.save(OrderedDict(state), today)
    return old, today.getvalue()


def _pickle() -> st.SearchStrategy[bytes]:
    sound = []
    for data in _bins():
        with zipfile.ZipFile(io.BytesIO(data)) as container:
            read = {name.partition("/")[2]: container.read(name) for name in container.namelist()}
        pickle = read.pop("data.pkl")
        sound.append(damaged(pickle).map(functools.partial(zip_of, records=read)))
    made = st.lists(st.sampled_from(OPCODES), max_size=30)
    return st.one_of(*sound, made.map(lambda codes: zip_of(b"\x80\2" + b"".join(codes) + b".")))


def zip_of(pickle: bytes, records: Mapping[str, bytes] | None = None) -> bytes:
    """A stored zip as of torch.save with any pickle in it, and with the right checksum."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as container:
        container.writestr("archive/data.pkl", pickle)
        for name, data in (records or {"data/0": bytes(64)}).items():
            container.writestr(f"archive/{name}", data)
    return target.getvalue()


def _shard_holds(tensors: Any, path: Path) -> bool:
    return all(
        0 <= tensor.offset <= tensor.offset + tensor.nbytes <= path.stat().st_size
        and key.isprintable()
        and all(type(size) is int and size >= 0 for size in tensor.shape)
        for key, tensor in tensors.items()
    )


def _load_manifest(path: Path) -> manifests.Manifest:
    return manifests.load_manifest(path.parent)


def _index_holds(shards: Any, path: Path) -> bool:
    return all(file.parent == path.parent for file in shards.files)


INDEX = {"ln_f.weight": "a.bin", "ln_f.bias": "b.bin", "h.0.mlp.bias": "a.bin"}
READERS: Mapping[str, Reader] = {
    "manifest": Reader(
        "manifest.json", lambda: _manifest(coded.PLAIN, "F16", 2, 10), _load_manifest, _manifest_holds
    ),
    "lossless": Reader(
        "manifest.json", lambda: _manifest(coded.LOSSLESS, "BF16", 1, 30), _load_manifest, _manifest_holds
    ),
    "int4": Reader(
        "manifest.json", lambda: _manifest(INT4_FORM, "F16", 1, 30), _load_manifest, _manifest_holds
    ),
    "coded": Reader(
        "coded", lambda: damaged(*_matrices()), _decode, lambda bits, _: len(bits) == CODED_BYTES
    ),
    "index": Reader(
        "pytorch_model.bin.index.json",
        lambda: _json_inputs(json.dumps({"metadata": {"total_size": 8}, "weight_map": INDEX})),
        lambda path: find_shards(path.parent),
        _index_holds,
    ),
    "header": Reader("x.safetensors", _header, read_header, _header_holds),
    "config": Reader(
        "config.json",
        lambda: _json_inputs(json.dumps(make_checkpoint.old_config(96, 6, 3, 500))),
        lambda path: read_config(path, "BF16"),
    ),
    "record": Reader(
        downloads.RECORD,
        _record,
        lambda path: downloads.load_record(path.parent),
        lambda record, _: all(Path(name).name == name for name in record.files),
    ),
    "tokenizer": Reader(
        "tokenizer.json",
        lambda: _json_inputs(make_checkpoint.byte_tokenizer(300)["tokenizer.json"].decode()),
        _tokenize,
    ),
    "zip": Reader(
        "x.bin",
        lambda: damaged(*_bins()) | st.binary(max_size=60).map(lambda data: b"PK\3\4" + data),
        read_shard,
        _shard_holds,
    ),
    "pickle": Reader("x.bin", _pickle, read_shard, _shard_holds),
}
