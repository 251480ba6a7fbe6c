"""Hostile files of the other kinds: safetensors headers, JSON of every sort, links, pipes, devices, destinations."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.errors import BloomdeskError
from runner.format.digest import digest
from runner.format.safetensors import encode_header
from runner.model.tokenizer import Tokenizer
from runner.system.atomic import write_atomically
from runner.weights.checkpoint import Weights
from scripts.fakehub.checkpoint import byte_tokenizer, old_config, synthetic
from tests.support.bounded import Bounded
from tests.support.lossless import content
from toolkit.commands.convert import convert
from toolkit.hub.record import RECORD
from toolkit.source.index import find_shards
from toolkit.source.shards import read_source

# A process of its own reads the hostile files.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits, links and devices as Linux has them"),
]
SHAPE = {"hidden_size": 64, "heads": 8, "blocks": 2, "vocab_size": 300}
DEEP = "[" * 500_000


def item(start: Any, end: Any, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def framed(header: Any, data: int = 4, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def _many_entries() -> bytes:
    entries = (b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(10**6))
    return framed(b"{" + b",".join(entries) + b"}")


HEADERS: dict[str, Callable[[], bytes]] = {
    "a length of petabytes": lambda: framed({}, length=2**60),
    "a length of all bits": lambda: framed({}, length=2**64 - 1),
    "just too long": lambda: framed({"a": item(0, 4)}, length=70),
    "a million entries": _many_entries,
    "all that a header may hold, in lists": lambda: framed(b'{"a":[' + b"[]," * 5_000_000 + b"0]}"),
    "deep": lambda: framed(b'{"a":' + DEEP.encode() + b"}"),
    "deep and closed": lambda: framed(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"),
    "one name twice": lambda: framed(b'{"a":%s,"a":%s}' % ((json.dumps(item(0, 4)).encode(),) * 2)),
    "overlap": lambda: framed({"a": item(0, 3), "b": item(2, 4)}),
    "gap": lambda: framed({"a": item(0, 1), "b": item(2, 4)}),
    "beyond the file": lambda: framed({"a": item(0, 5)}),
    "far beyond": lambda: framed({"a": item(0, 2**62)}),
    "before the file": lambda: framed({"a": item(-4, 0, [4])}),
    "backwards": lambda: framed({"a": item(4, 0, [4])}),
    "a product of 2**64": lambda: framed({"a": item(0, 4, [2**32, 2**32, 4])}),
    "negative shape": lambda: framed({"a": item(0, 4, [-2, -2])}),
    "shape of fractions": lambda: framed({"a": item(0, 4, [4.0])}),
    "shape of truths": lambda: framed({"a": item(0, 1, [True])}, 1),
    "offsets of fractions": lambda: framed({"a": item(0.0, 4.0, [4])}),
    "a million axes": lambda: framed({"a": item(0, 4, [2] * 10**6)}),
    "axes of thousands of digits": lambda: framed(b'{"a":{"dtype":"U8","shape":[' + b"9" * 4000 + (b"," + b"9" * 4000) * 3000 + b'],"data_offsets":[0,4]}}'),  # noqa: E501
    "more digits than a number may have": lambda: framed(b'{"a":' + b"9" * 10**6 + b"}"),
    "a name for the terminal": lambda: framed({"\x1b[2J\n": item(0, 4)}),
    "half a character": lambda: framed(b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'),
    "no text": lambda: framed(b"\xff\xfe\xfd"),
    "not a number": lambda: framed(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,Infinity]}}'),
    "an unknown dtype": lambda: framed({"a": item(0, 4, dtype="X8")}),
    "a dtype that is none": lambda: framed({"a": item(0, 4, dtype={"U8": 1})}),
    "zeros": lambda: bytes(100),
    "zeros that describe nothing": lambda: framed({}),
}  # fmt: skip


@pytest.mark.parametrize("make", HEADERS.values(), ids=HEADERS)
def test_a_safetensors_header_that_lies(tmp_path: Path, bounded: Bounded, make: Callable[[], bytes]) -> None:
    (tmp_path / "x.safetensors").write_bytes(make())
    assert "x.safetensors" in bounded.refuses("header", tmp_path / "x.safetensors")


INDEX = '{"weight_map":{"a":"a.bin"%s}}'
JSONS: dict[str, tuple[str, str, bytes]] = {
    kind: (reader, file, data)
    for reader, file in (
        ("index", "pytorch_model.bin.index.json"),
        ("config", "config.json"),
        ("manifest", "manifest.json"),
        ("record", RECORD),
    )
    for kind, data in {
        f"{reader}: nothing": b"",
        f"{reader}: deep": DEEP.encode(),
        f"{reader}: deep and closed": b"[" * 100_000 + b"]" * 100_000,
        f"{reader}: no text": b"\xff\xfe\xff",
        f"{reader}: zeros": bytes(1000),
        f"{reader}: digits": b'{"format":' + b"9" * 100_000 + b"}",
        f"{reader}: another kind": b'{"format":"\\u001b[2J","model_type":"\\ud800\\n","weight_map":["x"]}',
    }.items()
} | {
    "index: the largest": ("index", "pytorch_model.bin.index.json", b'{"a":[' + b"{}," * (4 * 2**20) + b"0]}"),
    "index: larger": ("index", "pytorch_model.bin.index.json", b" " * (17 * 2**20)),
    "index: a name for the terminal": ("index", "pytorch_model.bin.index.json", (INDEX % r',"\u001b[2J":"a.bin"').encode()),  # noqa: E501
    "config: larger": ("config", "config.json", b" " * 2**21),
    "config: just deep enough": ("config", "config.json", json.dumps({**old_config(8, 2, 2, 9), "n_layer": 0}).replace("0", "[" * 940 + "]" * 940, 1).encode()),  # noqa: E501
    "config: long": ("config", "config.json", json.dumps({**old_config(8, 2, 2, 9), "n_layer": ["x"] * 100_000}).encode()),  # noqa: E501
    "config: for the terminal": ("config", "config.json", json.dumps({**old_config(8, 2, 2, 9), "slow_but_exact": "\x1b[2J"}).encode()),  # noqa: E501
    "manifest: larger": ("manifest", "manifest.json", b" " * (65 * 2**20)),
}  # fmt: skip


@pytest.mark.parametrize(("reader", "file", "data"), JSONS.values(), ids=JSONS)
def test_json_that_is_not_what_it_should_be(
    tmp_path: Path, bounded: Bounded, reader: str, file: str, data: bytes
) -> None:
    (tmp_path / file).write_bytes(data)
    directory = reader in ("index", "manifest", "record")
    assert file in bounded.refuses(reader, tmp_path if directory else tmp_path / file)


@pytest.mark.parametrize(
    "name",
    [
        *("../x.bin", "/etc/x.bin", "a/x.bin", "a/../../x.bin", "..\\x.bin", "a\\x.bin", "C:\\x.bin", "C:x.bin"),
        *("c:x.bin", "x\0.bin", "x\n.bin", "NUL.bin", "com1.x.bin", "con .bin", ".x.bin", "..bin", ".bin", ".."),
        *("", "x*.bin", "\ud800.bin", "é" * 200 + ".bin", "x.bin/", "x.bin ", "x.py", "x.safetensors", 7, None),
    ],
)  # fmt: skip
def test_an_index_that_names_anything_but_a_file_beside_it(
    tmp_path: Path, bounded: Bounded, name: Any
) -> None:
    index = {"weight_map": {"ln_f.bias": "good.bin", "ln_f.weight": name}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "not the name of a shard beside it, which ends in .bin" in bounded.refuses("index", tmp_path)


def test_a_shard_that_is_a_directory(tmp_path: Path, bounded: Bounded) -> None:
    synthetic(tmp_path, **SHAPE)
    (tmp_path / "pytorch_model_00002-of-00004.bin").unlink()
    (tmp_path / "pytorch_model_00002-of-00004.bin").mkdir()
    assert "1 of 4 shards are missing" in bounded.refuses("source", tmp_path)


def test_swapped_shards(tmp_path: Path, bounded: Bounded) -> None:
    synthetic(tmp_path, **SHAPE)
    first, second = (tmp_path / f"pytorch_model_0000{n}-of-00004.bin" for n in (2, 3))
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    assert "disagrees with the shards" in bounded.refuses("source", tmp_path)


@pytest.fixture
def odd(tmp_path: Path) -> dict[str, Path]:
    """What is no file: each kind of thing that a link may lead to."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    return {
        "a pipe": tmp_path / "pipe",
        "an endless device": Path("/dev/zero"),
        "a terminal": Path("/dev/tty"),
        "a loop": tmp_path / "loop",
        "nothing": tmp_path / "absent",
        "a directory": tmp_path,
        "another file": Path("/etc/passwd"),
    }


