"""A directory is known by the content that it was made from: nothing else is mixed in, and nothing else is deleted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runner.errors import BloomdeskError
from runner.format.coded import LOSSLESS, PLAIN
from runner.format.layout import MANIFEST, MANIFEST_BACKUP
from runner.format.manifest import load_manifest, read_manifest
from runner.system.lock import sole_writer
from tests.support.commands import refused, run
from tests.support.lossless import content, flip, interrupt_at, make
from tests.toolkit.source.test_shards import LAYOUTS
from toolkit.commands.build import carry_out
from toolkit.commands.convert import convert, plan_conversion
from toolkit.commands.export import export
from toolkit.commands.repair import repair
from toolkit.commands.verify import verify
from toolkit.parts.destination import write_manifest

BLOCK = "block_01.safetensors"
SHARD = "pytorch_model_00003-of-00005.bin"


def keep_date(path: Path, change: Callable[[Path], object]) -> None:
    """Change a file as a failing disk does: its size and date stay."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def half_made(source: Path, out: Path, form: str = PLAIN) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, interrupt_at(BLOCK), form=form)


def without_a_part(source: Path, out: Path, form: str = PLAIN) -> None:
    convert(source, out, form=form)
    (out / BLOCK).unlink()


@pytest.mark.parametrize("form", [PLAIN, LOSSLESS])
@pytest.mark.parametrize("state", [convert, half_made, without_a_part])
@pytest.mark.parametrize("layout", ["bloom", "single bin", "safetensors shards"])
def test_another_checkpoint_is_not_mixed_in_and_not_deleted(
    tmp_path: Path, state: Callable[..., object], form: str, layout: str
) -> None:
    """Of the same shape and file names, as after further training."""
    ours, other = make(tmp_path / "ours", LAYOUTS[layout]), make(tmp_path / "b", LAYOUTS[layout], seed=7)
    state(ours, tmp_path / "out", form=form)
    before, others = content(tmp_path / "out"), content(other)
    lossless = ["--form", "lossless"] if form == LOSSLESS else []
    said = refused("convert", other, tmp_path / "out", "--delete-source", *lossless)
    assert "made from another state of the source" in said
    assert content(tmp_path / "out") == before and content(other) == others
    convert(ours, tmp_path / "out", form=form)
    assert verify(tmp_path / "out").sound


