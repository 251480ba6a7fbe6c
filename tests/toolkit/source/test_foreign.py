"""What is no source of weights is named, with what to fetch instead; nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.errors import BloomdeskError
from scripts.fakehub.checkpoint import Layout, synthetic
from scripts.fakehub.server import LocalHub
from toolkit.commands.convert import convert
from toolkit.commands.prepare import plan_preparation

SHAPE = {"hidden_size": 64, "heads": 8, "blocks": 2, "vocab_size": 300}
WEIGHTS = "model.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    synthetic(tmp_path / "source", **SHAPE, layout=Layout(single=True, form="safetensors"))
    return tmp_path / "source"


def only(*names: str) -> Callable[[Path], None]:
    """The weights under other names."""

    def change(source: Path) -> None:
        data = (source / WEIGHTS).read_bytes()
        (source / WEIGHTS).unlink()
        for name in names:
            (source / name).write_bytes(data)

    return change


def adapter(source: Path) -> None:
    for path in source.iterdir():
        path.unlink()
    fields = {"peft_type": "LORA", "base_model_name_or_path": "bigscience/bloom-560m"}
    (source / "adapter_config.json").write_text(json.dumps(fields))
    (source / "adapter_model.safetensors").write_bytes(b"")


# How the source is changed, what is said, and what is advised.
FOREIGN: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "variant": (only("model.fp16.safetensors"), "variant fp16 alone (model.fp16", "fetch model.safetensors"),
    "variant in .bin": (only("pytorch_model.fp16.bin"), "variant fp16", "fetch pytorch_model.bin"),
    "gguf": (only("bloom.Q4_0.gguf"), "GGUF", "fetch the original model"),
    "flax": (only("flax_model.msgpack"), "for Flax", "fetch the original model"),
    "tensorflow": (only("tf_model.h5"), "for TensorFlow", "fetch the original model"),
    "gptq": (only("gptq_model-4bit-128g.safetensors"), "by GPTQ", "fetch the original model"),
    "onnx": (only("model.onnx"), "for ONNX", "fetch the original model"),
    "adapter": (adapter, "an adapter (LORA) of bigscience/bloom-560m", "fetch bigscience/bloom-560m"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_it_is_named_on_the_disk_and_on_the_hub(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    change, what, instead = FOREIGN[kind]
    change(source)
    with LocalHub({"me/bloom": source}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        for start in (
            lambda: convert(source, tmp_path / "out"),
            lambda: plan_preparation("me/bloom", tmp_path / "out"),
        ):
            with pytest.raises(BloomdeskError) as caught:
                start()
            assert what in caught.value.message and instead in caught.value.hint
            assert not (tmp_path / "out").exists()


def test_weights_beside_others_are_taken(source: Path, tmp_path: Path) -> None:
    for name in ("model.fp16.safetensors", "bloom.gguf", "tf_model.h5", "flax_model.msgpack"):
        (source / name).write_bytes(b"")
    convert(source, tmp_path / "out")


@pytest.mark.parametrize("suffix", [".aria2", ".part", ".crdownload", ".!qB", ".st"])
def test_what_another_downloader_has_not_finished(source: Path, tmp_path: Path, suffix: str) -> None:
    (source / (WEIGHTS + suffix)).write_bytes(b"")
    with pytest.raises(BloomdeskError, match="has not finished that file"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("rows", [280, 320])
def test_rows_that_config_does_not_know(source: Path, tmp_path: Path, rows: int) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    with pytest.raises(
        BloomdeskError, match=f"has 300 rows, and config.json's vocab_size is {rows}"
    ) as caught:
        convert(source, tmp_path / "out")
    assert '"vocab_size": 300,' in caught.value.hint
    # That line makes it right.
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    convert(source, tmp_path / "out")


@pytest.mark.parametrize("quantised", [{"quant_method": "gptq", "bits": 4}, {"load_in_8bit": True}, 7])
def test_a_quantised_model(source: Path, tmp_path: Path, quantised: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    with pytest.raises(BloomdeskError, match="the weights are quantised") as caught:
        convert(source, tmp_path / "out")
    assert "gptq" in caught.value.message or "gptq" not in str(quantised)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8(source: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    state = load_file(source / WEIGHTS)
    save_file(
        {key: each.to(dtype) if each.dim() == 2 else each for key, each in state.items()}, source / WEIGHTS
    )
    with pytest.raises(BloomdeskError, match="is F8_E") as caught:
        convert(source, tmp_path / "out")
    assert caught.value.hint == "fetch the model that this one was made from"
