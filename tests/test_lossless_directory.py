"""Lossless directories: every bit comes back, damage is found and mended, and nothing unproven gets in place."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from runner.errors import BloomdeskError
from runner.header import read_header
from runner.lossless import decode_strips
from runner.prepared import (
    LOSSLESS,
    PLAIN,
    STRIPS_SUFFIX,
    Manifest,
    PartRecord,
    load_manifest,
    read_strips,
)
from scripts.local_hub import Fault, LocalHub
from scripts.make_checkpoint import Layout, bloom_shapes, from_state, old_config, synthetic, write_repo
from tests.test_cli import refused, run
from tests.test_shards import LAYOUTS, data, reference
from toolkit import coded_part, encoder, strips, wire
from toolkit.convert import carry_out, convert, plan_conversion
from toolkit.destination import STAGING
from toolkit.export import export
from toolkit.info import inspect
from toolkit.manifest_backup import write_backup
from toolkit.naming import name_table
from toolkit.parts import part_size
from toolkit.prepare import plan_preparation, prepare
from toolkit.repair import forget, plan_from_hub, plan_from_source
from toolkit.room import room_to_prepare
from toolkit.strips import chunk_nbytes, strip_groups
from toolkit.verify import verify

SHAPE = {"hidden_size": 64, "heads": 8, "blocks": 3, "vocab_size": 300}
REPO = "me/bloom"
BLOCK = "block_01.safetensors"
MATRIX = "mlp.dense_h_to_4h.weight"


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def make(directory: Path, layout: Layout = LAYOUTS["bloom"], **changes: object) -> Path:
    synthetic(directory, **{**SHAPE, **changes}, layout=layout)
    return directory


def flip(path: Path, position: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source, lossless directory); copy it before changing it."""
    base = tmp_path_factory.mktemp("coded")
    convert(make(base / "source"), base / "out", coding=LOSSLESS)
    return base / "source", base / "out"


@pytest.fixture
def bloom(coded: tuple[Path, Path], tmp_path: Path) -> Path:
    """A lossless directory of the test's own."""
    return Path(shutil.copytree(coded[1], tmp_path / "bloom"))


def patterns(shape: tuple[int, ...], kind: str) -> torch.Tensor:
    """bf16 tensors of values that a coder could forget about, bit for bit."""
    generator = torch.Generator().manual_seed(sum(shape))
    count = torch.Size(shape).numel()
    bits = {
        "every pattern": torch.arange(count) * 31 % 65536,
        "not numbers": 0x7F80 + torch.arange(count) % 128 + torch.arange(count) % 3 * 0x4000,
        "denormal": torch.arange(count) % 128 + torch.arange(count) % 2 * 0x8000,
        "zeros": torch.arange(count) % 7 // 6 * 0x8000,  # some of them negative
        "one value": torch.full((count,), 0xBD31),
        "noise": torch.randint(0, 65536, (count,), generator=generator),
        "all exponents in one row": (torch.arange(count) % 256 << 7) | 5,
    }[kind]
    return bits.to(torch.int32).to(torch.uint16).view(torch.bfloat16).reshape(shape)


def of_kinds(
    directory: Path, hidden: int, heads: int, blocks: int, vocabulary: int, kinds: list[str]
) -> Path:
    """A source whose tensors have values of these kinds in turns."""
    shapes = bloom_shapes(hidden, blocks, vocabulary)
    state = {
        key: patterns(shape, kinds[number % len(kinds)]) for number, (key, shape) in enumerate(shapes.items())
    }
    synthetic(directory, hidden_size=hidden, heads=heads, blocks=blocks, vocab_size=vocabulary)
    for path in directory.glob("pytorch_model*"):
        path.unlink()
    tokenizer = {path.name: path.read_bytes() for path in directory.glob("*token*.json")}
    write_repo(directory, from_state(state), old_config(hidden, heads, blocks, vocabulary), tokenizer)
    return directory


