"""Source shards of every kind: the place of each tensor's bytes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.errors import BloomdeskError
from scripts.fakehub.checkpoint import Layout, synthetic
from toolkit.source.dtype import choose_dtype, in_dtype
from toolkit.source.index import find_shards
from toolkit.source.shards import read_shard, read_source

SHAPE = {"hidden_size": 64, "heads": 8, "blocks": 2, "vocab_size": 300}
LAYOUTS = {
    "bloom": Layout(),
    "dash": Layout(separator="-"),
    "todays zip": Layout(todays_zip=True),
    "single bin": Layout(single=True),
    "single bin of today": Layout(single=True, todays_zip=True),
    "safetensors shards": Layout(form="safetensors"),
    "single safetensors": Layout(single=True, form="safetensors"),
    "cut blocks": Layout(max_shard_bytes=60_000, separator="-"),
    "cut blocks in safetensors": Layout(max_shard_bytes=60_000, form="safetensors"),
    "prefix": Layout(prefix=True),
    "lm_head": Layout(lm_head=True, prefix=True),
}


def reference(source: Path) -> dict[str, torch.Tensor]:
    """All tensors of a source, as torch and safetensors load them."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in source.iterdir():
        if path.suffix == ".bin":
            tensors.update(torch.load(path, weights_only=True))
        elif path.suffix == ".safetensors":
            tensors.update(load_file(path))
    return tensors


def data(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_tensor_is_found(tmp_path: Path, layout: Layout) -> None:
    synthetic(tmp_path, **SHAPE, layout=layout)
    found, expected = read_source(tmp_path), reference(tmp_path)
    assert set(found) == set(expected)
    for key, tensor in found.items():
        assert tensor.shape == tuple(expected[key].shape)
        bytes_there = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        assert bytes_there == data(expected[key]), key


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_dtype_comes_from_the_tensors(tmp_path: Path, form: str, dtype: str, name: str) -> None:
    synthetic(tmp_path, **SHAPE, dtype=dtype, layout=Layout(form=form))
    assert choose_dtype(None, b"{}", read_source(tmp_path)).dtype == name


def test_views_parameters_and_shared_storages(tmp_path: Path) -> None:
    whole = torch.arange(20, dtype=torch.float32).reshape(4, 5)
    state = {
        "whole": whole,
        "rows": whole[1:3],
        "parameter": torch.nn.Parameter(whole.clone()),
        "again": whole,
    }
    torch.save(state, tmp_path / "x.bin")
    found = read_shard(tmp_path / "x.bin")
    content = (tmp_path / "x.bin").read_bytes()
    for key, tensor in found.items():
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == data(state[key]), key


def test_a_modules_own_state_dict(tmp_path: Path) -> None:
    """It carries `_metadata`, as the single .bin files of the smaller models do."""
    module = torch.nn.Linear(3, 4)
    torch.save(module.state_dict(), tmp_path / "x.bin")
    assert {key: tensor.shape for key, tensor in read_shard(tmp_path / "x.bin").items()} == {
        "weight": (4, 3),
        "bias": (4,),
    }


@pytest.mark.parametrize(
    "value",
    [torch.eye(3).to_sparse(), 7, "text", [torch.ones(2)], {"a": torch.ones(2)}],
    ids=["sparse", "number", "text", "list", "table"],
)
def test_what_is_no_plain_tensor(tmp_path: Path, value: Any) -> None:
    torch.save({"a": torch.ones(2), "b": value}, tmp_path / "x.bin")
    with pytest.raises(BloomdeskError):
        read_shard(tmp_path / "x.bin")


def test_what_is_no_table(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "x.bin")
    with pytest.raises(BloomdeskError, match="table of tensors"):
        read_shard(tmp_path / "x.bin")
    torch.save({3: torch.ones(2)}, tmp_path / "x.bin")
    with pytest.raises(BloomdeskError, match="no tensor"):
        read_shard(tmp_path / "x.bin")


def test_a_flipped_bit_anywhere_outside_the_data_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    synthetic(tmp_path, **SHAPE)
    whole = (tmp_path / "pytorch_model_00004-of-00004.bin").read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        try:
            found = read_shard(path)
        except BloomdeskError:
            continue
        assert all(tensor.offset + tensor.nbytes <= len(whole) for tensor in found.values())


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "{}", "\xff", "[" * 99_999]
    + [f'{{"weight_map": {inside}}}' for inside in ("3", "[]", "{}", '{"a": []}')],
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BloomdeskError, match=r"index\.json is not a sound index"):
        find_shards(tmp_path)


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    synthetic(tmp_path, **SHAPE)
    path = tmp_path / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"].pop("ln_f.bias")
    path.write_text(json.dumps(index))
    with pytest.raises(BloomdeskError, match=r"also holds ln_f\.bias"):
        read_source(tmp_path)
    index["weight_map"].update({"ln_f.bias": shard, "ln_f.extra": shard})
    path.write_text(json.dumps(index))
    with pytest.raises(BloomdeskError, match=r"does not hold ln_f\.extra"):
        read_source(tmp_path)


def test_missing_shards_are_counted(tmp_path: Path) -> None:
    synthetic(tmp_path, **SHAPE)
    (tmp_path / "pytorch_model_00002-of-00004.bin").unlink()
    (tmp_path / "pytorch_model_00003-of-00004.bin").unlink()
    with pytest.raises(BloomdeskError, match="2 of 4 shards are missing, pytorch_model_00002"):
        read_source(tmp_path)


def test_safetensors_win_where_they_are_whole(tmp_path: Path) -> None:
    synthetic(tmp_path, **SHAPE)
    synthetic(tmp_path, **SHAPE, layout=Layout(form="safetensors"))
    assert {path.suffix for path in find_shards(tmp_path).files} == {".safetensors"}
    (tmp_path / "model_00001-of-00004.safetensors").unlink()
    assert {path.suffix for path in find_shards(tmp_path).files} == {".bin"}


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(BloomdeskError, match="has no weights"):
        read_source(tmp_path)
    with pytest.raises(BloomdeskError, match="not a directory"):
        read_source(tmp_path / "absent")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.int8])
def test_what_is_no_dtype_of_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(2, dtype=dtype)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BloomdeskError, match=r"b is torch\.[a-z0-9]+, expected one of BF16"):
        in_dtype(read_source(tmp_path), ["a", "b"], "BF16")
    torch.save({"a": torch.ones(2, dtype=dtype)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BloomdeskError, match="a: the dtype torch"):
        choose_dtype(None, b"{}", read_source(tmp_path))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BloomdeskError, match="no tensors"):
        choose_dtype(None, b"{}", read_source(tmp_path))