@pytest.mark.parametrize(
    "kind", ["a pipe", "an endless device", "a terminal", "a loop", "nothing", "a directory", "another file"]
)
@pytest.mark.parametrize(
    ("reader", "file"),
    [
        ("shard", "x.bin"),
        ("shard", "x.safetensors"),
        ("header", "x.safetensors"),
        ("config", "config.json"),
        ("manifest", "manifest.json"),
        ("index", "pytorch_model.bin.index.json"),
        ("index", "model.safetensors"),
        ("source", "pytorch_model.bin"),
        ("record", RECORD),
    ],
)
def test_links_to_what_is_no_such_file(
    tmp_path: Path, bounded: Bounded, odd: dict[str, Path], kind: str, reader: str, file: str
) -> None:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / file).symlink_to(odd[kind])
    if (file, kind) in (("model.safetensors", "another file"), (RECORD, "nothing")):
        return  # the one is found, and refused when it is read; the other is as if there were none
    path = directory / file if reader in ("shard", "header", "config") else directory
    assert "root:" not in bounded.refuses(reader, path)


def test_the_hubs_cache_is_a_source(tmp_path: Path) -> None:
    """snapshots/COMMIT/NAME -> ../../blobs/HASH"""
    synthetic(tmp_path / "made", **SHAPE)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("0" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "made").iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    assert len(read_source(snapshot)) == 29
    assert len(find_shards(snapshot).files) == 4
    convert(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["a pipe", "an endless device", "a loop", "another file"])