KINDS = [
    "every pattern",
    "not numbers",
    "denormal",
    "zeros",
    "one value",
    "noise",
    "all exponents in one row",
]
SOURCES: dict[str, Callable[[Path], Path]] = {
    "random": make,
    "in one file": lambda path: make(path, LAYOUTS["single bin"]),
    "cut blocks": lambda path: make(path, LAYOUTS["cut blocks"]),
    "strange values": lambda path: of_kinds(path, 20, 4, 3, 3500, KINDS),
    "strange values, turned": lambda path: of_kinds(path, 20, 4, 2, 3500, KINDS[::-1]),
    "odd shapes": lambda path: make(path, hidden_size=6, heads=2, vocab_size=37),
    "one column": lambda path: make(path, hidden_size=1, heads=1, vocab_size=4),
    "more than a panel": lambda path: make(path, hidden_size=1028, heads=4, blocks=1, vocab_size=50),
}


def decoded(directory: Path) -> Iterator[tuple[str, str, bytes]]:
    """(part, name, bits) of every matrix, by safetensors and the decoder alone."""
    for file, record in load_manifest(directory).parts.items():
        with safe_open(directory / file, framework="pt") as part:
            assert set(part.keys()) == {tensor.name for tensor in record.tensors}
            for tensor in record.decoded:
                rows, columns = tensor.shape
                table, coded = part.get_tensor(tensor.name + STRIPS_SUFFIX), part.get_tensor(tensor.name)
                assert table.dtype == torch.int64 and coded.dtype == torch.uint8
                offsets = read_strips(data(table), rows, columns, len(coded))
                assert list(offsets) == table.tolist()
                out = bytearray(rows * columns * 2)
                decode_strips(bytes(data(coded)), offsets, rows, columns, out)
                yield file, tensor.name, bytes(out)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_bit_comes_back(tmp_path: Path, kind: str) -> None:
    source, out = SOURCES[kind](tmp_path / "source"), tmp_path / "out"
    convert(source, out, coding=LOSSLESS)
    manifest = load_manifest(out)
    assert manifest.coding == LOSSLESS and not manifest.missing and verify(out).sound
    places = {place: key for key, place in name_table(manifest.model).items()}
    expected = {key.removeprefix("transformer."): value for key, value in reference(source).items()}
    matrices = 0
    for file, name, bits in decoded(out):
        assert bits == data(expected[places[file, name]]), name
        matrices += 1
    assert matrices == sum(tensor.ndim == 2 for tensor in expected.values())
    # The way back gives what a plain directory gives, which other tests compare with the source.
    convert(source, tmp_path / "plain")
    export(out, tmp_path / "back")
    export(tmp_path / "plain", tmp_path / "plain back")
    back, plain_back = content(tmp_path / "back"), content(tmp_path / "plain back")
    index = "model.safetensors.index.json"
    assert json.loads(back.pop(index))["weight_map"] == json.loads(plain_back.pop(index))["weight_map"]
    assert back == plain_back


def test_the_miniature_comes_back(miniature: tuple[Path, Path], tmp_path: Path) -> None:
    source, plain = miniature
    convert(source, tmp_path / "out", coding=LOSSLESS)
    found = {(file, name): bits for file, name, bits in decoded(tmp_path / "out")}
    assert len(found) == 281
    for file, record in load_manifest(plain).parts.items():
        tensors = load_file(plain / file)
        for tensor in record.tensors:
            if len(tensor.shape) == 2:
                assert found[file, tensor.name] == data(tensors[tensor.name])
    assert inspect(tmp_path / "out").ratio < 0.9  # rows of 64 columns; large ones leave less


