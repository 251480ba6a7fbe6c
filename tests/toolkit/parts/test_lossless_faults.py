"""Lossless directories that were damaged, forged or interrupted: found and mended, and nothing unproven in place."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from runner.errors import BloomdeskError
from runner.format.coded import LOSSLESS, PLAIN, ROW_GROUPS_SUFFIX
from runner.format.layout import MANIFEST
from runner.format.manifest import load_manifest
from runner.format.safetensors import read_header
from runner.kernel import encode as encoder
from scripts.fakehub.server import Fault, LocalHub
from tests.support.lossless import (
    change_as_it_is_written,
    content,
    damage_everything,
    flip,
    interrupt_at,
    make,
)
from toolkit.commands.convert import convert
from toolkit.commands.export import export
from toolkit.commands.prepare import plan_preparation, prepare
from toolkit.commands.repair import repair
from toolkit.commands.schedule import space_to_prepare
from toolkit.commands.verify import verify
from toolkit.hub import retry
from toolkit.io.progress import Progress, silent
from toolkit.parts.destination import write_manifest
from toolkit.parts.part import part_size

REPO = "me/bloom"
BLOCK = "block_01.safetensors"
MATRIX = "mlp.dense_h_to_4h.weight"


def wrong_encoder(monkeypatch: pytest.MonkeyPatch, change: Callable[[bytearray], None]) -> None:
    """An encoder that is right but for what `change` does to what it makes of the second block's larger matrices."""
    right = encoder.encode_row_groups
    calls = []

    def encode(rows: bytearray, columns: int) -> tuple[bytes, list[int]]:
        coded, lengths = right(rows, columns)
        calls.append(len(rows))
        made = bytearray(coded)
        if calls.count(4 * 64 * 64 * 2) == 3:  # dense_h_to_4h and dense_4h_to_h of block 0, then of block 1
            change(made)
        return bytes(made), lengths

    monkeypatch.setattr(encoder, "encode_row_groups", encode)


@pytest.mark.parametrize(
    "change", [bytearray.reverse, lambda made: made.__setitem__(slice(40, 60), bytes(20))]
)
def test_a_part_that_does_not_decode_to_its_source_is_never_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytearray], None]
) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    wrong_encoder(monkeypatch, change)
    words = f"{BLOCK} does not read back from the disk as it should"
    with pytest.raises(BloomdeskError, match=words) as caught:
        convert(source, out, form=LOSSLESS)
    assert "check the disk" in caught.value.hint
    assert list(load_manifest(out).parts) == ["embedding.safetensors", "block_00.safetensors"]
    assert not list(out.glob("*.incomplete")) and not (out / BLOCK).exists()
    monkeypatch.undo()
    convert(source, out, form=LOSSLESS)
    assert verify(out).sound