@pytest.mark.parametrize("state", [convert, half_made])
def test_one_changed_bit_of_a_kept_part_is_another_state(
    tmp_path: Path, state: Callable[[Path, Path], object]
) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    state(source, out)
    keep_date(source / "pytorch_model_00002-of-00005.bin", lambda path: flip(path, path.stat().st_size // 2))
    for options in ([], ["--delete-source"]):
        assert "made from another state" in refused("convert", source, out, *options)
    assert (source / SHARD).exists()


def test_the_same_tensors_in_other_files_resume_and_are_not_deleted(tmp_path: Path) -> None:
    half_made(make(tmp_path / "bin"), tmp_path / "out")
    other = make(tmp_path / "safetensors", LAYOUTS["safetensors shards"])
    first = set(other.glob("model-0000[12]*"))
    done = run("convert", other, tmp_path / "out", "--delete-source")
    assert done.returncode == 0 and "stays: not all of its parts were made from these bytes" in done.stderr
    assert verify(tmp_path / "out").sound and first <= set(other.glob("*.safetensors"))
    convert(tmp_path / "bin", tmp_path / "fresh")
    for file in load_manifest(tmp_path / "fresh").parts:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "fresh" / file).read_bytes()


def test_a_shard_that_changes_while_parts_are_made_makes_none(tmp_path: Path) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    plan = plan_conversion(source, out, delete_source=True)
    with (source / SHARD).open("ab") as file:
        file.write(b"x")
    with pytest.raises(BloomdeskError, match=f"{SHARD} changed while it was read"):
        carry_out(plan)
    assert not (out / BLOCK).exists() and (source / SHARD).exists()


@pytest.mark.parametrize("name", [BLOCK, "tokenizer.json"])
def test_a_file_in_the_way_that_nobody_recorded_stays(tmp_path: Path, name: str) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    half_made(source, out)
    manifest = load_manifest(out)
    (out / MANIFEST).write_text(type(manifest)(manifest.model, manifest.source, manifest.parts).to_json())
    (out / name).write_bytes(b'"mine"')
    assert "is in the way" in refused("convert", source, out)
    assert (out / name).read_bytes() == b'"mine"'


def exported(source: Path, directory: Path) -> Path:
    convert(source, directory / "prepared")
    export(directory / "prepared", directory / "export")
    return directory / "export"


@pytest.mark.parametrize("form", [PLAIN, LOSSLESS])
@pytest.mark.parametrize("kind", ["another", "flipped", "flipped export", "export"])
def test_repair_takes_only_the_recorded_tensors(tmp_path: Path, form: str, kind: str) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    convert(source, out, form=form)
    sound = content(out)
    flip(out / BLOCK, 9000)
    given = make(tmp_path / "other", seed=7) if kind == "another" else source
    if kind.endswith("export"):
        given = exported(source, tmp_path)
    if kind.startswith("flipped"):
        shard = given / (SHARD if kind == "flipped" else "model-00003-of-00005.safetensors")
        keep_date(shard, lambda path: flip(path, path.stat().st_size - 9000))
    damaged = content(out)
    if kind == "export":
        assert repair(out, given).parts == (BLOCK,)
        assert content(out) == sound
    else:
        assert f"is not what {BLOCK} was made from" in refused("repair", out, "--source", given)
        assert content(out) == damaged


@pytest.mark.parametrize("harm", [lambda path: flip(path, 9000), lambda path: path.unlink()])
@pytest.mark.parametrize("given", [["--source", "typo"], []])
def test_a_repair_that_cannot_be_made_leaves_everything(
    tmp_path: Path, harm: Callable[[Path], object], given: list[str]
) -> None:
    convert(make(tmp_path / "source"), tmp_path / "out")
    harm(tmp_path / "out" / BLOCK)
    before = content(tmp_path / "out")
    assert "next: " in refused("repair", tmp_path / "out", *given) or given
    assert content(tmp_path / "out") == before


def test_repair_locks_before_it_checks(made_copy: Path) -> None:
    (made_copy / BLOCK).unlink()
    looked: list[object] = []
    with sole_writer(made_copy), pytest.raises(BloomdeskError, match="another bloomdesk"):
        repair(made_copy, found=looked.append)
    assert not looked


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: flip(path, 100)])
def test_every_command_says_repair_if_only_the_manifest_is_damaged(
    tmp_path: Path, harm: Callable[[Path], object], half: bool
) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    (half_made if half else convert)(source, out)
    right = content(out)
    harm(out / MANIFEST)
    other = tmp_path / "other"
    commands = [("convert", source, out), ("export", out, other), ("info", out), ("generate", out, "x")]
    for command in commands:
        assert f"next: bloomdesk repair {out}" in refused(*command)
    assert f"bloomdesk repair {out}" in run("verify", out).stdout
    done = run("repair", out)
    assert done.returncode == 0, done
    assert content(out) == right
    assert read_manifest(out / MANIFEST_BACKUP) == load_manifest(out)
    convert(source, out)
    assert verify(out).sound