def test_a_part_says_how_it_is_coded(coded: tuple[Path, Path]) -> None:
    _, out = coded
    manifest = load_manifest(out)
    for file, record in manifest.parts.items():
        with safe_open(out / file, framework="pt") as part:
            metadata = part.metadata()
        assert metadata["format"] == "pt"
        assert (out / file).read_bytes().startswith(record.header)
        header = read_header(out / file)
        assert header.data_start % 4096 == 0 and header.data_start == len(record.header)
        assert list(header.tensors) == [tensor.name for tensor in record.tensors]
        if not record.decoded:
            assert set(metadata) == {"format"}
            continue
        coding = json.loads(metadata["bloomdesk.lossless"])
        assert coding["version"] == 1
        assert coding["tensors"] == {
            tensor.name: {"dtype": "BF16", "shape": list(tensor.shape)} for tensor in record.decoded
        }
        for tensor in record.decoded:
            assert header.tensors[tensor.name].nbytes % 16 == 0
            assert header.tensors[tensor.name + STRIPS_SUFFIX].start % 8 == 0
    assert not manifest.parts["final_layernorm.safetensors"].decoded


def test_the_manifest_records_what_the_file_holds(coded: tuple[Path, Path]) -> None:
    source, out = coded
    places = {place: key for key, place in name_table(load_manifest(out).model).items()}
    expected = reference(source)
    for file, record in load_manifest(out).parts.items():
        content = (out / file).read_bytes()
        assert record.size == len(content)
        assert record.xxh3_128 == xxhash.xxh3_128_hexdigest(content)
        entries = read_header(out / file).tensors
        for tensor in record.tensors:
            entry = entries[tensor.name]
            assert tensor.xxh3_128 == xxhash.xxh3_128_hexdigest(content[entry.start : entry.end])
        for tensor in record.decoded:
            bits = data(expected[places[file, tensor.name]])
            assert tensor.xxh3_128 == xxhash.xxh3_128_hexdigest(bits)
        for shard in record.sources:
            assert shard.sha256 == hashlib.sha256((source / shard.file).read_bytes()).hexdigest()


