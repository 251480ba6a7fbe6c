"""Verification: one test for each kind of damage, with the damaged file and tensor named."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest

from runner.errors import BloomdeskError
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import part_specs
from runner.format.manifest import load_manifest
from runner.format.part_record import PartRecord, TensorRecord
from runner.format.safetensors import read_header
from scripts.fakehub.checkpoint import synthetic
from tests.support.lossless import flip
from toolkit.commands.convert import convert
from toolkit.commands.verify import Damage, plan_verify, verify
from toolkit.io import reader as readahead
from toolkit.parts.regions import Region, choose, regions_of

BLOCK = "block_01.safetensors"
SOME_FILES = (BLOCK, "embedding.safetensors", "tokenizer.json", "special_tokens_map.json")
linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's figures")


def named(damage: tuple[Damage, ...]) -> list[tuple[str, str | None]]:
    return [(item.file, item.tensor) for item in damage]


def test_a_sound_directory_has_no_damage(made_copy: Path) -> None:
    whole, quick = verify(made_copy), verify(made_copy, quick=True)
    assert whole.sound and quick.sound
    assert whole.files_checked == quick.files_checked == 9
    records = load_manifest(made_copy).records
    assert whole.bytes_read == sum(record.size for record in records)
    assert quick.bytes_read == 0


def test_progress_reaches_the_end_of_every_file(made_copy: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    verify(made_copy, progress=lambda file, done, total: seen.update({file: (done, total)}))
    assert seen == {record.file: (record.size, record.size) for record in load_manifest(made_copy).records}


def test_a_flipped_bit_names_the_tensor(made_copy: Path) -> None:
    for entry in read_header(made_copy / BLOCK).tensors.values():
        for position in (entry.start, entry.end - 1):
            flip(made_copy / BLOCK, position)
            report = verify(made_copy)
            assert named(report.damage) == [(BLOCK, entry.name)]
            assert verify(made_copy, quick=True).sound
            flip(made_copy / BLOCK, position)
    assert verify(made_copy).sound


def test_two_damaged_tensors_are_both_named(made_copy: Path) -> None:
    entries = read_header(made_copy / BLOCK).tensors
    for name in ("mlp.dense_h_to_4h.bias", "input_layernorm.weight"):
        flip(made_copy / BLOCK, entries[name].start)
    flip(made_copy / "embedding.safetensors", 10**4)
    assert named(verify(made_copy).damage) == [
        ("embedding.safetensors", "word_embeddings.weight"),
        (BLOCK, "input_layernorm.weight"),
        (BLOCK, "mlp.dense_h_to_4h.bias"),
    ]


@pytest.mark.parametrize("position", [0, 7, 8, 20, 30, 120, 4095])
@pytest.mark.parametrize("quick", [True, False])
def test_a_flipped_bit_in_the_header_is_damage_of_the_file(
    made_copy: Path, position: int, quick: bool
) -> None:
    """Length, JSON, padding."""
    flip(made_copy / BLOCK, position)
    assert named(verify(made_copy, quick=quick).damage) == [(BLOCK, None)]


@pytest.mark.parametrize("length", [0, 5, 4096, 20_000, -1])
def test_a_cut_file_is_damage(made_copy: Path, length: int) -> None:
    content = (made_copy / BLOCK).read_bytes()
    (made_copy / BLOCK).write_bytes(content[:length])
    quick, whole = verify(made_copy, quick=True), verify(made_copy)
    assert named(quick.damage) == [(BLOCK, None)]
    assert "expected" in quick.damage[0].what
    assert (BLOCK, "mlp.dense_4h_to_h.bias") in named(whole.damage)
    if length == -1:
        assert len(whole.damage) == 2


@pytest.mark.parametrize(
    ("file", "harm", "what"),
    [
        (BLOCK, lambda path: path.write_bytes(path.read_bytes() + b"\0"), ".*, expected .*"),
        (BLOCK, lambda path: (path.unlink(), path.mkdir()), ".*cannot be read.*"),
        *((file, Path.unlink, "it is missing") for file in SOME_FILES),
    ],
)
def test_a_file_that_is_longer_unreadable_or_missing_is_damage(
    made_copy: Path, file: str, harm: Callable[[Path], object], what: str
) -> None:
    harm(made_copy / file)
    for quick in (True, False):
        (damage,) = verify(made_copy, quick=quick).damage
        assert (damage.file, damage.tensor) == (file, None) and re.fullmatch(what, damage.what)


def test_swapped_files_are_damage(made_copy: Path) -> None:
    """Two blocks have equal headers, so only their bytes tell them apart."""
    first, second, spare = made_copy / "block_00.safetensors", made_copy / BLOCK, made_copy / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)
    assert {item.file for item in verify(made_copy).damage} == {first.name, second.name}
    shutil.copy(made_copy / "final_layernorm.safetensors", first)
    assert "block_00.safetensors" in {item.file for item in verify(made_copy, quick=True).damage}


def test_a_damaged_companion_is_named(made_copy: Path) -> None:
    flip(made_copy / "tokenizer.json", 9)
    assert named(verify(made_copy).damage) == [("tokenizer.json", None)]
    assert verify(made_copy, quick=True).sound
    (made_copy / "tokenizer.json").write_bytes(b"")
    assert named(verify(made_copy, quick=True).damage) == [("tokenizer.json", None)]


def test_parts_that_were_never_made_are_damage(made: Path, tmp_path: Path) -> None:
    manifest = load_manifest(made)
    kept = {file: record for file, record in manifest.parts.items() if file != BLOCK}
    out = Path(shutil.copytree(made, tmp_path / "out"))
    (out / "manifest.json").write_text(type(manifest)(manifest.model, manifest.source, kept, {}).to_json())
    (out / f"{BLOCK}.incomplete").write_bytes(b"half")
    report = verify(out, quick=True)
    assert named(report.damage) == [(BLOCK, None), ("config.json", None), ("tokenizer.json", None)]
    assert report.leftovers == (f"{BLOCK}.incomplete",)


def test_unknown_files_are_left_alone(made_copy: Path) -> None:
    (made_copy / "notes.txt").write_text("mine")
    assert verify(made_copy).sound


def test_without_a_sound_manifest_nothing_is_checked(made_copy: Path, tmp_path: Path) -> None:
    (made_copy / "manifest.backup.json").unlink()
    manifest = made_copy / "manifest.json"
    body = json.loads(manifest.read_text())
    body["parts"][0]["size"] += 1
    for text in (json.dumps(body), manifest.read_text()[:-20], "", "{}"):
        manifest.write_text(text)
        with pytest.raises(BloomdeskError, match="not a sound manifest"):
            verify(made_copy)
    manifest.unlink()
    with pytest.raises(BloomdeskError, match="not a prepared checkpoint"):
        verify(made_copy)
    with pytest.raises(BloomdeskError, match="is not a directory"):
        verify(tmp_path / "absent")


def test_the_report_does_not_depend_on_the_threads(made_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage in the order of the manifest, with several blocks of bytes in every file."""
    monkeypatch.setattr(readahead, "BLOCK", 5_000)
    entries = read_header(made_copy / BLOCK).tensors
    for name in ("mlp.dense_4h_to_h.weight", "input_layernorm.weight"):
        flip(made_copy / BLOCK, entries[name].start)
    for file in ("embedding.safetensors", "block_00.safetensors"):
        flip(made_copy / file, 4_500)
    flip(made_copy / "tokenizer.json", 9)
    (made_copy / "final_layernorm.safetensors").write_bytes(b"")
    reports = [verify(made_copy, threads=threads) for threads in (1, 2, 3, 16, 1, 16)]
    assert len(set(reports)) == 1
    assert [file for file, _ in named(reports[0].damage)] == [
        "embedding.safetensors",
        "block_00.safetensors",
        BLOCK,
        BLOCK,
        *["final_layernorm.safetensors"] * 3,
        "tokenizer.json",
    ]


