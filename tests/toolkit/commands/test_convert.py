"""Conversion: every kind of source to the same bytes; refusals before anything is written; kills leave no trace."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from runner.errors import BloomdeskError
from runner.format.coded import LOSSLESS, PLAIN
from runner.format.layout import DATA_ALIGNMENT, part_specs
from runner.format.manifest import load_manifest
from runner.format.safetensors import read_header
from runner.system import atomic as durable
from scripts.fakehub.checkpoint import Layout, from_state, old_config, write_repo
from tests.support.commands import refused
from tests.support.lossless import content, flip, interrupt_at, make
from tests.toolkit.source.test_shards import LAYOUTS, data, reference
from toolkit.commands.build import carry_out
from toolkit.commands.convert import convert, plan_conversion
from toolkit.commands.verify import verify
from toolkit.hub.record import RECORD, DownloadRecord, save_record
from toolkit.hub.revision import HubFile, Revision
from toolkit.source.key_map import assign

COMMIT = "0123456789" * 4


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def record_download(source: Path, repo: str = "me/bloom", **wrong: str) -> None:
    """A download record as `bloomdesk download` leaves it; `wrong` gives other hashes by file name."""
    files = []
    for path in sorted(source.iterdir()):
        if path.name != RECORD:
            sha256 = wrong.get(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
            files.append(HubFile(path.name, path.stat().st_size, sha256))
    record = DownloadRecord.of(Revision(repo, COMMIT, tuple(files)), None)
    for file in files:
        record = record.with_file(file.path, file.sha256 or "", (source / file.path).stat().st_mtime_ns)
    save_record(source, record)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_kind_of_source_gives_the_same_tensors(tmp_path: Path, layout: Layout) -> None:
    source, out = make(tmp_path / "source", layout), tmp_path / "out"
    summary = convert(source, out)
    manifest = load_manifest(out)
    assert manifest.missing == ()
    expected = reference(source)
    parts = assign(expected, manifest.model).parts
    assert summary.written == tuple(parts)
    for file, keys in parts.items():
        with safe_open(out / file, framework="pt") as part:
            assert set(part.keys()) == set(keys)
            for name, key in keys.items():
                assert data(part.get_tensor(name)) == data(expected[key]), key
    assert verify(out).sound


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_dtypes_are_kept(tmp_path: Path, dtype: str, name: str) -> None:
    out = tmp_path / "out"
    convert(make(tmp_path / "source", dtype=dtype), out)
    assert load_manifest(out).model.dtype == name
    assert load_file(out / "embedding.safetensors")["word_embeddings.weight"].dtype == getattr(torch, dtype)


def test_all_sources_of_one_model_give_the_same_parts(tmp_path: Path) -> None:
    whole = []
    for layout in ("bloom", "cut blocks in safetensors", "lm_head"):
        convert(make(tmp_path / f"source {layout}", LAYOUTS[layout]), tmp_path / layout)
        found = content(tmp_path / layout)
        whole.append({name: found[name] for name in found if name.endswith(".safetensors")})
    assert whole[0] == whole[1] == whole[2]


def test_parts_are_laid_out_for_one_sequential_read(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(make(tmp_path / "source"), out)
    manifest = load_manifest(out)
    for spec in part_specs(manifest.model):
        header = read_header(out / spec.file)
        assert header.data_start % DATA_ALIGNMENT == 0
        assert list(header.tensors) == list(spec.tensors)
        assert [tensor.name for tensor in manifest.parts[spec.file].tensors] == list(spec.tensors)


def test_two_conversions_are_byte_identical(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    for name in ("a", "b"):
        convert(source, tmp_path / name)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_transformers_loads_a_part(tmp_path: Path) -> None:
    from transformers import BloomConfig
    from transformers.models.bloom.modeling_bloom import BloomBlock

    source, out = make(tmp_path / "source", dtype="float32"), tmp_path / "out"
    convert(source, out)
    block = BloomBlock(BloomConfig.from_dict(old_config(64, 8, 3, 300)), layer_idx=1)
    block.load_state_dict(load_file(out / "block_01.safetensors"), strict=True)
    assert torch.equal(block.mlp.dense_h_to_4h.weight, reference(source)["h.1.mlp.dense_h_to_4h.weight"])


def test_manifest_names_the_source(tmp_path: Path) -> None:
    source, out = make(tmp_path / "source", LAYOUTS["cut blocks"]), tmp_path / "out"
    record_download(source)
    convert(source, out)
    manifest = load_manifest(out)
    assert (manifest.source.repo, manifest.source.commit) == ("me/bloom", COMMIT)
    index = json.loads((source / "pytorch_model.bin.index.json").read_text())["weight_map"]
    shards = manifest.parts["block_01.safetensors"].sources
    assert {shard.file for shard in shards} == {index[key] for key in index if key.startswith("h.1.")}
    for shard in shards:
        assert shard.sha256 == hashlib.sha256((source / shard.file).read_bytes()).hexdigest()


def test_companions_are_carried_over(source: Path, out: Path) -> None:
    (source / "special_tokens_map.json").unlink()
    convert(source, out)
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert set(load_manifest(out).companions) == {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_progress_counts_every_byte(source: Path, out: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}

    def progress(file: str, done: int, total: int) -> None:
        assert done > seen.get(file, (0, 0))[0]
        seen[file] = done, total

    plan = plan_conversion(source, out)
    assert not out.exists()
    summary = convert(source, out, progress)
    assert all(done == total == (out / file).stat().st_size for file, (done, total) in seen.items())
    assert sum(total for _, total in seen.values()) == summary.bytes_written == plan.bytes_to_write


def change_config(source: Path, **changes: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))


def single(source: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Replace the weights by one safetensors file with something changed in it."""
    state = reference(source)
    change(state)
    for path in source.glob("pytorch_model*"):
        path.unlink()
    save_file(state, source / "model.safetensors")