@pytest.mark.parametrize("threads", [1, 7])
def test_threads_and_layouts_change_no_byte(
    coded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(strips, "THREADS", threads)
    source = make(tmp_path / "source", LAYOUTS["cut blocks"])
    convert(source, tmp_path / "out", coding=LOSSLESS)
    for file in load_manifest(coded[1]).parts:
        assert (tmp_path / "out" / file).read_bytes() == (coded[1] / file).read_bytes(), file


def test_small_chunks_are_read_and_decoded_alike(
    coded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of one strip: more of them than may be on their way, here in every matrix."""
    monkeypatch.setattr(strips, "CHUNK", 1)
    monkeypatch.setattr(coded_part, "CHUNK", 100)
    convert(coded[0], tmp_path / "out", coding=LOSSLESS)
    for name, there in content(coded[1]).items():
        assert (tmp_path / "out" / name).read_bytes() == there, name
    export(tmp_path / "out", tmp_path / "back")
    monkeypatch.undo()
    export(coded[1], tmp_path / "expected")
    assert content(tmp_path / "back") == content(tmp_path / "expected")


def test_groups_of_strips() -> None:
    assert chunk_nbytes(4 * 14336) == 12 * 4 * 14336 * 2
    columns = 2**16
    assert chunk_nbytes(columns) == 12 * columns * 2
    groups = strip_groups([0, 10, 30, 60], 30, columns)
    assert [(group.rows, group.start, group.nbytes, group.offsets) for group in groups] == [
        (12, 0, 10, (0, 10)),
        (12, 10, 20, (0, 20)),
        (6, 30, 30, (0, 30)),
    ]
    (one,) = strip_groups([0, 10, 30, 60], 30, 8)
    assert (one.rows, one.nbytes, one.offsets) == (30, 60, (0, 10, 30, 60))


def test_progress_counts_the_bytes_of_the_source(tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    source = make(tmp_path / "source")
    plan = plan_conversion(source, tmp_path / "out", coding=LOSSLESS)
    summary = carry_out(plan, lambda file, done, total: seen.setdefault(file, []).append((done, total)))
    for file, steps in seen.items():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps), file
        assert steps[-1][0] == steps[-1][1]
    assert sum(steps[-1][1] for steps in seen.values()) == plan.work
    assert summary.bytes_written == sum((tmp_path / "out" / file).stat().st_size for file in summary.written)


@pytest.mark.parametrize(("dtype", "name", "share"), [("float16", "F16", "0.85"), ("float32", "F32", "0.83")])
def test_other_dtypes_are_refused_before_anything_is_written(
    tmp_path: Path, dtype: str, name: str, share: str
) -> None:
    source = make(tmp_path / "source", dtype=dtype)
    with pytest.raises(BloomdeskError, match=f"weights are {name}.*leave {share}") as caught:
        convert(source, tmp_path / "out", coding=LOSSLESS)
    assert "without --lossless" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_directory_has_one_form(coded: tuple[Path, Path], bloom: Path, tmp_path: Path) -> None:
    source, _ = coded
    before = content(bloom)
    with pytest.raises(BloomdeskError, match="begun with --lossless") as caught:
        convert(source, bloom)
    assert "add --lossless" in caught.value.hint
    assert content(bloom) == before
    convert(source, tmp_path / "plain")
    with pytest.raises(BloomdeskError, match="begun without --lossless") as caught:
        convert(source, tmp_path / "plain", coding=LOSSLESS)
    assert "leave out --lossless" in caught.value.hint


@pytest.mark.parametrize(("begun", "then"), [(PLAIN, LOSSLESS), (LOSSLESS, PLAIN)])
def test_a_directory_without_parts_takes_either_form(
    coded: tuple[Path, Path], tmp_path: Path, begun: str, then: str
) -> None:
    """An attempt that came to nothing binds nobody."""
    out = tmp_path / "out"
    out.mkdir()
    model = load_manifest(coded[1]).model
    (out / "manifest.json").write_text(
        Manifest(model, load_manifest(coded[1]).source, coding=begun).to_json()
    )
    convert(coded[0], out, coding=then)
    assert load_manifest(out).coding == then and verify(out).sound


def test_a_rerun_keeps_what_is_sound_and_makes_the_rest(coded: tuple[Path, Path], bloom: Path) -> None:
    source, out = coded[0], bloom
    before = content(out)
    assert convert(source, out, coding=LOSSLESS).written == ()
    (out / "block_00.safetensors").unlink()
    with (out / BLOCK).open("ab") as file:
        file.write(b"x")
    flip(out / "block_02.safetensors", 300)
    (out / f"{BLOCK}.incomplete").write_bytes(b"half")
    summary = convert(source, out, coding=LOSSLESS)
    assert summary.written == tuple(f"block_0{number}.safetensors" for number in range(3))
    assert content(out) == before


def test_delete_source(coded: tuple[Path, Path], tmp_path: Path) -> None:
    source = make(tmp_path / "source", LAYOUTS["cut blocks"])
    plan = plan_conversion(source, tmp_path / "out", delete_source=True, coding=LOSSLESS)
    assert plan.peak_bytes < plan.bytes_to_write
    carry_out(plan)
    assert not list(source.glob("*.bin"))
    for file in load_manifest(coded[1]).parts:
        assert (tmp_path / "out" / file).read_bytes() == (coded[1] / file).read_bytes()


def wrong_encoder(monkeypatch: pytest.MonkeyPatch, change: Callable[[bytearray], None]) -> None:
    """An encoder that is right but for what `change` does to what it makes of the second block's larger matrices."""
    right = encoder.encode_strips
    calls = []

    def encode(rows: bytearray, columns: int) -> tuple[bytes, list[int]]:
        coded, lengths = right(rows, columns)
        calls.append(len(rows))
        made = bytearray(coded)
        if calls.count(4 * 64 * 64 * 2) == 3:  # dense_h_to_4h and dense_4h_to_h of block 0, then of block 1
            change(made)
        return bytes(made), lengths

    monkeypatch.setattr(encoder, "encode_strips", encode)


def swap_low_bytes(made: bytearray) -> None:
    made[:] = made[::-1]


@pytest.mark.parametrize("change", [swap_low_bytes, lambda made: made.__setitem__(slice(40, 60), bytes(20))])
def test_what_does_not_decode_to_the_source_is_never_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytearray], None]
) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    wrong_encoder(monkeypatch, change)
    with pytest.raises(
        BloomdeskError, match=f"{BLOCK} does not read back from the disk as the bits"
    ) as caught:
        convert(source, out, coding=LOSSLESS)
    assert "check the disk" in caught.value.hint
    assert list(load_manifest(out).parts) == ["embedding.safetensors", "block_00.safetensors"]
    assert not list(out.glob("*.incomplete")) and not (out / BLOCK).exists()
    monkeypatch.undo()
    convert(source, out, coding=LOSSLESS)
    assert verify(out).sound