def opened(descriptor: int) -> str:
    """The name of an open file."""
    return Path(f"/proc/self/fd/{descriptor}").readlink().name


@linux
def test_one_file_and_many_are_read_by_several_threads(
    made_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read waits for a second one, of the same large file or of the next small one."""
    monkeypatch.setattr(readahead, "BLOCK", 5_000)
    read, meeting = os.preadv, threading.Barrier(2, timeout=20)
    together: list[tuple[str, threading.Thread]] = []

    def meet(descriptor: int, buffers: list[memoryview], start: int) -> int:
        together.append((opened(descriptor), threading.current_thread()))
        of_block = [file for file, _ in together if file == BLOCK]
        if len(together) <= 6 or (opened(descriptor) == BLOCK and len(of_block) <= 2):
            meeting.wait()
        return read(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", meet)
    assert verify(made_copy, threads=2).sound
    assert len({thread for file, thread in together if file == BLOCK}) == 2


def test_progress_comes_from_the_calling_thread_and_only_rises(made_copy: Path) -> None:
    threads, last = set(), ("", 0)

    def hear(file: str, done: int, total: int) -> None:
        nonlocal last
        assert done <= total and (file != last[0] or done > last[1])
        threads.add(threading.get_ident())
        last = file, done

    verify(made_copy, progress=hear)
    assert threads == {threading.get_ident()}


@linux
def test_an_error_in_the_middle_of_a_file_is_no_damage_and_others_are_checked(
    made_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "BLOCK", 5_000)
    read = os.preadv

    def fail(descriptor: int, buffers: list[memoryview], start: int) -> int:
        if opened(descriptor) == BLOCK and start > 50_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", fail)
    flip(made_copy / "block_02.safetensors", 10_000)
    report = verify(made_copy)
    assert [item.file for item in report.unchecked] == [BLOCK]
    assert [item.file for item in report.damage] == ["block_02.safetensors"]
    assert report.unchecked[0].what == f"it cannot be read: {os.strerror(errno.EIO)}"
    sizes = {record.file: record.size for record in load_manifest(made_copy).records}
    assert sum(sizes.values()) - sizes[BLOCK] < report.bytes_read < sum(sizes.values())


def test_an_error_of_the_progress_ends_the_check(made_copy: Path) -> None:
    def stop(file: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        verify(made_copy, progress=stop)
    assert threading.active_count() == before


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no such system call here")
def test_read_bytes_leave_the_page_cache(made_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "BLOCK", 5_000)
    let_go: list[int] = []

    def advise(descriptor: int, start: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            assert length <= 5_000  # never what is still to be read
            let_go.append(length)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    report = verify(made_copy)
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


@pytest.mark.slow
@linux
def test_memory_is_bounded(tmp_path: Path) -> None:
    synthetic(tmp_path / "source", hidden_size=1024, heads=8, blocks=3, vocab_size=20_000)
    convert(tmp_path / "source", tmp_path / "out")
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


def test_every_run_chooses_another_sample() -> None:
    regions = bloom_176b()
    assert len({choose(regions, 0.05) for _ in range(5)}) == 5
    assert choose(regions, 0.05, seed=7) == choose(regions, 0.05, seed=7)


def test_a_sample_has_at_least_one_tensor(made_copy: Path) -> None:
    for seed in range(50):
        assert any(not region.is_header for region in plan_verify(made_copy, sample=1e-9, seed=seed).regions)


def test_the_report_says_how_much_was_compared(made_copy: Path) -> None:
    seen: dict[str, int] = {}
    plan = plan_verify(made_copy, sample=0.3, seed=1)
    progress = lambda file, done, total: seen.update({file: total})  # noqa: E731
    report = verify(made_copy, sample=0.3, seed=1, progress=progress)
    assert report.sound and report.sample == 0.3
    assert report.bytes_recorded == sum(record.size for record in load_manifest(made_copy).records)
    assert report.bytes_read == plan.bytes_to_read == sum(seen.values())
    assert report.share == report.bytes_read / report.bytes_recorded < 1
    assert verify(made_copy).share == 1 and verify(made_copy, quick=True).share == 0
    assert verify(made_copy, sample=1).share == 1


def test_a_sample_finds_the_damage_in_its_tensors(made_copy: Path) -> None:
    for region in plan_verify(made_copy).regions:
        if region.tensor is not None:
            flip(made_copy / region.file, region.start + region.nbytes // 2)
    flip(made_copy / "tokenizer.json", 9)
    for seed in range(20):
        chosen = plan_verify(made_copy, sample=0.2, seed=seed).regions
        damage = verify(made_copy, sample=0.2, seed=seed).damage
        read = {(region.file, region.tensor) for region in chosen}
        assert set(named(damage)) == {
            (file, tensor) for file, tensor in read if tensor is not None or file == "tokenizer.json"
        }


@pytest.mark.parametrize("position", [0, 8, 4095])
def test_a_sample_checks_every_header(made_copy: Path, position: int) -> None:
    for file in load_manifest(made_copy).parts:
        flip(made_copy / file, position)
        assert (file, None) in named(verify(made_copy, sample=1e-9).damage)
        flip(made_copy / file, position)


def test_a_sample_checks_every_size(made_copy: Path) -> None:
    for record in load_manifest(made_copy).records:
        with (made_copy / record.file).open("ab") as file:
            file.write(b"\0")
    damage = verify(made_copy, sample=1e-9).damage
    assert {item.file for item in damage} == {record.file for record in load_manifest(made_copy).records}


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan"), 0.5])
def test_an_impossible_share_or_a_quick_sample_is_refused(made_copy: Path, share: float) -> None:
    words = "takes no sample" if share == 0.5 else "above 0% and at most 100%"
    with pytest.raises(BloomdeskError, match=words):
        verify(made_copy, quick=share == 0.5, sample=share)


def test_systems_without_positioned_reads_are_checked_too(
    made_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "BLOCK", 5_000)
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert verify(made_copy, threads=4).sound
    flip(made_copy / BLOCK, 50_000)
    assert {item.file for item in verify(made_copy, threads=4).damage} == {BLOCK}


@linux
def test_few_files_are_open_at_a_time_and_none_afterwards(made_copy: Path) -> None:
    def count() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    before, most = count(), []
    verify(made_copy, progress=lambda file, done, total: most.append(count()), threads=2)
    assert max(most) - before <= 5  # one for each buffer, and the file that is read
    assert count() == before
