"""Verification: one test for each kind of damage, with the damaged file and tensor named."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from statistics import mean

import pytest

from runner.errors import BloomdeskError
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import part_specs
from runner.format.manifest import PartRecord, TensorRecord, load_manifest
from runner.format.safetensors import read_header
from scripts.fakehub.checkpoint import synthetic
from toolkit.commands.convert import convert
from toolkit.commands.verify import Damage, plan_verify, verify
from toolkit.io import reader as readahead
from toolkit.parts.manifest_backup import write_backup
from toolkit.parts.regions import Region, choose, regions_of

BLOCK = "block_01.safetensors"


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


@pytest.mark.parametrize("position", [0, 8, 20, 30, 4095])
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
    (prepared / "manifest.backup.json").unlink()
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


def test_the_report_does_not_depend_on_the_threads(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage in the order of the manifest, with pieces so small that every file is many."""
    monkeypatch.setattr(readahead, "BLOCK", 5_000)
    entries = read_header(prepared / BLOCK).tensors
    for name in ("mlp.dense_4h_to_h.weight", "input_layernorm.weight"):
        flip(prepared / BLOCK, entries[name].start)
    for file in ("embedding.safetensors", "block_00.safetensors"):
        flip(prepared / file, 4_500)
    flip(prepared / "tokenizer.json", 9)
    (prepared / "final_layernorm.safetensors").write_bytes(b"")
    reports = [verify(prepared, threads=threads) for threads in (1, 2, 3, 16, 1, 16)]
    assert len(set(reports)) == 1
    assert [file for file, _ in named(reports[0].damage)] == [
        "embedding.safetensors",
        "block_00.safetensors",
        BLOCK,
        BLOCK,
        *["final_layernorm.safetensors"] * 3,
        "tokenizer.json",
    ]


def test_one_file_and_many_are_read_by_several_threads(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read waits for a second one, of the same large file or of the next small one."""
    monkeypatch.setattr(readahead, "BLOCK", 5_000)
    read, meeting = readahead.read_block, threading.Barrier(2, timeout=20)
    together: list[tuple[str, threading.Thread]] = []

    def meet(file: readahead.OpenedFile, start: int, buffer: memoryview, keep_cached: bool) -> int:
        together.append((file.path.name, threading.current_thread()))
        if len(together) <= 6:
            meeting.wait()
        return read(file, start, buffer, keep_cached)

    monkeypatch.setattr(readahead, "read_block", meet)
    assert verify(prepared, threads=2).sound
    assert len({thread for file, thread in together if file == BLOCK}) == 2


def test_progress_comes_from_the_calling_thread_and_only_rises(prepared: Path) -> None:
    threads, last = set(), ("", 0)

    def hear(file: str, done: int, total: int) -> None:
        nonlocal last
        assert done <= total and (file != last[0] or done > last[1])
        threads.add(threading.get_ident())
        last = file, done

    verify(prepared, progress=hear)
    assert threads == {threading.get_ident()}


def test_an_error_in_the_middle_of_a_file_is_its_damage_alone(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "BLOCK", 5_000)
    read = readahead.read_block

    def fail(file: readahead.OpenedFile, start: int, buffer: memoryview, keep_cached: bool) -> int:
        if file.path.name == BLOCK and start > 50_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, start, buffer, keep_cached)

    monkeypatch.setattr(readahead, "read_block", fail)
    flip(prepared / "block_02.safetensors", 10_000)
    report = verify(prepared)
    assert [item.file for item in report.damage] == [BLOCK, "block_02.safetensors"]
    assert report.damage[0].what == f"it cannot be read: {os.strerror(errno.EIO)}"
    sizes = {record.file: record.size for record in load_manifest(prepared).records}
    assert sum(sizes.values()) - sizes[BLOCK] < report.bytes_read < sum(sizes.values())


def test_an_error_of_the_progress_ends_the_check(prepared: Path) -> None:
    def stop(file: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        verify(prepared, progress=stop)
    assert threading.active_count() == before


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no such system call here")
def test_what_was_read_leaves_the_page_cache(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "BLOCK", 5_000)
    let_go: list[int] = []

    def advise(descriptor: int, start: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            assert length <= 5_000  # never what is still to be read
            let_go.append(length)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    report = verify(prepared)
    assert sum(let_go) == report.bytes_read > 0


MEASURE = """
import sys
from pathlib import Path
from toolkit.commands.verify import verify

most = 0
def look(file, done, total):
    global most
    lines = Path("/proc/self/status").read_text().splitlines()
    most = max(most, next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))

assert verify(Path(sys.argv[1]), progress=look).bytes_read > 100e6
print(most)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's figures")
def test_memory_is_bounded(tmp_path: Path) -> None:
    synthetic(tmp_path / "source", hidden_size=1024, heads=8, blocks=3, vocab_size=20_000)
    convert(tmp_path / "source", tmp_path / "out")
    write_backup(tmp_path / "out", load_manifest(tmp_path / "out"))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert int(done.stdout) * 1024 < 300e6