@pytest.mark.parametrize("file", ["special_tokens_map.json", "tokenizer.json"])
def test_a_companion_that_links_out_of_the_source(
    tmp_path: Path, odd: dict[str, Path], kind: str, file: str
) -> None:
    """It would be copied into the prepared directory, whatever it is."""
    synthetic(tmp_path / "source", **SHAPE)
    (tmp_path / "source" / file).unlink()
    (tmp_path / "source" / file).symlink_to(odd[kind])
    with pytest.raises(BloomdeskError, match="link out of the checkpoint"):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["a pipe", "an endless device", "a loop"])
def test_a_part_that_is_no_file_is_made_again(tmp_path: Path, odd: dict[str, Path], kind: str) -> None:
    synthetic(tmp_path / "source", **SHAPE)
    convert(tmp_path / "source", tmp_path / "out")
    part = tmp_path / "out" / "block_01.safetensors"
    part.unlink()
    part.symlink_to(odd[kind])
    assert convert(tmp_path / "source", tmp_path / "out").written == (part.name,)
    assert not part.is_symlink()


@pytest.mark.parametrize("inside", [b"[" * 200_000, b"\xff\xff", b"{}", b"", b'{"version":"1.0"}'])
def test_a_tokenizer_that_is_none(tmp_path: Path, inside: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(inside)
    with pytest.raises(BloomdeskError, match="is not a tokenizer") as caught:
        Tokenizer(tmp_path / "tokenizer.json")
    assert caught.value.message.isprintable()


def changed_tokenizer(directory: Path, **changes: Any) -> Path:
    body = json.loads(byte_tokenizer(300)["tokenizer.json"])
    (directory / "tokenizer.json").write_text(json.dumps({**body, **changes}))
    return directory / "tokenizer.json"


def test_a_tokenizer_that_pads_or_cuts_does_neither(tmp_path: Path) -> None:
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 3}
    padding |= {"pad_type_id": 0, "pad_token": "<pad>"}
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    path = changed_tokenizer(tmp_path, padding=padding, truncation=truncation)
    assert len(Tokenizer(path).encode("three")) == 5


def test_a_tokenizer_that_rewrites_texts(tmp_path: Path) -> None:
    grow = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 60
    for change in (
        {"normalizer": {"type": "Sequence", "normalizers": grow}},
        {"decoder": {"type": "Sequence", "decoders": grow}},
        {"decoder": None},
    ):
        with pytest.raises(BloomdeskError, match="rewrites texts"):
            Tokenizer(changed_tokenizer(tmp_path, **change))


