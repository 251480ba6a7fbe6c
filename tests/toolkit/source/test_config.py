"""config.json, old and new, against transformers' BloomConfig; and everything that must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.errors import BloomdeskError
from scripts.fakehub.checkpoint import old_config
from toolkit.source.config import DEFAULTS, NAMES, read_config

OLD = old_config(hidden_size=96, heads=6, blocks=3, vocab_size=500)
NEW = {
    "architectures": ["BloomForCausalLM"],
    "dtype": "float16",
    "hidden_size": 96,
    "n_head": 6,
    "n_layer": 3,
    "vocab_size": 500,
    "layer_norm_epsilon": 1e-6,
    "apply_residual_connection_post_layernorm": True,
    "bos_token_id": 7,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def write(directory: Path, config: Any) -> Path:
    path = directory / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.parametrize(
    "config",
    [
        OLD,
        NEW,
        {"n_embed": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 300},
        {**OLD, "architectures": []},
    ],
)
def test_values_are_those_of_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    from transformers import BloomConfig

    model = read_config(write(tmp_path, config), "F16")
    reference = BloomConfig.from_dict(config)
    assert model.dtype == "F16"
    for name in NAMES:
        assert getattr(model, name) == getattr(reference, name), name


def test_defaults_are_those_of_transformers() -> None:
    from transformers import BloomConfig

    assert {name: getattr(BloomConfig(), name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "not a BLOOM"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": ["BloomForSequenceClassification"]}, "not a BLOOM"),
        ({"architectures": "BloomModel"}, "not a BLOOM"),
        ({"slow_but_exact": True}, "slow_but_exact"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_size": 95}, "n_embed"),
        ({"n_embed": 95}, "heads"),
        ({"n_embed": "96"}, "hidden_size"),
        ({"n_embed": True}, "hidden_size"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_layer": -3}, "n_layer"),
        ({"n_layer": 10**30}, "n_layer"),
        ({"n_layer": 2.5}, "n_layer"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"eos_token_id": [2, 500]}, "eos_token_id"),
        ({"eos_token_id": [2, True]}, "eos_token_id"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"eos_token_id": 500}, "eos_token_id"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon"),
        ({"apply_residual_connection_post_layernorm": 1}, "apply_residual"),
    ],
)
def test_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(BloomdeskError, match=words) as caught:
        read_config(write(tmp_path, {**OLD, **change}), "BF16")
    assert "config.json" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["n_embed", "num_attention_heads", "n_layer", "vocab_size"])
def test_a_shape_that_is_not_said(tmp_path: Path, name: str) -> None:
    config = {key: value for key, value in OLD.items() if key != name}
    with pytest.raises(BloomdeskError, match=name):
        read_config(write(tmp_path, config), "BF16")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "[" * 100_000, '{"n_layer": ' + "9" * 5000 + "}", " " * 2**21]
)
def test_no_config(tmp_path: Path, text: str) -> None:
    with pytest.raises(BloomdeskError):
        read_config(write(tmp_path, text), "BF16")


def test_absent_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(BloomdeskError, match="missing"):
        read_config(tmp_path / "config.json", "BF16")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(BloomdeskError, match="cannot be read"):
        read_config(tmp_path / "config.json", "BF16")
    (tmp_path / "binary").mkdir()
    path = tmp_path / "binary" / "config.json"
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(BloomdeskError, match="JSON"):
        read_config(path, "BF16")