def whole(state: dict[str, torch.Tensor], key: str) -> None:
    state[key] = state[key].int()


def widen(state: dict[str, torch.Tensor], key: str) -> None:
    state[key] = torch.cat([state[key]] * 2)


REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unknown key": (lambda s: single(s, lambda t: t.update(extra=torch.ones(1).bfloat16())), "extra"),
    "missing tensor": (lambda s: single(s, lambda t: t.pop("h.2.input_layernorm.bias")), "1 tensor missing: h.2"),
    "missing block": (lambda s: change_config(s, n_layer=4), "12 tensors missing"),
    "block too many": (lambda s: change_config(s, n_layer=2), "12 tensors that no BLOOM"),
    "wrong shape": (lambda s: single(s, lambda t: widen(t, "h.1.self_attention.dense.bias")), r"\[128\]"),
    "other size": (lambda s: change_config(s, n_embed=128), "has shape"),
    "integers": (lambda s: single(s, lambda t: whole(t, "ln_f.bias")), "ln_f.bias is I32, expected one of"),
    "another architecture": (lambda s: change_config(s, model_type="gpt2"), "not a BLOOM"),
    "key twice": (lambda s: single(s, lambda t: t.update({"transformer.ln_f.bias": t["ln_f.bias"].clone()})), "twice"),
    "no config": (lambda s: (s / "config.json").unlink(), "config.json is missing"),
    "no tokenizer": (lambda s: (s / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no shard": (lambda s: (s / "pytorch_model_00003-of-00005.bin").unlink(), "1 of 5 shards"),
    "empty shard": (lambda s: (s / "pytorch_model_00003-of-00005.bin").write_bytes(b""), "empty"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), REFUSALS.values(), ids=REFUSALS)
def test_refused_before_anything_is_written(
    source: Path, out: Path, damage: Callable[[Path], Any], words: str
) -> None:
    damage(source)
    with pytest.raises(BloomdeskError, match=words):
        convert(source, out)
    assert not out.exists()


def test_a_head_that_differs_in_one_bit(tmp_path: Path) -> None:
    source, out = make(tmp_path / "source", LAYOUTS["lm_head"]), tmp_path / "out"
    state = {key.removeprefix("transformer."): value for key, value in reference(source).items()}
    state["lm_head.weight"].view(torch.uint8)[-1, -1] ^= 1
    write_repo(source, from_state(state), old_config(64, 8, 3, 300), {})
    assert convert(source, out).written[-1] == "head.safetensors"


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(BloomdeskError, match=r"needs [\d,]+ bytes and the disk has 1,000,000 free"):
        convert(make(tmp_path / "source"), tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_destinations_that_are_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    before = content(source)
    with pytest.raises(BloomdeskError, match="is the source"):
        convert(source, tmp_path / "x" / ".." / "source")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear reader")
    with pytest.raises(BloomdeskError, match=r"is not empty: it holds letter\.txt"):
        convert(source, tmp_path / "letters")
    with pytest.raises(BloomdeskError, match="is not a directory"):
        convert(source, tmp_path / "letters" / "letter.txt")
    with pytest.raises(BloomdeskError, match="is not a directory"):
        convert(tmp_path / "absent", tmp_path / "out")
    assert content(source) == before
    assert content(tmp_path / "letters") == {"letter.txt": b"dear reader"}


def test_a_destination_of_another_source_is_refused(tmp_path: Path, source: Path, out: Path) -> None:
    record_download(source)
    convert(source, out)
    before = content(out)
    for other in (
        make(tmp_path / "unrecorded"),
        make(tmp_path / "seed", seed=7),
        make(tmp_path / "shape", vocab_size=301),
        make(tmp_path / "other repo"),
    ):
        if other.name != "unrecorded":
            record_download(other, "you/bloom" if other.name == "other repo" else "me/bloom")
        with pytest.raises(BloomdeskError, match=r"started from another source|made from another state"):
            convert(other, out)
    manifest = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(manifest.replace("me/bloom", "you/bloom"))
    with pytest.raises(BloomdeskError, match="edited"):
        convert(source, out)
    (out / "manifest.json").write_text(manifest)
    assert content(out) == before


def test_a_shard_that_is_not_the_recorded_one_makes_no_part(source: Path, out: Path) -> None:
    shard = "pytorch_model_00003-of-00005.bin"
    record_download(source, **{shard: "0" * 64})
    with pytest.raises(BloomdeskError, match=f"{shard} is damaged or has changed"):
        convert(source, out)
    assert not (out / "block_01.safetensors").exists()
    assert list(load_manifest(out).parts) == ["embedding.safetensors", "block_00.safetensors"]
    assert not list(out.glob("*.incomplete"))
    record_download(source)
    assert convert(source, out).kept == ("embedding.safetensors", "block_00.safetensors")
    assert verify(out).sound


def test_an_incomplete_download_is_refused(source: Path, out: Path) -> None:
    record_download(source)
    with (source / "pytorch_model_00005-of-00005.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BloomdeskError):
        convert(source, out)
    assert not out.exists()


def test_an_unrecorded_source_that_changed_is_refused(tmp_path: Path) -> None:
    layout = LAYOUTS["single bin"]
    source, out = make(tmp_path / "source", layout), tmp_path / "out"
    convert(source, out)
    (out / "block_01.safetensors").unlink()
    make(source, layout, seed=9)
    with pytest.raises(BloomdeskError, match="made from another state of the source"):
        convert(source, out)
    assert not (out / "block_01.safetensors").exists()


def test_a_rerun_keeps_what_is_sound_and_makes_the_rest(source: Path, out: Path) -> None:
    convert(source, out)
    before = content(out)
    assert convert(source, out).written == ()
    assert content(out) == before
    (out / "block_00.safetensors").unlink()
    with (out / "block_01.safetensors").open("ab") as file:
        file.write(b"x")
    (out / "block_02.safetensors").write_bytes(bytes(len(before["block_02.safetensors"])))
    (out / "embedding.safetensors.incomplete").write_bytes(b"half")
    (out / "block_00.safetensors.incomplete").write_bytes(b"half")
    (out / "tokenizer.json").unlink()
    summary = convert(source, out)
    assert summary.written == tuple(f"block_0{number}.safetensors" for number in range(3))
    assert summary.kept == ("embedding.safetensors", "final_layernorm.safetensors")
    (out / "embedding.safetensors.incomplete").unlink()
    # What had their names may be somebody's work.
    spoilt = {1: before["block_01.safetensors"] + b"x", 2: bytes(len(before["block_02.safetensors"]))}
    for number, found in spoilt.items():
        aside = out / f"block_0{number}.safetensors.changed"
        assert aside.read_bytes() == found
        aside.unlink()
    assert content(out) == before


@pytest.mark.parametrize(
    ("form", "failing"),
    [*((PLAIN, number) for number in range(12)), *((LOSSLESS, number) for number in (1, 3, 6, 9))],
)
def test_an_error_at_any_write_leaves_nothing_that_counts(
    tmp_path: Path, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, form: str, failing: int
) -> None:
    convert(source, tmp_path / "undisturbed", form=form)
    writes = []
    real = os.fsync

    def full(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) > 3 * failing:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BloomdeskError, match="the disk is full") as caught:
        convert(source, out, form=form)
    assert "run the same command again" in caught.value.hint
    monkeypatch.undo()
    if (out / "manifest.json").exists():
        recorded = load_manifest(out).parts
        assert not [damage for damage in verify(out).damage if damage.file in recorded]
    convert(source, out, form=form)
    assert content(out) == content(tmp_path / "undisturbed")


KILLED = """
import os, signal, sys
from pathlib import Path
from toolkit.commands.convert import convert
def progress(file, done, total):
    if file == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
convert(Path(sys.argv[1]), Path(sys.argv[2]), progress)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_kill_in_the_middle_leaves_nothing_that_counts(tmp_path: Path, source: Path, out: Path) -> None:
    command = [sys.executable, "-c", KILLED, source, out, "block_01.safetensors"]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[3])
    assert done.returncode == -signal.SIGKILL
    assert (out / "block_01.safetensors.incomplete").exists()
    assert not (out / "block_01.safetensors").exists()
    manifest = load_manifest(out)
    assert list(manifest.parts) == ["embedding.safetensors", "block_00.safetensors"]
    assert "block_01.safetensors" in {damage.file for damage in verify(out, quick=True).damage}
    convert(source, out)
    convert(source, tmp_path / "undisturbed")
    assert content(out) == content(tmp_path / "undisturbed")


def test_a_source_that_ends_while_it_is_read_makes_no_part(source: Path, out: Path) -> None:
    plan = plan_conversion(source, out)
    part = plan.shards.parts["block_00.safetensors"]
    moved = tuple(replace(tensor, offset=tensor.offset + 10**9) for tensor in part.tensors)
    parts = {**plan.shards.parts, part.spec.file: replace(part, tensors=moved)}
    with pytest.raises(BloomdeskError, match="too early"):
        carry_out(replace(plan, shards=replace(plan.shards, parts=parts)))
    assert not (out / "block_00.safetensors").exists()


def test_delete_source_leaves_the_same_directory_and_no_shards(tmp_path: Path) -> None:
    """Also if blocks are cut across shards: a shard waits for its last part."""
    source = make(tmp_path / "source", LAYOUTS["cut blocks"])
    expected = make(tmp_path / "again", LAYOUTS["cut blocks"])
    convert(expected, tmp_path / "expected")
    shards = set(source.glob("*.bin"))
    size = sum(shard.stat().st_size for shard in shards)
    plan = plan_conversion(source, tmp_path / "out", delete_source=True)
    assert set(plan.shards.deletable) == shards
    assert plan.peak_bytes < plan.bytes_to_write
    done = carry_out(plan)
    assert done.bytes_deleted == size
    assert not any(shard.exists() for shard in shards)
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def test_delete_source_resumes_after_a_kill(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    convert(make(tmp_path / "again"), tmp_path / "expected")
    plan = plan_conversion(source, tmp_path / "out", delete_source=True)
    with pytest.raises(KeyboardInterrupt):
        carry_out(plan, interrupt_at("block_01.safetensors"))
    left = len(list(source.glob("*.bin")))
    assert 0 < left < len(plan.shards.deletable)
    carry_out(plan_conversion(source, tmp_path / "out", delete_source=True))
    assert not list(source.glob("*.bin"))
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    again = plan_conversion(source, tmp_path / "out", delete_source=True)
    assert not again.schedule.needs
    assert carry_out(again).written == ()


def test_a_deleted_shard_of_a_missing_part_is_named(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    carry_out(plan_conversion(source, tmp_path / "out", delete_source=True))
    (tmp_path / "out" / "block_01.safetensors").unlink()
    with pytest.raises(BloomdeskError, match="missing"):
        plan_conversion(source, tmp_path / "out")


def test_a_part_that_does_not_read_back_keeps_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "source")
    replace_file = durable.replace_file

    def lossy(temporary: Path, path: Path) -> None:
        if path.name == "block_01.safetensors":
            flip(temporary, -1)
        replace_file(temporary, path)

    monkeypatch.setattr(durable, "replace_file", lossy)
    with pytest.raises(BloomdeskError, match=r"block_01\.safetensors does not read back as it was written"):
        carry_out(plan_conversion(source, tmp_path / "out", delete_source=True))
    assert (source / "pytorch_model_00003-of-00005.bin").exists()


def test_links_are_not_deleted(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    cache = tmp_path / "cache"
    cache.mkdir()
    for file in source.iterdir():
        (cache / file.name).symlink_to(file)
    with pytest.raises(BloomdeskError, match="is a link"):
        plan_conversion(cache, tmp_path / "out", delete_source=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: {**body, "normalizer": {"type": "NFC"}},
        lambda body: {
            **body,
            "decoder": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"},
        },
        lambda body: {**body, "decoder": None},
        lambda body: {},
    ],
    ids=["normalizer", "another decoder", "no decoder", "nothing"],
)
def test_a_tokenizer_that_the_runner_would_refuse_is_refused_at_once(tmp_path: Path, change) -> None:
    path = make(tmp_path / "source") / "tokenizer.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    said = refused("convert", path.parent, tmp_path / "out")
    assert f"{path} is not a tokenizer" in said and "verify" not in said
    path.write_bytes(b"\xef\xbb\xbf" + (make(tmp_path / "again") / "tokenizer.json").read_bytes())
    assert f"{path} is not a tokenizer" in refused("convert", path.parent, tmp_path / "out")
    assert not (tmp_path / "out").exists()