@pytest.mark.parametrize("share", [0.0, 0.03, 0.12, 0.2, 0.5, 0.9, 0.999999])
def test_what_the_disk_got_wrong_is_never_put_in_place(
    coded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """One bit of the file, from the header to the last vector, between writing and reading back."""
    out, real = tmp_path / "out", os.fsync

    def lossy(descriptor: int) -> None:
        real(descriptor)
        half = out / f"{BLOCK}.incomplete"
        if half.exists() and os.path.samestat(os.fstat(descriptor), half.stat()):
            flip_in_place(half, int(share * half.stat().st_size))

    monkeypatch.setattr(os, "fsync", lossy)
    with pytest.raises(BloomdeskError, match=f"{BLOCK} does not read back"):
        convert(coded[0], out, coding=LOSSLESS)
    assert not (out / BLOCK).exists() and BLOCK not in load_manifest(out).parts


def flip_in_place(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 16]))


@pytest.mark.parametrize("failing", [1, 3, 6, 9])
def test_an_error_at_any_write_leaves_nothing_that_counts(
    coded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    out, writes, real = tmp_path / "out", [], os.fsync

    def full(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) > 3 * failing:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BloomdeskError, match="the disk is full"):
        convert(coded[0], out, coding=LOSSLESS)
    monkeypatch.undo()
    assert not [damage for damage in verify(out).damage if damage.file in load_manifest(out).parts]
    convert(coded[0], out, coding=LOSSLESS)
    assert content(out) == content(coded[1])


def test_each_kind_of_damage_is_named(bloom: Path) -> None:
    entries = read_header(bloom / BLOCK).tensors
    for name in (MATRIX, MATRIX + STRIPS_SUFFIX, "mlp.dense_h_to_4h.bias"):
        for position in (entries[name].start, entries[name].end - 1):
            flip(bloom / BLOCK, position)
            assert [(item.file, item.tensor) for item in verify(bloom).damage] == [(BLOCK, name)]
            assert verify(bloom, quick=True).sound
            flip(bloom / BLOCK, position)
    for position in (3, 40, 4095):
        flip(bloom / BLOCK, position)
        for quick in (False, True):
            (damage,) = verify(bloom, quick=quick).damage
            assert (damage.file, damage.tensor) == (BLOCK, None) and "header" in damage.what
        flip(bloom / BLOCK, position)
    assert verify(bloom, sample=0.3, seed=1).sound
    (bloom / BLOCK).write_bytes((bloom / BLOCK).read_bytes()[:-100])
    assert "expected" in verify(bloom, quick=True).damage[0].what


def damage_everything(directory: Path) -> None:
    """In the offsets of strips, in coded bytes, in a header, cut, gone."""
    flip(directory / BLOCK, read_header(directory / BLOCK).tensors[MATRIX + STRIPS_SUFFIX].start + 9)
    block = directory / "block_00.safetensors"
    flip(block, read_header(block).tensors[MATRIX].start + 100)
    flip(directory / "final_layernorm.safetensors", 50)
    embedding = directory / "embedding.safetensors"
    embedding.write_bytes(embedding.read_bytes()[:-3])
    (directory / "block_02.safetensors").unlink()


