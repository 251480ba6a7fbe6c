"""Sources of several dtypes: one dtype comes out, the one in which transformers loads them, rounded as it rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runner
from runner.errors import BloomdeskError
from tests.support.oracle import (
    State,
    assert_runs_as,
    expected_of,
    plain_source,
    transformers_model,
    use_own_arithmetic,
    write_source,
)
from toolkit.commands.convert import convert
from toolkit.commands.export import export
from toolkit.commands.repair import repair
from toolkit.commands.verify import verify


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A source whose float32 numbers are no bfloat16 or float16 ones."""
    source = tmp_path_factory.mktemp("plain") / "source"
    return source, plain_source(source, "float32")


@pytest.fixture(autouse=True)
def own_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_arithmetic(monkeypatch)


def cast(matrices: torch.dtype, vectors: torch.dtype) -> Callable[[State], State]:
    def mixed(state: State) -> State:
        return {key: each.to(matrices if each.dim() == 2 else vectors) for key, each in state.items()}

    return mixed


def reversed_order(state: State) -> State:
    return {key: state[key] for key in reversed(state)}


F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
MIXED: dict[str, Callable[[State], State]] = {
    "matrices bf16": cast(BF16, F32),
    "matrices f16": cast(F16, F32),
    "vectors bf16": cast(F32, BF16),
    "f16 and bf16": cast(F16, BF16),
    "bf16 and f16": cast(BF16, F16),
    "vectors f64": cast(BF16, F64),
    "one bias alone": lambda state: {**cast(BF16, BF16)(state), "ln_f.bias": state["ln_f.bias"]},
    "all f32": lambda state: state,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "config says nothing": {},
    "config says float16": {"torch_dtype": "float16"},
    "config says bfloat16": {"dtype": "bfloat16"},
    "config says both": {"dtype": "float32", "torch_dtype": "float16"},
}
SAVED: dict[str, dict[str, Any]] = {"safetensors": {}, "bin": {"pickle_protocol": 2}}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", MIXED)
def test_the_choice_of_transformers(plain, tmp_path: Path, form: str, config: str, saved: str) -> None:
    state = MIXED[form](plain[1])
    source = write_source(tmp_path / "source", plain[0], state, CONFIGS[config], **SAVED[saved])
    model = transformers_model(source)
    if model.dtype == F64:
        with pytest.raises(BloomdeskError, match="the dtype F64 is none of"):
            convert(source, tmp_path / "bloom")
        return
    done = convert(source, tmp_path / "bloom")
    assert_runs_as(tmp_path / "bloom", expected_of(model))
    others = {tensor.dtype for tensor in state.values()} - {model.dtype}
    assert len(done.notes) == len(others)
    assert all(" rounded to " in note or " widened to " in note for note in done.notes)


@pytest.mark.parametrize("order", [dict, reversed_order])
def test_the_first_tensor_of_a_pickle(plain, tmp_path: Path, order: Callable[[State], State]) -> None:
    state = order(cast(BF16, F32)(plain[1]))
    source = write_source(tmp_path / "source", plain[0], state, pickle_protocol=2)
    convert(source, tmp_path / "bloom")
    assert_runs_as(tmp_path / "bloom", expected_of(transformers_model(source)))


def test_a_view_is_rounded(plain, tmp_path: Path) -> None:
    state = {
        key: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for key, tensor in plain[1].items()
    }
    config = {"dtype": "bfloat16"}
    source = write_source(tmp_path / "source", plain[0], state, config, pickle_protocol=2)
    convert(source, tmp_path / "bloom", form="lossless")
    assert_runs_as(tmp_path / "bloom", expected_of(transformers_model(source)))


@pytest.mark.parametrize(("asked", "dtype"), [("BF16", BF16), ("F16", F16), ("F32", F32)])
def test_another_dtype_can_be_chosen(plain, tmp_path: Path, asked: str, dtype: torch.dtype) -> None:
    source = write_source(tmp_path / "source", plain[0], cast(F16, F32)(plain[1]), {"dtype": "bfloat16"})
    convert(source, tmp_path / "bloom", dtype=asked)
    model = transformers_model(source).to(dtype)
    reference = type(model).from_pretrained(source, dtype=dtype).eval()
    assert_runs_as(tmp_path / "bloom", expected_of(reference))
    # What is exported is loaded in that dtype, too.
    export(tmp_path / "bloom", tmp_path / "exported")
    again = transformers_model(tmp_path / "exported")
    assert again.dtype == dtype
    assert_runs_as(tmp_path / "bloom", expected_of(again))


def test_what_was_rounded_is_compared_after_the_same_rounding(plain, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", plain[0], cast(F16, F32)(plain[1]), {"dtype": "bfloat16"})
    bloom = tmp_path / "bloom"
    convert(source, bloom, dtype="F16")
    before = {
        path.name: path.read_bytes() for path in bloom.iterdir() if path.suffix in (".safetensors", ".json")
    }
    assert verify(bloom).sound
    # Started again without --dtype, it goes on in the dtype that it has.
    (bloom / "block_01.safetensors").unlink()
    convert(source, bloom)
    part = bloom / "block_00.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\x7f")
    repair(bloom, source)
    assert {name: (bloom / name).read_bytes() for name in before} == before
    with pytest.raises(BloomdeskError, match="was started in F16"):
        convert(source, bloom, dtype="BF16")
    assert runner.load(bloom).weights.model.dtype == "F16"


@pytest.mark.parametrize("dtype", ["float64", "int8", "float8_e4m3fn", 7])
def test_a_config_with_another_dtype(plain, tmp_path: Path, dtype: Any) -> None:
    source = write_source(tmp_path / "source", plain[0], plain[1], {"dtype": dtype})
    with pytest.raises(BloomdeskError, match=r"config\.json: the dtype .* is none of BF16"):
        convert(source, tmp_path / "bloom")
    convert(source, tmp_path / "bloom", dtype="F32")