def test_a_tokenizer_that_is_no_file(tmp_path: Path, odd: dict[str, Path]) -> None:
    for kind in ("a pipe", "an endless device", "a directory", "nothing"):
        (tmp_path / "tokenizer.json").symlink_to(odd[kind])
        with pytest.raises(BloomdeskError, match=r"cannot be read|is missing"):
            Tokenizer(tmp_path / "tokenizer.json")
        (tmp_path / "tokenizer.json").unlink()
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(BloomdeskError, match="larger than"):
        Tokenizer(tmp_path / "tokenizer.json")


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and make its checksum right, as a careful forger would."""
    body = json.loads((directory / "manifest.json").read_text())
    body.pop("sha256")
    change(body)
    (directory / "manifest.json").write_text(json.dumps({**body, "sha256": digest(body)}))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["parts"][1].update(size=2**62),
        lambda body: body["parts"][1].update(size=9),
        lambda body: body["parts"][1].update(file="../block_00.safetensors"),
        lambda body: body["parts"][1]["sources"][0].update(file="../../x.bin"),
        lambda body: body["parts"][1]["sources"][0].update(file=7),
        lambda body: body["parts"][1]["tensors"].reverse(),
        lambda body: body["parts"][1]["tensors"].append(body["parts"][1]["tensors"][0]),
        lambda body: body["parts"][1]["tensors"][0].update(shape=[64.0]),
        lambda body: body["parts"][1]["tensors"][0].update(xxh3_128="ab" * 32),
        lambda body: body["source"].update(repo=7),
        lambda body: body["source"].update(repo="\x1b[2J"),
        lambda body: body["source"].update({"\x1b[2J\n": 1}),
        lambda body: body["model"].update(n_layer=10**9),
        lambda body: body["model"].update(n_head=0),
        lambda body: body["companions"][0].update(file="../config.json"),
        lambda body: body.update(format_version=True),
    ],
)  # fmt: skip
def test_a_manifest_made_by_hand(
    made_copy: Path, bounded: Bounded, change: Callable[[dict[str, Any]], Any]
) -> None:
    edit(made_copy, change)
    bounded.refuses("manifest", made_copy)


def test_a_manifest_edited_by_hand(made_copy: Path, bounded: Bounded) -> None:
    path = made_copy / "manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 300', '"vocab_size": 301'))
    assert "edited or damaged" in bounded.refuses("manifest", made_copy)


def test_a_part_whose_data_starts_elsewhere(made_copy: Path) -> None:
    """The same tensors and the same size, but shifted off the page: never mapped."""
    path = made_copy / "block_00.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text, tensors = data[8 : 8 + length].rstrip(), data[8 + length :]
    edit(made_copy, lambda body: body["parts"][1].update(size=len(data) - 1))
    header = json.dumps(json.loads(text)).encode().ljust(length - 1)
    path.write_bytes((length - 1).to_bytes(8, "little") + header + tensors)
    with pytest.raises(BloomdeskError, match="does not hold the tensors"):
        Weights.open(made_copy)


def test_parts_that_are_no_files(made_copy: Path, odd: dict[str, Path]) -> None:
    path = made_copy / "block_01.safetensors"
    for kind in ("a pipe", "an endless device", "a directory", "nothing", "a loop", "another file"):
        path.unlink()
        path.symlink_to(odd[kind])
        with pytest.raises(BloomdeskError, match="block_01"):
            Weights.open(made_copy)


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_bytes(b"the only copy")
    return path


@pytest.mark.parametrize("suffix", ["", ".incomplete"])
def test_nothing_is_written_through_a_link(tmp_path: Path, precious: Path, suffix: str) -> None:
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "part"
    (tmp_path / "out" / f"part{suffix}").symlink_to(precious)
    write_atomically(path, b"new")
    assert precious.read_bytes() == b"the only copy"
    assert path.read_bytes() == b"new"
    assert not path.is_symlink()
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["part"]


def test_a_conversion_writes_through_no_link(tmp_path: Path, precious: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    synthetic(source, **SHAPE)
    convert(source, out)
    sound = content(out)
    for name in ("block_00.safetensors", "manifest.json.incomplete", "block_01.safetensors.incomplete"):
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(precious)
    for name in ("tokenizer.json", "block_01.safetensors"):
        (out / name).unlink()
        (out / name).symlink_to("/dev/null")
    with pytest.raises(BloomdeskError, match=r"tokenizer.json: cannot be read: it is not a regular file"):
        convert(source, out)
    (out / "tokenizer.json").unlink()
    convert(source, out)
    assert precious.read_bytes() == b"the only copy"
    aside = sorted(out.glob("*.changed"))
    assert [path.name for path in aside] == ["block_00.safetensors.changed", "block_01.safetensors.changed"]
    for path in aside:
        assert path.is_symlink()
        path.unlink()
    # The manifest is right and is not written again, so this name stays what it was.
    (out / "manifest.json.incomplete").unlink()
    assert content(out) == sound
    assert not any(path.is_symlink() for path in out.iterdir())


def test_an_encoded_header_is_what_the_reader_wants(tmp_path: Path, bounded: Bounded) -> None:
    (tmp_path / "x.safetensors").write_bytes(encode_header([("a", "F32", (2,))]) + bytes(8))
    assert bounded.read("header", tmp_path / "x.safetensors").error is None
