"""Lossless directories: every bit comes back, a part says how it is coded, and a directory has one form."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from runner.errors import BloomdeskError
from runner.format.coded import LOSSLESS, PLAIN, ROW_GROUPS_SUFFIX
from runner.format.manifest import Manifest, load_manifest
from runner.format.safetensors import read_header
from scripts.fakehub.checkpoint import bloom_shapes, from_state, old_config, synthetic, write_repo
from tests.support.commands import refused, run
from tests.support.lossless import content, decoded, flip, make
from tests.toolkit.source.test_shards import LAYOUTS, data, reference
from toolkit.commands.build import carry_out
from toolkit.commands.convert import convert, plan_conversion
from toolkit.commands.export import export
from toolkit.commands.info import inspect
from toolkit.commands.verify import verify
from toolkit.parts import coded_part, row_groups
from toolkit.parts.row_groups import batches_of_row_groups, chunk_nbytes
from toolkit.source.key_map import name_table

BLOCK = "block_01.safetensors"


Bits = Callable[[torch.Tensor], torch.Tensor]
# Bits of bf16 values that a coder could forget, from the numbers of the elements.
KINDS: list[Bits] = [
    lambda at: at * 31 % 65536,  # every pattern
    lambda at: 0x7F80 + at % 128 + at % 3 * 0x4000,  # infinite or not a number
    lambda at: at % 128 + at % 2 * 0x8000,  # denormal
    lambda at: at % 7 // 6 * 0x8000,  # zeros, some of them negative
    lambda at: torch.full_like(at, 0xBD31),  # one value
    lambda at: torch.randint(0, 65536, at.shape, generator=torch.Generator().manual_seed(len(at))),
    lambda at: (at % 256 << 7) | 5,  # all exponents in one row
]


def of_kinds(
    directory: Path, hidden: int, heads: int, blocks: int, vocabulary: int, kinds: list[Bits]
) -> Path:
    """A source whose tensors have values of these kinds in turns."""
    state = {}
    for number, (key, shape) in enumerate(bloom_shapes(hidden, blocks, vocabulary).items()):
        bits = kinds[number % len(kinds)](torch.arange(math.prod(shape)))
        state[key] = bits.to(torch.int32).to(torch.uint16).view(torch.bfloat16).reshape(shape)
    synthetic(directory, hidden_size=hidden, heads=heads, blocks=blocks, vocab_size=vocabulary)
    for path in directory.glob("pytorch_model*"):
        path.unlink()
    tokenizer = {path.name: path.read_bytes() for path in directory.glob("*token*.json")}
    write_repo(directory, from_state(state), old_config(hidden, heads, blocks, vocabulary), tokenizer)
    return directory


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_every_bit_comes_back(tmp_path: Path, kind: str) -> None:
    source, out = SOURCES[kind](tmp_path / "source"), tmp_path / "out"
    convert(source, out, form=LOSSLESS)
    manifest = load_manifest(out)
    assert manifest.form == LOSSLESS and not manifest.missing and verify(out).sound
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


@pytest.mark.slow
def test_the_miniature_comes_back(miniature: tuple[Path, Path], tmp_path: Path) -> None:
    source, plain = miniature
    convert(source, tmp_path / "out", form=LOSSLESS)
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
            assert header.tensors[tensor.name + ROW_GROUPS_SUFFIX].start % 8 == 0
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
    monkeypatch.setattr(row_groups, "THREADS", threads)
    source = make(tmp_path / "source", LAYOUTS["cut blocks"])
    convert(source, tmp_path / "out", form=LOSSLESS)
    for file in load_manifest(coded[1]).parts:
        assert (tmp_path / "out" / file).read_bytes() == (coded[1] / file).read_bytes(), file


def test_small_chunks_are_read_and_decoded_alike(
    coded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of one row group: more of them than may be on their way, here in every matrix."""
    monkeypatch.setattr(row_groups, "CHUNK", 1)
    monkeypatch.setattr(coded_part, "CHUNK", 100)
    convert(coded[0], tmp_path / "out", form=LOSSLESS)
    for name, there in content(coded[1]).items():
        assert (tmp_path / "out" / name).read_bytes() == there, name
    export(tmp_path / "out", tmp_path / "back")
    monkeypatch.undo()
    export(coded[1], tmp_path / "expected")
    assert content(tmp_path / "back") == content(tmp_path / "expected")


