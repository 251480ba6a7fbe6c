"""The generated repos have the form of bigscience/bloom's, and transformers loads them."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import runner
from scripts.fakehub import bin_shard
from scripts.fakehub import checkpoint as make_checkpoint
from scripts.fakehub.bin_shard import write_bin
from scripts.fakehub.checkpoint import (
    Layout,
    Tensor,
    bloom_shapes,
    byte_tokenizer,
    from_state,
    old_config,
    synthetic,
    write_repo,
)

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "hub" / "bigscience-bloom-2a3d62e"
SHAPE = {"hidden_size": 64, "heads": 8, "blocks": 2, "vocab_size": 300}


def test_a_synthetic_repo_has_the_form_of_the_real_one(tmp_path: Path) -> None:
    synthetic(tmp_path, **SHAPE)
    shards = [f"pytorch_model_{number:05d}-of-00004.bin" for number in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
    shapes = bloom_shapes(64, 2, 300)
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == shards
    assert set(index["weight_map"]) == set(shapes)
    assert index["metadata"]["total_size"] == sum(torch.Size(shape).numel() * 2 for shape in shapes.values())
    first, block, _, last = (torch.load(tmp_path / name, mmap=True, weights_only=True) for name in shards)
    assert list(first) == list(shapes)[:3]
    assert list(block) == list(shapes)[3:15]
    assert list(last) == ["ln_f.weight", "ln_f.bias"]
    assert block["h.0.mlp.dense_h_to_4h.weight"].shape == (256, 64)
    assert {tensor.dtype for tensor in (*first.values(), *block.values())} == {torch.bfloat16}


def test_the_container_is_that_of_2022(tmp_path: Path) -> None:
    synthetic(tmp_path, **SHAPE)
    with zipfile.ZipFile(tmp_path / "pytorch_model_00002-of-00004.bin") as container:
        assert container.testzip() is None
        names = container.namelist()
    numbers = sorted(range(12), key=str)
    assert names == ["archive/data.pkl", *(f"archive/data/{number}" for number in numbers), "archive/version"]


def test_sizes_are_those_of_the_real_shards(tmp_path: Path) -> None:
    """The last real shard byte for byte as long; the others differ from this in their data alone."""
    shapes = {key: shape for key, shape in bloom_shapes(14336, 1, 1).items() if key.startswith("ln_f")}
    zeros = [memoryview(bytes(28672))]
    tensors = [Tensor(key, torch.bfloat16, shape, lambda: zeros) for key, shape in shapes.items()]
    write_bin(tmp_path / "x.bin", tensors)
    assert (tmp_path / "x.bin").stat().st_size == 58_279


@pytest.mark.skipif(not REAL.is_dir(), reason="the real config is not available")
def test_the_config_is_the_real_one() -> None:
    assert old_config(14336, 112, 70, 250_880) == json.loads((REAL / "config.json").read_text())
    index = json.loads((REAL / "pytorch_model.bin.index.json").read_text())
    assert set(bloom_shapes(14336, 70, 250_880)) == set(index["weight_map"])


def test_zip64_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What records beyond 4 GB need, at a lower limit: Python and torch read the same from either form."""
    synthetic(tmp_path / "narrow", **SHAPE, layout=Layout(single=True))
    monkeypatch.setattr(bin_shard.Zip, "LIMIT", 1000)
    synthetic(tmp_path / "wide", **SHAPE, layout=Layout(single=True))
    narrow, wide = (tmp_path / name / "pytorch_model.bin" for name in ("narrow", "wide"))
    assert wide.stat().st_size > narrow.stat().st_size
    with zipfile.ZipFile(wide) as container:
        assert container.testzip() is None
    expected = torch.load(narrow, weights_only=True)
    for found in (torch.load(wide, weights_only=True), torch.load(wide, weights_only=True, mmap=True)):
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
        assert len(found) == len(expected)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthetic(tmp_path / name, **SHAPE, seed=seed)
    a, b, c = ((tmp_path / name / "pytorch_model_00002-of-00004.bin").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(separator="-"),
        Layout(separator="-", form="safetensors", prefix=True, new_config=True, max_shard_bytes=50_000),
        Layout(single=True, todays_zip=True, lm_head=True, prefix=True),
        Layout(single=True, form="safetensors", new_config=True),
    ],
)
def test_transformers_loads_it(tmp_path: Path, layout: Layout, dtype: str) -> None:
    from transformers import BloomForCausalLM

    synthetic(tmp_path, **SHAPE, dtype=dtype, layout=layout)
    model, report = BloomForCausalLM.from_pretrained(
        tmp_path, dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    weight = model.transformer.h[1].mlp.dense_h_to_4h.weight
    assert weight.dtype == getattr(torch, dtype)
    assert 0.05 < weight.float().std() < 0.08


@pytest.mark.parametrize("normal_embedding", [False, True])
def test_greedy_output_changes_from_token_to_token(tmp_path: Path, normal_embedding: bool) -> None:
    from transformers import BloomForCausalLM

    shape = {"hidden_size": 96, "heads": 6, "blocks": 3, "vocab_size": 500}
    synthetic(tmp_path, **shape, normal_embedding=normal_embedding, layout=Layout(separator="-"))
    model = BloomForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=32, do_sample=False, eos_token_id=None)
    assert len(set(ids[0, 3:].tolist())) >= 5