def bloom_176b() -> list[Region]:
    model = Hyperparameters(14336, 112, 70, 250_880, "BF16")
    regions: list[Region] = []
    for spec in part_specs(model):
        tensors = (TensorRecord(name, "BF16", shape, "0" * 32) for name, shape in spec.tensors.items())
        regions += regions_of(PartRecord(spec.file, 0, "0" * 32, tuple(tensors), ()))
    return regions


def test_a_sample_is_about_the_share_and_every_tensor_has_its_turn() -> None:
    regions = bloom_176b()
    everything = sum(region.nbytes for region in regions)
    shares, seen = [], set()
    for seed in range(400):
        chosen = choose(regions, 0.05, seed)
        seen |= set(chosen)
        shares.append(sum(region.nbytes for region in chosen) / everything)
    assert seen == set(regions)
    assert mean(shares) == pytest.approx(0.05, rel=0.03)
    assert max(abs(share - 0.05) for share in shares) < 7.2e9 / everything
    largest = max(regions, key=lambda region: region.nbytes)
    often = sum(largest in choose(regions, 0.05, seed) for seed in range(400, 800))
    assert 0.02 < often / 400 < 0.09


def test_every_run_looks_at_something_else() -> None:
    regions = bloom_176b()
    assert len({choose(regions, 0.05) for _ in range(5)}) == 5
    assert choose(regions, 0.05, seed=7) == choose(regions, 0.05, seed=7)


def test_a_sample_looks_at_one_tensor_at_least(prepared: Path) -> None:
    for seed in range(50):
        assert any(not region.is_header for region in plan_verify(prepared, sample=1e-9, seed=seed).regions)


def test_the_report_says_how_much_was_looked_at(prepared: Path) -> None:
    seen: dict[str, int] = {}
    plan = plan_verify(prepared, sample=0.3, seed=1)
    report = verify(
        prepared, sample=0.3, seed=1, progress=lambda file, done, total: seen.update({file: total})
    )
    assert report.sound and report.sample == 0.3
    assert report.bytes_recorded == sum(record.size for record in load_manifest(prepared).records)
    assert report.bytes_read == plan.bytes_to_read == sum(seen.values())
    assert report.share == report.bytes_read / report.bytes_recorded < 1
    assert verify(prepared).share == 1 and verify(prepared, quick=True).share == 0
    assert verify(prepared, sample=1).share == 1


def test_a_sample_finds_what_it_looks_at(prepared: Path) -> None:
    for region in plan_verify(prepared).regions:
        if region.tensor is not None:
            flip(prepared / region.file, region.start + region.nbytes // 2)
    flip(prepared / "tokenizer.json", 9)
    for seed in range(20):
        chosen = plan_verify(prepared, sample=0.2, seed=seed).regions
        damage = verify(prepared, sample=0.2, seed=seed).damage
        whole = {name for name in ("tokenizer.json",) if name in {region.file for region in chosen}}
        assert set(named(damage)) == {
            (region.file, region.tensor)
            for region in chosen
            if region.tensor is not None or region.file in whole
        }


@pytest.mark.parametrize("position", [0, 8, 4095])
def test_a_sample_looks_at_every_header(prepared: Path, position: int) -> None:
    for file in load_manifest(prepared).parts:
        flip(prepared / file, position)
        assert (file, None) in named(verify(prepared, sample=1e-9).damage)
        flip(prepared / file, position)


def test_a_sample_looks_at_every_size(prepared: Path) -> None:
    for record in load_manifest(prepared).records:
        with (prepared / record.file).open("ab") as file:
            file.write(b"\0")
    damage = verify(prepared, sample=1e-9).damage
    assert {item.file for item in damage} == {record.file for record in load_manifest(prepared).records}


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_a_share_that_is_none(prepared: Path, share: float) -> None:
    with pytest.raises(BloomdeskError, match="above 0% and at most 100%"):
        verify(prepared, sample=share)


def test_quick_takes_no_sample(prepared: Path) -> None:
    with pytest.raises(BloomdeskError, match="takes no sample"):
        verify(prepared, quick=True, sample=0.5)


def test_systems_without_positioned_reads(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "BLOCK", 5_000)
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert verify(prepared, threads=4).sound
    flip(prepared / BLOCK, 50_000)
    assert {item.file for item in verify(prepared, threads=4).damage} == {BLOCK}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's figures")
def test_few_files_are_open_at_a_time_and_none_afterwards(prepared: Path) -> None:
    def count() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    before, most = count(), []
    verify(prepared, progress=lambda file, done, total: most.append(count()), threads=2)
    assert max(most) - before <= 5  # a piece of its own for each buffer, and the file at hand
    assert count() == before
