"""Export: what transformers loads, the way back, nothing damaged let through, and going on after an end."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from runner.errors import BloomdeskError
from runner.format.layout import COMPANIONS
from runner.format.manifest import load_manifest
from runner.format.safetensors import read_header
from runner.system.lock import sole_writer
from tests.conftest import PreparedFactory
from tests.support.lossless import content, flip, interrupt_at, make
from toolkit.commands import export as module
from toolkit.commands.convert import convert
from toolkit.commands.export import INDEX, export
from toolkit.io import reader as readahead
from toolkit.io import writer
from toolkit.parts.export_record import EXPORT_RECORD
from toolkit.source.key_map import name_table

SHARDS = [f"model-0000{number}-of-00005.safetensors" for number in range(1, 6)]
BLOCK = "block_01.safetensors"  # what SHARDS[2] is made from


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def prepared_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """By the keys of bigscience/bloom."""
    parts = {file: load_file(directory / file) for file in load_manifest(directory).parts}
    table = name_table(load_manifest(directory).model)
    return {key: parts[file][name] for key, (file, name) in table.items()}


def test_names_index_and_small_files(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = export(made, out)
    tensors = prepared_tensors(made)
    companions = load_manifest(made).companions
    assert sorted(path.name for path in out.iterdir()) == sorted([*SHARDS, INDEX, EXPORT_RECORD, *companions])
    assert summary.written == tuple(SHARDS) and summary.kept == ()
    assert summary.bytes_written == sum((out / shard).stat().st_size for shard in SHARDS)
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    for key, shard in (("word_embeddings.weight", 0), ("h.0.mlp.dense_4h_to_h.bias", 1), ("ln_f.weight", 4)):
        assert index["weight_map"][key] == SHARDS[shard]
    for shard in SHARDS:
        with safe_open(out / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == {key for key, name in index["weight_map"].items() if name == shard}
    for name in set(COMPANIONS) & set(companions):
        assert (out / name).read_bytes() == (made / name).read_bytes()


def test_shards_are_those_of_the_reference_library(made: Path, tmp_path: Path) -> None:
    export(made, tmp_path / "out")
    tensors = prepared_tensors(made)
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    for shard in SHARDS:
        held = {key: tensors[key] for key, name in weight_map.items() if name == shard}
        save_file(held, tmp_path / "reference", metadata={"format": "pt"})
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "reference").read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_transformers_loads_it_with_every_bit(prepared: PreparedFactory, dtype: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BloomForCausalLM

    _, directory = prepared(dtype=dtype)
    export(directory, tmp_path / "out")
    expected = prepared_tensors(directory)
    for kind in (BloomForCausalLM, AutoModelForCausalLM):
        model, notes = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert isinstance(model, BloomForCausalLM)
        assert not any(notes[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        state = model.transformer.state_dict()
        assert set(state) == set(expected)
        for key, tensor in expected.items():
            assert state[key].dtype == getattr(torch, dtype) and bits(state[key]) == bits(tensor), key
        assert model.lm_head.weight.data_ptr() == model.transformer.word_embeddings.weight.data_ptr()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hello")["input_ids"]


def test_converting_it_again_gives_the_same_parts(made: Path, tmp_path: Path) -> None:
    export(made, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "again")
    manifest = load_manifest(made)
    for file in (*manifest.parts, *manifest.companions):
        assert (tmp_path / "again" / file).read_bytes() == (made / file).read_bytes(), file


def test_the_buffer_size_changes_no_byte(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(made, tmp_path / "whole")
    monkeypatch.setattr(readahead, "BLOCK", 1_000)
    monkeypatch.setattr(writer, "SYNC_BYTES", 7_000)
    export(made, tmp_path / "small blocks")
    assert content(tmp_path / "whole") == content(tmp_path / "small blocks")


def test_progress_reaches_the_end_of_every_shard(made: Path, tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    export(made, tmp_path / "out", lambda file, done, total: seen.update({file: (done, total)}))
    sizes = {shard: (tmp_path / "out" / shard).stat().st_size for shard in SHARDS}
    assert seen == {shard: (size, size) for shard, size in sizes.items()}


@pytest.mark.parametrize("last", [False, True])
def test_a_damaged_tensor_is_never_exported(made_copy: Path, tmp_path: Path, last: bool) -> None:
    out = tmp_path / "out"
    for entry in read_header(made_copy / BLOCK).tensors.values():
        position = entry.end - 1 if last else entry.start
        flip(made_copy / BLOCK, position)
        with pytest.raises(BloomdeskError) as caught:
            export(made_copy, out)
        assert f"{entry.name} has the xxh3-128" in caught.value.message and BLOCK in caught.value.message
        assert "bloomdesk repair" in caught.value.hint
        assert not (out / SHARDS[2]).exists() and not list(out.glob("*.incomplete"))
        flip(made_copy / BLOCK, position)
    assert export(made_copy, out).kept == tuple(SHARDS[:2])


@pytest.mark.parametrize(
    ("file", "position"), [(BLOCK, 0), (BLOCK, 30), ("tokenizer.json", 9), ("config.json", 3)]
)
def test_a_damaged_header_or_small_file(made_copy: Path, tmp_path: Path, file: str, position: int) -> None:
    flip(made_copy / file, position)
    with pytest.raises(BloomdeskError, match=f"{file} is damaged and was not exported") as caught:
        export(made_copy, tmp_path / "out")
    assert "bloomdesk repair" in caught.value.hint


@pytest.mark.parametrize("file", [BLOCK, "embedding.safetensors", "tokenizer.json"])
def test_a_missing_or_cut_file_is_reported_before_anything_is_written(
    made_copy: Path, tmp_path: Path, file: str
) -> None:
    (made_copy / file).write_bytes((made_copy / file).read_bytes()[:-1])
    for what in ("expected", "missing"):
        with pytest.raises(BloomdeskError, match=f"{file} .*{what}"):
            export(made_copy, tmp_path / "out")
        (made_copy / file).unlink(missing_ok=True)
    assert not (tmp_path / "out").exists()


def test_a_part_that_ends_while_it_is_read(
    made_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = module.plan_export(made_copy, tmp_path / "out")
    (made_copy / BLOCK).write_bytes((made_copy / BLOCK).read_bytes()[:-50_000])
    with pytest.raises(BloomdeskError, match=r"mlp.dense_4h_to_h.*ends .* bytes too early"):
        module.carry_out(plan)
    (made_copy / BLOCK).unlink()
    with pytest.raises(BloomdeskError, match="the file is missing"):
        module.carry_out(plan)
    assert not (tmp_path / "out" / SHARDS[2]).exists()


def test_an_incomplete_directory_is_refused(made_copy: Path, tmp_path: Path) -> None:
    manifest = load_manifest(made_copy)
    parts = {file: record for file, record in manifest.parts.items() if file != BLOCK}
    (made_copy / "manifest.json").write_text(type(manifest)(manifest.model, manifest.source, parts).to_json())
    with pytest.raises(BloomdeskError, match="not complete: 3 files"):
        export(made_copy, tmp_path / "out")
    with pytest.raises(BloomdeskError, match="not a prepared checkpoint"):
        export(tmp_path, tmp_path / "out")


def test_too_little_space_is_refused_with_the_figures(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100_000))
    words = r"needs [\d,]+ bytes and the disk has 100,000 free, [\d,]+ too few"
    with pytest.raises(BloomdeskError, match=words):
        export(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_directories_are_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to my aunt.txt").write_text("dear")
    (tmp_path / "file").write_text("")
    for place, what in (("letters", "to my aunt"), ("file", "is not a directory")):
        with pytest.raises(BloomdeskError, match=what):
            export(made, tmp_path / place)
    with pytest.raises(BloomdeskError, match="is not empty"):
        export(made, made)
    assert content(tmp_path / "letters") == {"to my aunt.txt": b"dear"}


def test_another_checkpoint_of_the_same_shape_is_refused(made: Path, tmp_path: Path) -> None:
    """Its shards have equal names, sizes and headers."""
    convert(make(tmp_path / "source", seed=1), tmp_path / "other")
    export(tmp_path / "other", tmp_path / "out")
    (tmp_path / "out" / SHARDS[0]).unlink()
    before = content(tmp_path / "out")
    with pytest.raises(BloomdeskError, match="an export of other weights"):
        export(made, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_running_again_redoes_what_is_unfinished_and_nothing_else(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(made, out)
    expected = content(out)
    (out / SHARDS[0]).unlink()
    (out / SHARDS[1]).write_bytes(expected[SHARDS[1]][:-1])
    flip(out / SHARDS[2], 20)
    (out / f"{SHARDS[0]}.incomplete").write_bytes(b"half")
    (out / "config.json").unlink()
    (out / "README.md").write_text("mine")
    times = {shard: (out / shard).stat().st_mtime_ns for shard in SHARDS[3:]}
    summary = export(made, out)
    assert summary.written == tuple(SHARDS[:3]) and summary.kept == tuple(SHARDS[3:])
    aside = {f"{SHARDS[1]}.changed", f"{SHARDS[2]}.changed"}
    assert aside <= set(content(out))
    assert {name: data for name, data in content(out).items() if name not in aside} == {
        **expected,
        "README.md": b"mine",
    }
    assert {shard: (out / shard).stat().st_mtime_ns for shard in SHARDS[3:]} == times
    assert export(made, out).written == ()


@pytest.mark.parametrize("full_at", [0, 1, 60_000, 120_000])
def test_a_full_disk_leaves_nothing_that_counts(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: int
) -> None:
    """In the index, in a shard's header, in its data; and going on once there is room."""
    out, left, original, write = tmp_path / "out", full_at, Path.open, os.write

    def take(data: Any) -> None:
        nonlocal left
        if len(data) > left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= len(data)

    class Limited(io.FileIO):
        def write(self, data: Any) -> int:
            take(data)
            return super().write(data)

    def open_(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        return Limited(path, mode) if set(mode) & set("wx") else original(path, mode, *rest, **named)

    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr(os, "write", lambda descriptor, data: take(data) or write(descriptor, data))
    with pytest.raises(BloomdeskError, match="the disk is full") as caught:
        export(made, out)
    assert "make room" in caught.value.hint
    monkeypatch.undo()
    assert not list(out.glob("*.incomplete"))
    export(made, out)
    export(made, tmp_path / "reference")
    assert content(out) == content(tmp_path / "reference")


def test_a_kill_leaves_nothing_that_counts(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export(made, out, interrupt_at(SHARDS[2]))
    assert sorted(path.name for path in out.glob("*.safetensors*") if path.name != INDEX) == SHARDS[:2]
    assert export(made, out).kept == tuple(SHARDS[:2])


def test_one_writer_at_a_time(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with sole_writer(tmp_path / "out"), pytest.raises(BloomdeskError, match="another bloomdesk"):
        export(made, tmp_path / "out")