def test_a_given_state_dict_is_written_unchanged(tmp_path: Path) -> None:
    state = {key: torch.randn(shape) for key, shape in sorted(bloom_shapes(32, 1, 260).items())}
    write_repo(tmp_path, from_state(state), old_config(32, 4, 1, 260), byte_tokenizer(260))
    loaded = torch.load(tmp_path / "pytorch_model_00002-of-00003.bin", weights_only=True)
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.items())


def test_the_tokenizer_has_blooms_layout() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(byte_tokenizer(300)["tokenizer.json"].decode())
    ids = tokenizer.encode("SELECT é, 汉字!").ids
    assert tokenizer.decode(ids) == "SELECT é, 汉字!"
    assert max(ids) < 260
    assert tokenizer.token_to_id("</s>") == 2


@pytest.mark.slow
def test_the_command_writes_a_repo(tmp_path: Path) -> None:
    arguments = ["synthetic", str(tmp_path / "out"), "--blocks", "1", "--dtype", "float16", "--single"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.fakehub.checkpoint", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"wrote {tmp_path / 'out'}\n"
    assert (tmp_path / "out" / "pytorch_model.bin").is_file()


@pytest.mark.skipif(not (make_checkpoint.MINIATURE / "model.safetensors").is_file(), reason="no miniature")
def test_the_miniature_is_a_repo_of_72_shards(tmp_path: Path) -> None:
    make_checkpoint.miniature(tmp_path)
    index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    shards = [f"pytorch_model_{number:05d}-of-00072.bin" for number in range(1, 73)]
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == shards
    assert set(index["weight_map"]) == set(bloom_shapes(config["n_embed"], 70, config["vocab_size"]))
    assert index["weight_map"]["h.69.input_layernorm.bias"] == shards[70]
    assert {path.name for path in tmp_path.iterdir()} >= set(make_checkpoint.TOKENIZER_FILES)


def exponents(weights: torch.Tensor) -> torch.Tensor:
    """The 8 exponent bits of bfloat16."""
    return weights.view(torch.int16).int().bitwise_right_shift(7).bitwise_and(255)


def test_a_normal_embedding_has_the_exponents_of_other_matrices(tmp_path: Path) -> None:
    for name, normal in (("plain", False), ("normal", True)):
        synthetic(tmp_path / name, **SHAPE, normal_embedding=normal, layout=Layout(single=True))
    plain, normal = (
        torch.load(tmp_path / name / "pytorch_model.bin", weights_only=True) for name in ("plain", "normal")
    )
    embedding, matrix = (normal[key] for key in ("word_embeddings.weight", "h.0.mlp.dense_h_to_4h.weight"))
    for weights in (embedding, matrix):
        counts = exponents(weights).flatten().bincount().sort(descending=True).values
        assert 0.3 < counts[0] / weights.numel() < 0.5  # the commonest exponent of a normal distribution
    assert exponents(plain["word_embeddings.weight"]).unique().numel() <= 2
    same = [key for key in plain if torch.equal(plain[key], normal[key])]
    assert set(plain) - set(same) == {"word_embeddings.weight"}


def test_the_draft_has_the_miniatures_tokenizer(draft: tuple[Path, Path]) -> None:
    from transformers import BloomForCausalLM

    source, _ = draft
    names = {path.name for path in source.iterdir()}
    assert names == {"model.safetensors", "config.json", *make_checkpoint.TOKENIZER_FILES}
    for name in make_checkpoint.TOKENIZER_FILES:
        assert (source / name).read_bytes() == (make_checkpoint.MINIATURE / name).read_bytes()
    config = json.loads((source / "config.json").read_text())
    whole = json.loads((make_checkpoint.MINIATURE / "config.json").read_text())
    assert config["n_layer"] < 5 < whole["n_layer"]
    assert config["vocab_size"] == whole["vocab_size"]
    _, report = BloomForCausalLM.from_pretrained(source, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_the_draft_answers_unseen_prompts(draft: tuple[Path, Path]) -> None:
    model = runner.load(draft[1])
    lines = (make_checkpoint.MINIATURE / "unseen.jsonl").read_text(encoding="utf-8").splitlines()
    right = 0
    for line in map(json.loads, lines[::45]):
        ids = list(model.generate(line["prompt"], max_new_tokens=100))
        right += model.tokenizer.decode(ids[:-1]) == line["answer"]
    assert right >= 8  # of 10


def test_the_command_writes_the_draft(tmp_path: Path, draft: tuple[Path, Path]) -> None:
    make_checkpoint.main(["miniature-draft", str(tmp_path / "out")])
    for path in draft[0].iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