def test_the_fingerprint_is_that_of_the_weights(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    prints = set()
    for number, form in enumerate((PLAIN, LOSSLESS)):
        convert(source, tmp_path / str(number), form=form)
        prints.add(load_manifest(tmp_path / str(number)).fingerprint)
    convert(exported(source, tmp_path), tmp_path / "again")
    prints.add(load_manifest(tmp_path / "again").fingerprint)
    convert(make(tmp_path / "other", seed=7), tmp_path / "b")
    assert len(prints) == 1 and load_manifest(tmp_path / "b").fingerprint not in prints
    half_made(source, tmp_path / "half")
    assert load_manifest(tmp_path / "half").fingerprint is None
    sizes = {
        shard.file: shard.size
        for part in load_manifest(tmp_path / "0").parts.values()
        for shard in part.sources
    }
    assert sizes == {path.name: path.stat().st_size for path in source.glob("*.bin")}


def test_a_manifest_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """It has no fingerprint, no sizes of shards, and no backup before the end."""
    import json

    from runner.format.digest import digest

    source, out = make(tmp_path / "source"), tmp_path / "out"
    half_made(source, out)
    body = json.loads((out / MANIFEST).read_text())
    for key in ("fingerprint", "source_shards", "sha256"):
        del body[key]
    (out / MANIFEST).write_text(json.dumps({**body, "sha256": digest(body)}, indent=1) + "\n")
    (out / MANIFEST_BACKUP).unlink()
    shutil.copytree(out, tmp_path / "old")
    assert convert(source, out).kept
    assert verify(out).sound
    with pytest.raises(BloomdeskError, match="another state"):
        convert(make(tmp_path / "other", seed=7), tmp_path / "old")


@pytest.mark.parametrize(("layout", "said"), [("bloom", "is missing"), ("single bin", "has no weights")])
def test_a_source_without_weights_mends_nothing(tmp_path: Path, layout: str, said: str) -> None:
    source, out = make(tmp_path / "source", LAYOUTS[layout]), tmp_path / "out"
    convert(source, out)
    flip(out / BLOCK, 9000)
    for shard in source.glob("*.bin"):
        shard.unlink()
    assert said in refused("repair", out, "--source", source)


@pytest.mark.parametrize("name", [MANIFEST, MANIFEST_BACKUP])
@pytest.mark.parametrize("mine", [convert, half_made])
@pytest.mark.parametrize("other", [convert, half_made])
def test_two_manifests_of_different_checkpoints_are_not_chosen_between(
    tmp_path: Path, mine: Callable[..., object], other: Callable[..., object], name: str
) -> None:
    """As after one was copied over: its parts would be taken for damaged, or mixed with the other's."""
    for directory, seed, state in (("a", 0, mine), ("b", 7, other)):
        state(make(tmp_path / f"source {directory}", seed=seed), tmp_path / directory)
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    before = content(tmp_path / "a")
    for source in "ab":
        given = tmp_path / f"source {source}"
        assert "of different checkpoints" in refused("repair", tmp_path / "a", "--source", given)
        refused("convert", given, tmp_path / "a")
    report = verify(tmp_path / "a")
    assert not report.sound and not report.is_unfinished
    assert content(tmp_path / "a") == before


def spoil_index(source: Path) -> None:
    index = source / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("00002-of", "00009-of"))


NOT_WHOLE: dict[str, Callable[[Path], object]] = {
    "an index that is none": lambda source: (source / "pytorch_model.bin.index.json").write_text("{"),
    "an index that names others": spoil_index,
    "an unfinished download": lambda source: (source / f"{SHARD}.aria2").touch(),
    "a pointer": lambda source: (source / SHARD).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5\n"
    ),
    "a shard cut off": lambda source: os.truncate(source / SHARD, 100),
}


def test_the_rest_of_another_checkpoint_is_not_mixed_in(tmp_path: Path) -> None:
    """The shard of the finished part is gone, so nothing can be compared with that."""
    ours, out = make(tmp_path / "ours"), tmp_path / "out"
    half_made(ours, out)
    shutil.copytree(out, tmp_path / "deleting")
    before = content(out)
    other = make(tmp_path / "b", seed=7)
    for source in (ours, other):
        (source / "pytorch_model_00001-of-00005.bin").unlink()
    for directory in (out, tmp_path / "deleting"):
        assert "another state of the source" in refused("convert", other, directory, "--delete-source")
        assert content(directory) == before
    assert (other / SHARD).exists()
    assert run("convert", ours, out).returncode == 0 and verify(out).sound
    assert b"source_samples" not in (out / MANIFEST).read_bytes()


