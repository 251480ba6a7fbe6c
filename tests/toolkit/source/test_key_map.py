"""The table of names is strict: every key has its place, and what is unknown, missing or double is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.errors import BloomdeskError
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import part_specs
from scripts.fakehub.checkpoint import bloom_shapes
from toolkit.source.config import read_config
from toolkit.source.key_map import assign, name_table

MODEL = Hyperparameters(hidden_size=64, n_head=8, n_layer=12, vocab_size=300, dtype="BF16")
KEYS = list(bloom_shapes(64, 12, 300))
REAL = Path(__file__).resolve().parents[3].parent / "shared" / "hub" / "bigscience-bloom-2a3d62e"


def test_table_is_that_of_transformers() -> None:
    from transformers import BloomConfig, BloomModel

    reference = BloomModel(BloomConfig(hidden_size=64, n_head=8, n_layer=12, vocab_size=300)).state_dict()
    specs = {spec.file: spec.tensors for spec in part_specs(MODEL)}
    table = name_table(MODEL)
    assert set(table) == set(reference)
    for key, (file, name) in table.items():
        assert specs[file][name] == tuple(reference[key].shape), key


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_every_key_has_its_place(prefix: str) -> None:
    parts = assign([prefix + key for key in reversed(KEYS)], MODEL).parts
    assert list(parts) == [spec.file for spec in part_specs(MODEL)]
    for spec in part_specs(MODEL):
        assert list(parts[spec.file]) == list(spec.tensors)
    assert parts["block_11.safetensors"]["mlp.dense_4h_to_h.bias"] == f"{prefix}h.11.mlp.dense_4h_to_h.bias"
    assert parts["final_layernorm.safetensors"]["weight"] == f"{prefix}ln_f.weight"


def test_lm_head_is_known() -> None:
    assert assign(KEYS, MODEL).lm_head is None
    assert assign([*KEYS, "lm_head.weight"], MODEL).lm_head == "lm_head.weight"


@pytest.mark.parametrize(
    "key",
    [
        "h.12.input_layernorm.weight",
        "h.01.input_layernorm.weight",
        "h.-1.input_layernorm.weight",
        "h.0.attn.weight",
        "lm_head.bias",
        "transformer.transformer.ln_f.weight",
        "model.ln_f.weight",
        "",
    ],
)
def test_unknown(key: str) -> None:
    with pytest.raises(BloomdeskError, match="no BLOOM of this shape has") as caught:
        assign([*KEYS, key], MODEL)
    assert caught.value.message.endswith(key)


def test_missing() -> None:
    with pytest.raises(BloomdeskError, match=r"1 tensor missing: h\.3\.self_attention\.dense\.bias$"):
        assign([key for key in KEYS if key != "h.3.self_attention.dense.bias"], MODEL)
    with pytest.raises(BloomdeskError, match=r"24 tensors missing: .*, and 21 more$"):
        assign([key for key in KEYS if not key.startswith(("h.3.", "h.4."))], MODEL)


def test_twice() -> None:
    with pytest.raises(BloomdeskError, match=r"twice.*: ln_f\.bias$"):
        assign([*KEYS, "transformer.ln_f.bias"], MODEL)


def test_many_unknown_are_counted() -> None:
    with pytest.raises(BloomdeskError, match=r"100 tensors .* and 97 more$"):
        assign([*KEYS, *(f"extra.{number}" for number in range(100))], MODEL)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real index is not at hand")
def test_the_real_index_plans_72_parts() -> None:
    model = read_config(REAL / "config.json", "BF16")
    index = json.loads((REAL / "pytorch_model.bin.index.json").read_text())
    parts = assign(index["weight_map"], model).parts
    assert len(parts) == 72
    files = [f"block_{number:02d}.safetensors" for number in range(70)]
    assert list(parts) == ["embedding.safetensors", *files, "final_layernorm.safetensors"]
    shards = [{index["weight_map"][key] for key in keys.values()} for keys in parts.values()]
    assert shards == [{f"pytorch_model_{number:05d}-of-00072.bin"} for number in range(1, 73)]
    specs = part_specs(model)
    assert sum(spec.nbytes("BF16") for spec in specs) == index["metadata"]["total_size"]
    assert specs[1].nbytes("BF16") == 4_932_874_240
    assert specs[0].tensors["word_embeddings.weight"] == (250_880, 14_336)
    assert specs[70].tensors["mlp.dense_4h_to_h.weight"] == (14_336, 57_344)