@pytest.mark.parametrize("share", [0.0, 0.03, 0.12, 0.2, 0.5, 0.9, 0.999999])
def test_a_part_that_the_disk_changed_is_never_put_in_place(
    coded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """One bit of the file, from the header to the last vector, between writing and reading back."""
    out = tmp_path / "out"
    change_as_it_is_written(monkeypatch, out / f"{BLOCK}.incomplete", share)
    with pytest.raises(BloomdeskError, match=f"{BLOCK} does not read back"):
        convert(coded[0], out, form=LOSSLESS)
    assert not (out / BLOCK).exists() and BLOCK not in load_manifest(out).parts


def test_each_kind_of_damage_is_named(coded_copy: Path) -> None:
    entries = read_header(coded_copy / BLOCK).tensors
    for name in (MATRIX, MATRIX + ROW_GROUPS_SUFFIX, "mlp.dense_h_to_4h.bias"):
        for position in (entries[name].start, entries[name].end - 1):
            flip(coded_copy / BLOCK, position)
            assert [(item.file, item.tensor) for item in verify(coded_copy).damage] == [(BLOCK, name)]
            assert verify(coded_copy, quick=True).sound
            flip(coded_copy / BLOCK, position)
    for position in (3, 40, 4095):
        flip(coded_copy / BLOCK, position)
        for quick in (False, True):
            (damage,) = verify(coded_copy, quick=quick).damage
            assert (damage.file, damage.tensor) == (BLOCK, None) and "header" in damage.what
        flip(coded_copy / BLOCK, position)
    assert verify(coded_copy, sample=0.3, seed=1).sound
    (coded_copy / BLOCK).write_bytes((coded_copy / BLOCK).read_bytes()[:-100])
    assert "expected" in verify(coded_copy, quick=True).damage[0].what


def test_repair_makes_the_same_bytes_again(coded: tuple[Path, Path], coded_copy: Path) -> None:
    source, out = coded
    damage_everything(coded_copy, ROW_GROUPS_SUFFIX)
    report = verify(coded_copy)
    assert {item.file for item in report.damage} == set(load_manifest(out).parts)
    done = repair(coded_copy, source)
    assert set(done.parts) == set(load_manifest(out).parts) and done.manifest.form == LOSSLESS
    assert content(coded_copy) == content(out)


def test_an_interrupted_repair_is_resumed(coded: tuple[Path, Path], coded_copy: Path) -> None:
    source, out = coded
    damage_everything(coded_copy, ROW_GROUPS_SUFFIX)

    @contextmanager
    def work(verb: str, total: int) -> Iterator[Progress]:
        yield interrupt_at("block_01.safetensors") if verb == "repairing" else silent

    with pytest.raises(KeyboardInterrupt):
        repair(coded_copy, source, work=work)
    assert (coded_copy / MANIFEST).read_bytes() == (out / MANIFEST).read_bytes()
    assert set(repair(coded_copy, source).parts) == set(list(load_manifest(out).parts)[2:])
    assert content(coded_copy) == content(out)


def test_a_repair_that_an_earlier_version_began_is_finished(
    coded: tuple[Path, Path], coded_copy: Path
) -> None:
    """It deleted the damaged parts, and their records from all but the backup."""
    source, out = coded
    manifest = load_manifest(coded_copy)
    left = {file: record for file, record in manifest.parts.items() if file != BLOCK}
    (coded_copy / MANIFEST).write_text(replace(manifest, parts=left).to_json())
    (coded_copy / BLOCK).unlink()
    assert repair(coded_copy, source).parts == (BLOCK,)
    assert content(coded_copy) == content(out)


@pytest.mark.parametrize("name", [MATRIX, MATRIX + ROW_GROUPS_SUFFIX, "mlp.dense_h_to_4h.bias"])
def test_a_damaged_tensor_is_never_exported(coded_copy: Path, tmp_path: Path, name: str) -> None:
    entry = read_header(coded_copy / BLOCK).tensors[name]
    flip(coded_copy / BLOCK, (entry.start + entry.end) // 2)
    words = f"{BLOCK} is damaged and was not exported: {name.removesuffix(ROW_GROUPS_SUFFIX)}"
    with pytest.raises(BloomdeskError, match=words) as caught:
        export(coded_copy, tmp_path / "out")
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
    write_manifest(directory, forged)


@pytest.mark.slow
def test_a_forged_part_gives_an_error_or_the_right_bits(
    coded: tuple[Path, Path], coded_copy: Path, tmp_path: Path
) -> None:
    """Every hash of what is stored is right, so only decoding can tell."""
    export(coded[1], tmp_path / "expected")
    right = (tmp_path / "expected" / "model-00003-of-00005.safetensors").read_bytes()
    original, manifest = (coded_copy / BLOCK).read_bytes(), (coded_copy / "manifest.json").read_text()
    entries, chance, refusals = read_header(coded_copy / BLOCK).tensors, random.Random(5), 0
    for number in range(40):
        table, coded_bytes = (
            bytearray(original[entries[name].start : entries[name].end])
            for name in (MATRIX + ROW_GROUPS_SUFFIX, MATRIX)
        )
        forge(table, coded_bytes, chance, number % 5)
        with_bytes(coded_copy, {MATRIX + ROW_GROUPS_SUFFIX: bytes(table), MATRIX: bytes(coded_bytes)})
        assert verify(coded_copy).sound
        out = tmp_path / f"out{number}"
        try:
            export(coded_copy, out)
        except BloomdeskError as error:
            assert "was not exported" in error.message and error.message.isprintable()
            refusals += 1
        else:
            assert (out / "model-00003-of-00005.safetensors").read_bytes() == right
        (coded_copy / BLOCK).write_bytes(original)
        (coded_copy / "manifest.json").write_text(manifest)
    assert refusals > 25


def forge(table: bytearray, coded_bytes: bytearray, chance: random.Random, kind: int) -> None:
    if kind == 0:  # an offset of its own
        at = 8 * chance.randrange(len(table) // 8)
        offset = chance.choice((0, 1, -1, 2**40, 2**63 - 1, 17))
        table[at : at + 8] = offset.to_bytes(8, "little", signed=True)
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


def test_a_size_that_the_file_lacks_is_refused(coded_copy: Path) -> None:
    manifest = load_manifest(coded_copy)
    record = manifest.parts[BLOCK]
    tensors = [replace(t, shape=(t.shape[0] + 16,)) if t.name == MATRIX else t for t in record.tensors]
    forged = manifest.with_part(replace(record, tensors=tuple(tensors), size=record.size + 16))
    (coded_copy / "manifest.json").write_text(forged.to_json())
    assert BLOCK in {item.file for item in verify(coded_copy, quick=True).damage}


def test_sizes_are_estimated_from_above() -> None:
    """As weights of true shapes take 0.67 to 0.70, and coded bytes are known only when they are there."""
    from runner.estimate.family import SHAPES, VOCABULARY
    from runner.format.hyperparameters import Hyperparameters
    from runner.format.layout import part_specs

    hidden, heads, blocks = SHAPES["bloom"]
    model = Hyperparameters(hidden, heads, blocks, VOCABULARY, "BF16")
    plain = sum(part_size(spec, "BF16") for spec in part_specs(model))
    estimate = sum(part_size(spec, "BF16", LOSSLESS) for spec in part_specs(model))
    assert 0.70 < estimate / plain < 0.73
    assert 0.70 < space_to_prepare(model, LOSSLESS) / space_to_prepare(model) < 0.73


@pytest.fixture
def hub(coded: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setattr(retry, "BACKOFF", (0.01,) * 5)
    with LocalHub({REPO: coded[0]}) as local:
        monkeypatch.setenv("HF_ENDPOINT", local.endpoint)
        yield local


def test_prepare_and_repair_from_the_hub(hub: LocalHub, coded: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = prepare(REPO, out, form=LOSSLESS)
    assert done.bytes_written == sum((out / file).stat().st_size for file in done.written)
    parts = load_manifest(coded[1]).parts
    for file in parts:
        assert (out / file).read_bytes() == (coded[1] / file).read_bytes()
    before = content(out)
    assert not prepare(REPO, out, form=LOSSLESS).written
    with pytest.raises(BloomdeskError, match="started with --form lossless"):
        plan_preparation(REPO, out)
    damage_everything(out, ROW_GROUPS_SUFFIX)
    assert set(repair(out).parts) == set(parts)
    assert content(out) == before


@pytest.mark.slow
def test_prepare_resumes_after_a_kill(hub: LocalHub, coded: tuple[Path, Path], tmp_path: Path) -> None:
    """SIGKILL while a part is coded and while one is compared, with a drop on the line."""
    hub.fail("pytorch_model_00002-of-00005.bin", Fault(drop_after=40_000, times=1))
    code = """if 1:
        import os, signal, sys
        from pathlib import Path
        from toolkit.commands.prepare import prepare
        def progress(file, done, total):
            if file == sys.argv[3] and done * 3 > total * int(sys.argv[4]):
                os.kill(os.getpid(), signal.SIGKILL)
        prepare(sys.argv[1], Path(sys.argv[2]), progress=progress, form="lossless")
    """
    for number, third in ((0, 1), (1, 2)):
        file = f"block_0{number}.safetensors"
        command = [sys.executable, "-c", code, REPO, str(tmp_path / "out"), file, str(third)]
        done = subprocess.run(command, cwd=Path(__file__).resolve().parents[3])
        assert done.returncode == -signal.SIGKILL
        recorded = load_manifest(tmp_path / "out").parts
        assert len(recorded) == number + 1 and not (tmp_path / "out" / file).exists()
        assert not [item for item in verify(tmp_path / "out").damage if item.file in recorded]
    prepare(REPO, tmp_path / "out", form=LOSSLESS)
    prepare(REPO, tmp_path / "undisturbed", form=LOSSLESS)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_prepare_of_other_dtypes_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    make(tmp_path / "repo", dtype=dtype)
    with LocalHub({REPO: tmp_path / "repo"}) as local:
        monkeypatch.setenv("HF_ENDPOINT", local.endpoint)
        out = tmp_path / "out"
        with pytest.raises(BloomdeskError, match="lossless form"):
            prepare(REPO, out, form=LOSSLESS)
        assert not out.exists()
        prepare(REPO, out)
        assert verify(out).sound and load_manifest(out).form == PLAIN
