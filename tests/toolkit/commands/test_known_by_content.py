"""A directory is known by the content that it was made from: nothing else is mixed in, and nothing else is deleted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

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
    lossless = ["--lossless"] if form == LOSSLESS else []
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
    assert done.returncode == 0 and "stays: no part was made from these bytes" in done.stderr
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

    from runner.format.manifest import digest

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


def test_two_manifests_of_different_checkpoints_are_not_chosen_between(tmp_path: Path) -> None:
    """As after one was copied over: its parts would be taken for damaged."""
    for name, seed in (("a", 0), ("b", 7)):
        convert(make(tmp_path / f"source {name}", seed=seed), tmp_path / name)
    shutil.copy(tmp_path / "b" / MANIFEST, tmp_path / "a")
    before = content(tmp_path / "a")
    assert "of different checkpoints" in refused("repair", tmp_path / "a", "--source", tmp_path / "source b")
    assert content(tmp_path / "a") == before
