"""LoRA adapters are merged bit for bit as peft's merge_and_unload does it; what it is not known for is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from runner.format.manifest import load_manifest
from tests.support.commands import refused, run
from tests.support.lossless import content, flip, interrupt_at, make
from toolkit.commands.convert import convert
from toolkit.commands.export import export
from toolkit.commands.repair import repair
from toolkit.commands.verify import verify
from toolkit.source import merge
from toolkit.source.shards import read_shard
from toolkit.source.tensor import Addition
from toolkit.source.tensor_reader import TensorReader, spans_of

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def make_adapter(source: Path, out: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A trained adapter: every tensor of it is random."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    wanted = {"target_modules": ["query_key_value"], **fields}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **wanted), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name or (parameter.requires_grad and name.endswith("bias")):
            parameter.data = (torch.randn(parameter.shape) * 0.05).to(dtype)
    model.save_pretrained(out)
    return out


def oracle(source: Path, adapter: Path, dtype: str = "auto") -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def assert_merged(source: Path, adapter: Path, out: Path, dtype: str = "auto") -> None:
    export(out, out.with_name("export"))
    found: dict[str, torch.Tensor] = {}
    for shard in out.with_name("export").glob("*.safetensors"):
        found |= load_file(shard)
    wanted = oracle(source, adapter, dtype)
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[f"transformer.{name}"]), name


ADAPTERS: dict[str, dict[str, Any]] = {
    "one matrix": {},
    "every matrix": {
        "target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        "r": 16,
        "lora_alpha": 24,
    },
    "rank 1": {"r": 1, "lora_alpha": 7},
    "rank 3, rslora": {"r": 3, "use_rslora": True},
    "patterns": {
        "target_modules": ["query_key_value", "dense"],
        "rank_pattern": {"dense": 4, r"h.1.self_attention.query_key_value": 2},
        "alpha_pattern": {r"transformer.h.\d+.self_attention.dense": 5},
    },
    "some blocks": {"layers_to_transform": [1], "layers_pattern": "h"},
    "lora_bias": {"lora_bias": True},
    "biases alone": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "embedding": {"target_modules": ["word_embeddings", "dense"]},
    "bfloat16": {"dtype": torch.bfloat16, "r": 5},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("fields", ADAPTERS.values(), ids=ADAPTERS)
def test_it_is_merged_as_peft_does(tmp_path: Path, dtype: str, fields: dict[str, Any]) -> None:
    source = make(tmp_path / "source", dtype=dtype)
    adapter = make_adapter(source, tmp_path / "adapter", **fields)
    done = run("convert", source, tmp_path / "out", "--adapter", adapter)
    assert done.returncode == 0 and f"{adapter} is merged into the weights" in done.stderr, done
    assert verify(tmp_path / "out").sound
    assert_merged(source, adapter, tmp_path / "out")
    made_from = {
        shard.file for part in load_manifest(tmp_path / "out").parts.values() for shard in part.sources
    }
    assert WEIGHTS in made_from


@pytest.mark.slow
def test_after_rounding(tmp_path: Path) -> None:
    source = make(tmp_path / "source", dtype="float32")
    adapter = make_adapter(source, tmp_path / "adapter")
    assert run("convert", source, tmp_path / "out", "--adapter", adapter, "--dtype", "bf16").returncode == 0
    assert_merged(source, adapter, tmp_path / "out", "bfloat16")


def test_lossless_resumed_and_repaired(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    adapter = make_adapter(source, tmp_path / "adapter")
    convert(source, tmp_path / "plain", adapter=adapter)
    convert(source, tmp_path / "base")
    out = tmp_path / "out"
    assert run("convert", source, out, "--adapter", adapter, "--form", "lossless").returncode == 0
    assert load_manifest(out).fingerprint == load_manifest(tmp_path / "plain").fingerprint
    assert load_manifest(out).fingerprint != load_manifest(tmp_path / "base").fingerprint
    right = content(out)
    flip(out / "block_01.safetensors", 9000)
    assert "and the --adapter if one was merged" in refused("repair", out, "--source", source)
    assert "needs --source" in refused("repair", out, "--adapter", adapter)
    assert repair(out, source, adapter=adapter).parts == ("block_01.safetensors",)
    assert content(out) == right
    (out / "block_02.safetensors").unlink()
    assert "another state of the source" in refused("convert", source, out, "--form", "lossless")
    assert run("convert", source, out, "--form", "lossless", "--adapter", adapter).returncode == 0
    assert content(out) == right


def test_what_merging_makes_of_the_weights_does_not_replace_them(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    adapter, before = make_adapter(source, tmp_path / "adapter"), content(source)
    said = refused("convert", source, tmp_path / "out", "--adapter", adapter, "--delete-source")
    assert "can't be had back from merged ones" in said
    assert content(source) == before and not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", adapter=adapter)
    for path in [*source.glob("*.bin"), *source.glob("*.index.json")]:
        path.unlink()
    assert "nor merged" in refused("convert", source, tmp_path / "out", "--adapter", adapter)
    assert "is no adapter" in refused("convert", source, tmp_path / "out", "--adapter", tmp_path)
    assert run("convert", source, tmp_path / "out").returncode == 0


def test_another_adapter_is_not_mixed_in_when_shards_are_gone(tmp_path: Path) -> None:
    """Nothing is left to compare the first block with."""
    source = make(tmp_path / "source")
    mine, other = make_adapter(source, tmp_path / "mine"), make_adapter(source, tmp_path / "other", r=4)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", interrupt_at("block_01.safetensors"), adapter=mine)
    for number in (1, 2):
        (source / f"pytorch_model_{number:05d}-of-00005.bin").unlink()
    before = content(tmp_path / "out")
    for given in ([], ["--adapter", str(other)]):
        assert "another state of the source" in refused("convert", source, tmp_path / "out", *given)
        assert content(tmp_path / "out") == before
    assert run("convert", source, tmp_path / "out", "--adapter", mine).returncode == 0
    assert verify(tmp_path / "out").sound


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200, 300])
@pytest.mark.parametrize("rank", [1, 3, 8, 64])
def test_a_product_has_the_same_bits_in_tiles(
    tmp_path: Path, rows: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor of zeros, so that the sum is the product; read in blocks that end within rows."""
    monkeypatch.setattr(merge, "TILE", 1)
    torch.manual_seed(rows)
    left, right = torch.randn(rows, rank), torch.randn(rank, 50)
    path = tmp_path / "x.safetensors"
    save_file({"left": left, "right": right, "base": torch.zeros(rows, 50)}, path)
    tensors = read_shard(path)
    base = replace(tensors["base"], addition=Addition(tensors["left"], tensors["right"], 1.5))
    with TensorReader(spans_of(base, 4 * 77)) as reader:
        found = b"".join(bytes(reader.whole(index)) for index in range(len(reader.spans)))
    assert torch.equal(
        torch.frombuffer(bytearray(found), dtype=torch.float32).view(rows, 50), left @ right * 1.5
    )


def rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        change(tensors)
        save_file(tensors, adapter / WEIGHTS)

    return spoil


def configure(**fields: Any) -> Callable[[Path], None]:
    def spoil(adapter: Path) -> None:
        path = adapter / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return spoil


FIRST = "base_model.model.transformer.h.0.self_attention.query_key_value.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda adapter: (adapter / CONFIG).unlink(), "is no adapter"),
    "no weights": (lambda adapter: (adapter / WEIGHTS).unlink(), "has no weights of an adapter"),
    "no JSON": (lambda adapter: (adapter / CONFIG).write_text("{"), CONFIG),
    "a list": (lambda adapter: (adapter / CONFIG).write_text("[]"), CONFIG),
    "another kind": (configure(peft_type="IA3"), "only LORA can be merged"),
    "DoRA": (configure(use_dora=True), "use_dora is set"),
    "a later field": (configure(use_xyz={"a": 1}), "use_xyz is set"),
    "whole modules": (configure(modules_to_save=["lm_head"]), "whole modules were trained"),
    "another base": (configure(init_lora_weights="pissa_niter_16"), "changed the model's own weights"),
    "a hostile pattern": (configure(alpha_pattern={"(a+)+$": 3}), "regular expressions"),
    "no rank": (configure(r=0), "positive numbers"),
    "another rank": (configure(r=4), "which adapter_config.json does not say"),
    "a tensor is gone": (rewrite(lambda tensors: tensors.pop(FIRST)), "does not know what it does to"),
    "a tensor too many": (
        rewrite(lambda tensors: tensors.update(x=torch.ones(1))),
        "does not know its tensor x",
    ),
    "another shape": (
        rewrite(lambda tensors: tensors.update({FIRST: torch.ones(8, 60)})),
        "expected [8, 64]",
    ),
    "no tensors": (lambda adapter: save_file({}, adapter / WEIGHTS), "holds no tensors"),
    "modules that are not meant": (configure(target_modules=["dense"]), "does not name that"),
    "blocks that are not meant": (configure(layers_to_transform=[1]), "does not name that"),
    "a module twice": (
        rewrite(
            lambda tensors: tensors.update(
                {key.replace("transformer.", ""): tensor.clone() for key, tensor in tensors.items()}
            )
        ),
        "a module twice",
    ),
    "integers": (
        rewrite(lambda tensors: tensors.update({FIRST: torch.ones(8, 64, dtype=torch.int8)})),
        "is I8",
    ),
    "another model's": (
        rewrite(lambda tensors: tensors.update({FIRST.replace("h.0", "h.9"): tensors.pop(FIRST)})),
        "does not know what it does to",
    ),
    "cut off": (
        lambda adapter: (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-5]),
        WEIGHTS,
    ),
}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("adapted")
    return make(base / "source"), make_adapter(base / "source", base / "adapter")


@pytest.mark.parametrize(("spoil", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_known_is_refused_in_one_sentence(
    adapted: tuple[Path, Path], tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    source, adapter = adapted
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    spoil(copy)
    assert said in refused("convert", source, tmp_path / "out", "--adapter", copy)
    assert not (tmp_path / "out").exists()
