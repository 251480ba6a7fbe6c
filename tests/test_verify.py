"""Verification: one test for each kind of damage, with the damaged file and tensor named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from runner.errors import BloomdeskError
from runner.header import read_header
from runner.prepared import load_manifest
from scripts.make_checkpoint import synthetic
from toolkit.convert import convert
from toolkit.verify import Damage, verify

BLOCK = "block_01.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("made")
    synthetic(base / "source", hidden_size=64, heads=8, blocks=3, vocab_size=300)
    convert(base / "source", base / "out")
    return base / "out"


@pytest.fixture
def prepared(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "prepared"))


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def named(damage: tuple[Damage, ...]) -> list[tuple[str, str | None]]:
    return [(item.file, item.tensor) for item in damage]


def test_sound(prepared: Path) -> None:
    whole, quick = verify(prepared), verify(prepared, quick=True)
    assert whole.sound and quick.sound
    assert whole.files_checked == quick.files_checked == 9
    records = load_manifest(prepared).records
    assert whole.bytes_read == sum(record.size for record in records)
    assert quick.bytes_read == 0


def test_progress_reaches_the_end_of_every_file(prepared: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    verify(prepared, progress=lambda file, done, total: seen.update({file: (done, total)}))
    assert seen == {record.file: (record.size, record.size) for record in load_manifest(prepared).records}


def test_a_flipped_bit_names_the_tensor(prepared: Path) -> None:
    for entry in read_header(prepared / BLOCK).tensors.values():
        for position in (entry.start, entry.end - 1):
            flip(prepared / BLOCK, position)
            report = verify(prepared)
            assert named(report.damage) == [(BLOCK, entry.name)]
            assert verify(prepared, quick=True).sound
            flip(prepared / BLOCK, position)
    assert verify(prepared).sound


def test_two_damaged_tensors_are_both_named(prepared: Path) -> None:
    entries = read_header(prepared / BLOCK).tensors
    for name in ("mlp.dense_h_to_4h.bias", "input_layernorm.weight"):
        flip(prepared / BLOCK, entries[name].start)
    flip(prepared / "embedding.safetensors", 10**4)
    assert named(verify(prepared).damage) == [
        ("embedding.safetensors", "word_embeddings.weight"),
        (BLOCK, "input_layernorm.weight"),
        (BLOCK, "mlp.dense_h_to_4h.bias"),
    ]


@pytest.mark.parametrize("position", [0, 7, 8, 20, 120, 4095])
def test_a_flipped_bit_in_the_header(prepared: Path, position: int) -> None:
    """Length, JSON, padding."""
    flip(prepared / BLOCK, position)
    report = verify(prepared)
    assert set(named(report.damage)) == {(BLOCK, None)}
    assert len(report.damage) == 1


@pytest.mark.parametrize("position", [0, 8, 20])
def test_quick_sees_a_damaged_header(prepared: Path, position: int) -> None:
    flip(prepared / BLOCK, position)
    assert named(verify(prepared, quick=True).damage) == [(BLOCK, None)]


@pytest.mark.parametrize("length", [0, 5, 4096, 20_000, -1])
def test_truncation(prepared: Path, length: int) -> None:
    content = (prepared / BLOCK).read_bytes()
    (prepared / BLOCK).write_bytes(content[:length])
    quick, whole = verify(prepared, quick=True), verify(prepared)
    assert named(quick.damage) == [(BLOCK, None)]
    assert "expected" in quick.damage[0].what
    assert (BLOCK, "mlp.dense_4h_to_h.bias") in named(whole.damage)
    if length == -1:
        assert len(whole.damage) == 2


def test_bytes_added(prepared: Path) -> None:
    with (prepared / BLOCK).open("ab") as file:
        file.write(b"\0")
    for quick in (True, False):
        assert named(verify(prepared, quick=quick).damage) == [(BLOCK, None)]


@pytest.mark.parametrize(
    "file", [BLOCK, "embedding.safetensors", "tokenizer.json", "special_tokens_map.json"]
)
def test_a_missing_file(prepared: Path, file: str) -> None:
    (prepared / file).unlink()
    for quick in (True, False):
        report = verify(prepared, quick=quick)
        assert report.damage == (Damage(file, None, "it is missing"),)


def test_swapped_files(prepared: Path) -> None:
    """Two blocks have equal headers, so only their bytes tell them apart."""
    first, second, spare = prepared / "block_00.safetensors", prepared / BLOCK, prepared / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)
    assert {item.file for item in verify(prepared).damage} == {first.name, second.name}
    shutil.copy(prepared / "final_layernorm.safetensors", first)
    assert "block_00.safetensors" in {item.file for item in verify(prepared, quick=True).damage}


def test_a_damaged_companion(prepared: Path) -> None:
    flip(prepared / "tokenizer.json", 9)
    assert named(verify(prepared).damage) == [("tokenizer.json", None)]
    assert verify(prepared, quick=True).sound
    (prepared / "tokenizer.json").write_bytes(b"")
    assert named(verify(prepared, quick=True).damage) == [("tokenizer.json", None)]


def test_an_unreadable_file_is_damage(prepared: Path) -> None:
    (prepared / BLOCK).unlink()
    (prepared / BLOCK).mkdir()
    for quick in (True, False):
        report = verify(prepared, quick=quick)
        assert named(report.damage) == [(BLOCK, None)]
        assert "cannot be read" in report.damage[0].what


def test_parts_that_were_never_made(made: Path, tmp_path: Path) -> None:
    manifest = load_manifest(made)
    kept = {file: record for file, record in manifest.parts.items() if file != BLOCK}
    out = Path(shutil.copytree(made, tmp_path / "out"))
    (out / "manifest.json").write_text(type(manifest)(manifest.model, manifest.source, kept, {}).to_json())
    (out / f"{BLOCK}.incomplete").write_bytes(b"half")
    report = verify(out, quick=True)
    assert named(report.damage) == [(BLOCK, None), ("config.json", None), ("tokenizer.json", None)]
    assert report.leftovers == (f"{BLOCK}.incomplete",)


def test_unknown_files_are_left_alone(prepared: Path) -> None:
    (prepared / "notes.txt").write_text("mine")
    assert verify(prepared).sound


def test_what_cannot_be_checked_at_all(prepared: Path, tmp_path: Path) -> None:
    manifest = prepared / "manifest.json"
    body = json.loads(manifest.read_text())
    body["parts"][0]["size"] += 1
    for text in (json.dumps(body), manifest.read_text()[:-20], "", "{}"):
        manifest.write_text(text)
        with pytest.raises(BloomdeskError, match="not a sound manifest"):
            verify(prepared)
    manifest.unlink()
    with pytest.raises(BloomdeskError, match="not a prepared checkpoint"):
        verify(prepared)
    with pytest.raises(BloomdeskError, match="is not a directory"):
        verify(tmp_path / "absent")