def test_groups_of_row_groups() -> None:
    assert chunk_nbytes(4 * 14336) == 12 * 4 * 14336 * 2
    columns = 2**16
    assert chunk_nbytes(columns) == 12 * columns * 2
    groups = batches_of_row_groups([0, 10, 30, 60], 30, columns)
    assert [(group.rows, group.start, group.nbytes, group.offsets) for group in groups] == [
        (12, 0, 10, (0, 10)),
        (12, 10, 20, (0, 20)),
        (6, 30, 30, (0, 30)),
    ]
    (one,) = batches_of_row_groups([0, 10, 30, 60], 30, 8)
    assert (one.rows, one.nbytes, one.offsets) == (30, 60, (0, 10, 30, 60))


def test_progress_counts_the_bytes_of_the_source(tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    source = make(tmp_path / "source")
    plan = plan_conversion(source, tmp_path / "out", form=LOSSLESS)
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
        convert(source, tmp_path / "out", form=LOSSLESS)
    assert "another --form" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_directory_has_one_form(coded: tuple[Path, Path], coded_copy: Path, tmp_path: Path) -> None:
    source, _ = coded
    before = content(coded_copy)
    with pytest.raises(BloomdeskError, match="started with --form lossless") as caught:
        convert(source, coded_copy)
    assert "give --form lossless" in caught.value.hint
    assert content(coded_copy) == before
    convert(source, tmp_path / "plain")
    with pytest.raises(BloomdeskError, match="started with --form plain") as caught:
        convert(source, tmp_path / "plain", form=LOSSLESS)
    assert "give --form plain" in caught.value.hint


@pytest.mark.parametrize(("first", "then"), [(PLAIN, LOSSLESS), (LOSSLESS, PLAIN)])
def test_a_directory_without_parts_takes_either_form(
    coded: tuple[Path, Path], tmp_path: Path, first: str, then: str
) -> None:
    """An attempt that came to nothing binds nobody."""
    out = tmp_path / "out"
    out.mkdir()
    model = load_manifest(coded[1]).model
    (out / "manifest.json").write_text(Manifest(model, load_manifest(coded[1]).source, form=first).to_json())
    convert(coded[0], out, form=then)
    assert load_manifest(out).form == then and verify(out).sound


def test_a_rerun_keeps_what_is_sound_and_makes_the_rest(coded: tuple[Path, Path], coded_copy: Path) -> None:
    source, out = coded[0], coded_copy
    before = content(out)
    assert convert(source, out, form=LOSSLESS).written == ()
    (out / "block_00.safetensors").unlink()
    with (out / BLOCK).open("ab") as file:
        file.write(b"x")
    flip(out / "block_02.safetensors", 300)
    (out / f"{BLOCK}.incomplete").write_bytes(b"half")
    summary = convert(source, out, form=LOSSLESS)
    assert summary.written == tuple(f"block_0{number}.safetensors" for number in range(3))
    aside = sorted(out.glob("*.changed"))
    assert [path.name for path in aside] == [f"{BLOCK}.changed", "block_02.safetensors.changed"]
    for path in aside:
        path.unlink()
    assert content(out) == before


def test_delete_source(coded: tuple[Path, Path], tmp_path: Path) -> None:
    source = make(tmp_path / "source", LAYOUTS["cut blocks"])
    plan = plan_conversion(source, tmp_path / "out", delete_source=True, form=LOSSLESS)
    assert plan.peak_bytes < plan.bytes_to_write
    carry_out(plan)
    assert not list(source.glob("*.bin"))
    for file in load_manifest(coded[1]).parts:
        assert (tmp_path / "out" / file).read_bytes() == (coded[1] / file).read_bytes()


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
    done = run("convert", source, out, "--form", "lossless")
    assert done.returncode == 0 and "5 parts written" in done.stdout, done
    assert "started with --form lossless" in refused("convert", source, out)
    shown = run("info", out).stdout
    assert "lossless, 0." in shown and "that plain weights take" in shown
    flip(out / BLOCK, 9000)
    done = run("repair", out, "--source", source)
    assert done.returncode == 0 and "1 parts and 0 small files made anew" in done.stdout, done
    assert content(out) == content(coded[1])


def test_a_record_of_a_coded_part_is_not_taken_for_a_plain_one(coded_copy: Path) -> None:
    manifest = load_manifest(coded_copy)
    body = json.loads(manifest.to_json())
    assert body["format_version"] == 2 and body["coding"] == LOSSLESS
    plain = {file: replace(record, decoded=()) for file, record in manifest.parts.items()}
    for forged in (replace(manifest, parts=plain), replace(manifest, form=PLAIN)):
        with pytest.raises(BloomdeskError, match="not a sound manifest"):
            Manifest.from_json(forged.to_json(), coded_copy / "manifest.json")