def test_repair_makes_the_same_bytes_again(coded: tuple[Path, Path], bloom: Path) -> None:
    source, out = coded
    damage_everything(bloom)
    report = verify(bloom)
    assert {item.file for item in report.damage} == set(load_manifest(out).parts)
    known = forget(bloom, report.damage, source)
    assert known.coding == LOSSLESS
    carry_out(plan_from_source(bloom, source, known))
    assert content(bloom) == content(out)


def test_an_interrupted_repair_is_gone_on_with(coded: tuple[Path, Path], bloom: Path) -> None:
    source, out = coded
    damage_everything(bloom)
    forget(bloom, verify(bloom).damage, source)
    known = forget(bloom, verify(bloom).damage, source)
    assert not load_manifest(bloom).parts and len(known.parts) == 5
    carry_out(plan_from_source(bloom, source, known))
    assert content(bloom) == content(out)


@pytest.mark.parametrize("name", [MATRIX, MATRIX + STRIPS_SUFFIX, "mlp.dense_h_to_4h.bias"])
def test_a_damaged_tensor_is_never_exported(bloom: Path, tmp_path: Path, name: str) -> None:
    entry = read_header(bloom / BLOCK).tensors[name]
    flip(bloom / BLOCK, (entry.start + entry.end) // 2)
    words = f"{BLOCK} is damaged and was not exported: {name.removesuffix(STRIPS_SUFFIX)}"
    with pytest.raises(BloomdeskError, match=words) as caught:
        export(bloom, tmp_path / "out")
    assert "bloomdesk repair" in caught.value.hint
    assert not (tmp_path / "out" / "model-00003-of-00005.safetensors").exists()


def with_bytes(directory: Path, changed: dict[str, bytes]) -> None:
    """The block with other bytes in some of its tensors, of any length, and a manifest that believes all of it."""
    manifest = load_manifest(directory)
    record, old = manifest.parts[BLOCK], (directory / BLOCK).read_bytes()
    entries = read_header(directory / BLOCK).tensors
    tensors, body = [], b""
    for tensor in record.tensors:
        own = changed.get(tensor.name, old[entries[tensor.name].start : entries[tensor.name].end])
        shape = (len(own),) if tensor.dtype == "U8" else tensor.shape
        tensors.append(replace(tensor, shape=shape, xxh3_128=xxhash.xxh3_128_hexdigest(own)))
        body += own
    record = replace(record, tensors=tuple(tensors))
    whole = record.header + body
    record = replace(record, size=len(whole), xxh3_128=xxhash.xxh3_128_hexdigest(whole))
    (directory / BLOCK).write_bytes(whole)
    forged = manifest.with_part(record)
    (directory / "manifest.json").write_text(forged.to_json())
    write_backup(directory, forged)


def test_a_forged_part_gives_an_error_or_the_right_bits(
    coded: tuple[Path, Path], bloom: Path, tmp_path: Path
) -> None:
    """Every hash of what is stored is right, so only decoding can tell."""
    export(coded[1], tmp_path / "expected")
    right = (tmp_path / "expected" / "model-00003-of-00005.safetensors").read_bytes()
    original, manifest = (bloom / BLOCK).read_bytes(), (bloom / "manifest.json").read_text()
    entries, chance, refusals = read_header(bloom / BLOCK).tensors, random.Random(5), 0
    for number in range(40):
        table, coded_bytes = (
            bytearray(original[entries[name].start : entries[name].end])
            for name in (MATRIX + STRIPS_SUFFIX, MATRIX)
        )
        forge(table, coded_bytes, chance, number % 5)
        with_bytes(bloom, {MATRIX + STRIPS_SUFFIX: bytes(table), MATRIX: bytes(coded_bytes)})
        assert verify(bloom).sound
        out = tmp_path / f"out{number}"
        try:
            export(bloom, out)
        except BloomdeskError as error:
            assert "was not exported" in error.message and error.message.isprintable()
            refusals += 1
        else:
            assert (out / "model-00003-of-00005.safetensors").read_bytes() == right
        (bloom / BLOCK).write_bytes(original)
        (bloom / "manifest.json").write_text(manifest)
    assert refusals > 25


def forge(table: bytearray, coded_bytes: bytearray, chance: random.Random, kind: int) -> None:
    if kind == 0:  # an offset of its own
        at = 8 * chance.randrange(len(table) // 8)
        table[at : at + 8] = chance.choice((0, 1, -1, 2**40, 2**63 - 1, 17)).to_bytes(
            8, "little", signed=True
        )
    elif kind == 1:  # bits of the coded bytes
        for _ in range(chance.randrange(1, 5)):
            coded_bytes[chance.randrange(len(coded_bytes))] ^= 1 << chance.randrange(8)
    elif kind == 2:  # noise
        start = chance.randrange(len(coded_bytes))
        noise = chance.randbytes(min(chance.choice((4, 16, 500)), len(coded_bytes) - start))
        coded_bytes[start : start + len(noise)] = noise
    elif kind == 3:  # longer at its end, with a table that says so
        coded_bytes += chance.randbytes(16 * chance.randrange(1, 20))
        table[-8:] = len(coded_bytes).to_bytes(8, "little")
    else:  # shorter at its end
        del coded_bytes[-16 * chance.randrange(1, 8) :]
        table[-8:] = len(coded_bytes).to_bytes(8, "little")


def test_a_size_that_the_file_lacks_is_refused(bloom: Path) -> None:
    manifest = load_manifest(bloom)
    record = manifest.parts[BLOCK]
    tensors = [replace(t, shape=(t.shape[0] + 16,)) if t.name == MATRIX else t for t in record.tensors]
    forged = manifest.with_part(replace(record, tensors=tuple(tensors), size=record.size + 16))
    (bloom / "manifest.json").write_text(forged.to_json())
    assert BLOCK in {item.file for item in verify(bloom, quick=True).damage}


def test_sizes_are_estimated_from_above() -> None:
    """As weights of true shapes take 0.67 to 0.70, and coded bytes are known only when they are there."""
    from runner.family import SHAPES, VOCABULARY
    from runner.prepared import Hyperparameters, part_specs

    hidden, heads, blocks = SHAPES["bloom"]
    model = Hyperparameters(hidden, heads, blocks, VOCABULARY, "BF16")
    plain = sum(part_size(spec, "BF16") for spec in part_specs(model))
    estimate = sum(part_size(spec, "BF16", LOSSLESS) for spec in part_specs(model))
    assert 0.70 < estimate / plain < 0.73
    assert 0.70 < room_to_prepare(model, LOSSLESS) / room_to_prepare(model) < 0.73


@pytest.fixture
def hub(coded: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setattr(wire, "WAITS", (0.01,) * 5)
    with LocalHub({REPO: coded[0]}) as local:
        monkeypatch.setenv("HF_ENDPOINT", local.endpoint)
        yield local


def test_prepare_and_repair_from_the_hub(hub: LocalHub, coded: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = prepare(REPO, out, coding=LOSSLESS)
    assert done.bytes_written == sum((out / file).stat().st_size for file in done.written)
    parts = load_manifest(coded[1]).parts
    for file in parts:
        assert (out / file).read_bytes() == (coded[1] / file).read_bytes()
    before = content(out)
    assert not prepare(REPO, out, coding=LOSSLESS).written
    with pytest.raises(BloomdeskError, match="begun with --lossless"):
        plan_preparation(REPO, out)
    damage_everything(out)
    known = forget(out, verify(out).damage, None)
    from toolkit.prepare import carry_out as carry_out_preparation

    assert set(carry_out_preparation(plan_from_hub(out, known)).written) == set(parts)
    assert content(out) == before


def test_prepare_killed_goes_on(hub: LocalHub, coded: tuple[Path, Path], tmp_path: Path) -> None:
    """SIGKILL while a part is coded and while one is compared, with a drop on the line."""
    hub.fail("pytorch_model_00002-of-00005.bin", Fault(drop_after=40_000, times=1))
    code = """if 1:
        import os, signal, sys
        from pathlib import Path
        from toolkit.prepare import prepare
        def progress(file, done, total):
            if file == sys.argv[3] and done * 3 > total * int(sys.argv[4]):
                os.kill(os.getpid(), signal.SIGKILL)
        prepare(sys.argv[1], Path(sys.argv[2]), progress=progress, coding="lossless")
    """
    for number, third in ((0, 1), (1, 2)):
        file = f"block_0{number}.safetensors"
        command = [sys.executable, "-c", code, REPO, str(tmp_path / "out"), file, str(third)]
        done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1])
        assert done.returncode == -signal.SIGKILL
        recorded = load_manifest(tmp_path / "out").parts
        assert len(recorded) == number + 1 and not (tmp_path / "out" / file).exists()
        assert not [item for item in verify(tmp_path / "out").damage if item.file in recorded]
    prepare(REPO, tmp_path / "out", coding=LOSSLESS)
    prepare(REPO, tmp_path / "undisturbed", coding=LOSSLESS)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_prepare_of_other_dtypes_is_refused_and_can_go_on_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Four bytes show in the sizes; which two they are the first shard tells, and it need not come twice."""
    make(tmp_path / "repo", dtype=dtype)
    with LocalHub({REPO: tmp_path / "repo"}) as local:
        monkeypatch.setenv("HF_ENDPOINT", local.endpoint)
        out = tmp_path / "out"
        with pytest.raises(BloomdeskError, match="lossless form"):
            prepare(REPO, out, coding=LOSSLESS)
        assert out.exists() == (dtype == "float16")
        staged = out / STAGING / "pytorch_model_00001-of-00005.bin"
        assert staged.exists() == (dtype == "float16")
        done = prepare(REPO, out)
        assert verify(out).sound and load_manifest(out).coding == PLAIN
        assert (done.resumed > 0) == (dtype == "float16")


def test_info(coded: tuple[Path, Path], tmp_path: Path) -> None:
    found = inspect(coded[1])
    manifest = load_manifest(coded[1])
    stored = sum(record.size - len(record.header) for record in manifest.parts.values())
    plain = inspect_plain(coded[0], tmp_path / "plain")
    assert found.pass_bytes == stored and found.plain_bytes == plain
    assert found.as_json()["coding"] == LOSSLESS and found.as_json()["format_version"] == 2
    assert found.ratio == stored / plain
    half = replace(manifest, parts={BLOCK: manifest.parts[BLOCK]})
    assert 0.6 < replace(found, manifest=half).ratio < 1.2


def inspect_plain(source: Path, out: Path) -> int:
    convert(source, out)
    found = inspect(out)
    assert found.as_json()["coding"] == PLAIN and found.ratio == 1
    return found.pass_bytes


def test_the_commands(coded: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = coded[0], tmp_path / "out"
    done = run("convert", source, out, "--lossless")
    assert done.returncode == 0 and "5 parts written" in done.stdout, done
    assert "begun with --lossless" in refused("convert", source, out)
    shown = run("info", out).stdout
    assert "lossless, 0." in shown and "that plain weights take" in shown
    flip(out / BLOCK, 9000)
    done = run("repair", out, "--source", source)
    assert done.returncode == 0 and "1 parts and 0 small files made anew" in done.stdout, done
    assert content(out) == content(coded[1])


def test_a_record_of_a_coded_part_is_not_taken_for_a_plain_one(bloom: Path) -> None:
    manifest = load_manifest(bloom)
    body = json.loads(manifest.to_json())
    assert body["format_version"] == 2 and body["coding"] == LOSSLESS
    plain: dict[str, PartRecord] = {
        file: replace(record, decoded=()) for file, record in manifest.parts.items()
    }
    with pytest.raises(BloomdeskError, match="not a sound manifest"):
        Manifest.from_json(replace(manifest, parts=plain).to_json(), bloom / "manifest.json")
    with pytest.raises(BloomdeskError, match="not a sound manifest"):
        Manifest.from_json(replace(manifest, coding=PLAIN).to_json(), bloom / "manifest.json")