def test_a_directory_that_gets_the_name_meanwhile_stays_as_it_is(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    half_made(make(tmp_path / "b", seed=7), other)
    before = content(other)

    def swap(name: str, done: int, total: int) -> None:
        if name == BLOCK and out.exists() and other.exists():
            out.rename(tmp_path / "moved")
            other.rename(out)

    with pytest.raises(
        BloomdeskError, match=r"was moved, and another directory has its name|cannot be written"
    ):
        convert(make(tmp_path / "ours"), out, swap)
    assert content(out) == before


def test_a_shard_that_takes_the_place_of_another_goes_into_no_part_and_stays(tmp_path: Path) -> None:
    """With the same size and date."""
    ours, other = make(tmp_path / "ours"), make(tmp_path / "b", seed=7)
    date = (ours / SHARD).stat().st_mtime_ns
    os.utime(other / SHARD, ns=(date, date))
    others = (other / SHARD).read_bytes()

    def swap(name: str, done: int, total: int) -> None:
        if name == BLOCK and (other / SHARD).exists():
            (other / SHARD).replace(ours / SHARD)

    with pytest.raises(BloomdeskError, match="changed while it was read"):
        carry_out(plan_conversion(ours, tmp_path / "out", delete_source=True), swap)
    assert (ours / SHARD).read_bytes() == others and BLOCK not in load_manifest(tmp_path / "out").parts


def test_a_manifest_without_samples_goes_on_and_says_so(tmp_path: Path) -> None:
    ours, out = make(tmp_path / "ours"), tmp_path / "out"
    half_made(ours, out)
    write_manifest(out, replace(load_manifest(out), samples={}))
    (ours / "pytorch_model_00001-of-00005.bin").unlink()
    done = run("convert", ours, out)
    assert done.returncode == 0 and "they were not compared" in done.stderr and verify(out).sound


@pytest.mark.parametrize("spoil", NOT_WHOLE.values(), ids=NOT_WHOLE)
def test_a_source_that_cannot_be_read_is_not_called_complete(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    """Though all parts are there: they may be another checkpoint's."""
    convert(make(tmp_path / "ours"), tmp_path / "out")
    spoil(make(tmp_path / "b", seed=7))
    refused("convert", tmp_path / "b", tmp_path / "out")


def test_without_shards_nothing_is_said_to_be_compared(tmp_path: Path) -> None:
    convert(make(tmp_path / "ours", LAYOUTS["single bin"]), tmp_path / "out")
    (tmp_path / "ours" / "pytorch_model.bin").unlink()
    done = run("convert", tmp_path / "ours", tmp_path / "out")
    assert done.returncode == 0 and "has no shards any more, so nothing was compared" in done.stderr


@pytest.mark.parametrize("name", ["model-00003-of-00005.safetensors", "tokenizer.json", "config.json"])
def test_an_export_vouches_for_what_is_made_from_it(tmp_path: Path, name: str) -> None:
    given = exported(make(tmp_path / "source"), tmp_path)
    path = given / name
    path.write_bytes(path.read_bytes() + b" ") if name.endswith("json") else flip(path, -9)
    said = refused("convert", given, tmp_path / "new")
    assert str(path) in said and "is not what bloomdesk-export.json records" in said
    assert not (tmp_path / "new" / BLOCK).exists()


def test_bits_that_rounding_loses_are_not_deleted_with_the_source(tmp_path: Path) -> None:
    source = make(tmp_path / "source", dtype="float32")
    before = content(source)
    said = refused("convert", source, tmp_path / "out", "--delete-source", "--dtype", "f16")
    assert "with the source the bits would be lost" in said
    assert content(source) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "others", [{"optimizer": {"step": 3}}, {"ema": "itself"}, {"rng": torch.ones(5, dtype=torch.uint8)}]
)
def test_a_training_state_is_not_deleted_with_its_weights(tmp_path: Path, others: dict[str, object]) -> None:
    source, out = make(tmp_path / "source", LAYOUTS["single bin"]), tmp_path / "out"
    path = source / "pytorch_model.bin"
    state = torch.load(path)
    torch.save(
        {"model": state, **{name: state if each == "itself" else each for name, each in others.items()}}, path
    )
    before = content(source)
    said = refused("convert", source, out, "--delete-source")
    assert f"also holds {next(iter(others))} beside the weights, which would be lost" in said
    assert content(source) == before and not out.exists()
    assert run("convert", source, out).returncode == 0 and verify(out).sound


@pytest.mark.parametrize("data", [b"mine", b""])
def test_what_is_in_the_place_of_a_recorded_part_makes_way_and_is_kept(tmp_path: Path, data: bytes) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    right = content(out)
    (out / BLOCK).write_bytes(data)
    done = run("convert", source, out)
    assert done.returncode == 0 and f"{BLOCK}.changed holds what was there" in done.stderr
    assert content(out) == {**right, f"{BLOCK}.changed": data}


def test_a_link_that_leads_nowhere_is_not_replaced(tmp_path: Path) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    (out / BLOCK).unlink()
    (out / BLOCK).symlink_to(tmp_path / "disk" / BLOCK)
    assert f"is a link to {tmp_path / 'disk' / BLOCK}, which is not there" in refused("convert", source, out)
    assert (out / BLOCK).is_symlink()


def test_a_small_file_that_somebody_changed_is_not_written_over(tmp_path: Path) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    (out / "tokenizer_config.json").write_text('{"mine": 1}')
    (out / BLOCK).unlink()
    assert "tokenizer_config.json is damaged or has changed" in refused("convert", source, out)
    assert (out / "tokenizer_config.json").read_text() == '{"mine": 1}'
    assert run("repair", out, "--source", source).returncode == 0 and verify(out).sound
