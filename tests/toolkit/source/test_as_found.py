"""Checkpoints as training code leaves them: each gives what transformers computes, bit for bit, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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

HEAD, MATRIX = "lm_head.weight", "word_embeddings.weight"
BUFFERS = ("bias", "masked_bias", "causal_mask", "scale_mask_softmax.causal_mask")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    source = tmp_path_factory.mktemp("plain") / "source"
    return source, plain_source(source)


@pytest.fixture(autouse=True)
def own_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_arithmetic(monkeypatch)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def without(state: State, *keys: str) -> State:
    return {key: tensor for key, tensor in state.items() if key not in keys}


def buffers(state: State) -> State:
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    return {**state, **{f"h.{block}.self_attention.{name}": mask for block in (0, 1) for name in BUFFERS}}


def with_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in a view whose elements lie apart, column by column."""
    wide = torch.zeros(*tensor.shape[::-1], 2, dtype=tensor.dtype)
    wide[..., 1] = tensor.permute(*range(tensor.dim())[::-1])
    return wide[..., 1].permute(*range(tensor.dim())[::-1])


# What transformers loads too.
READ_BY_BOTH: dict[str, Callable[[State], State]] = {
    "as it is": lambda state: state,
    "transformer.": lambda state: prefixed(state, "transformer."),
    "buffers": buffers,
    "buffers of numbers": lambda state: {**state, "h.1.self_attention.masked_bias": torch.tensor(-1e4)},
    "only the head": lambda state: {**without(state, MATRIX), HEAD: state[MATRIX]},
    "only the head, transformer.": lambda state: {
        **prefixed(without(state, MATRIX), "transformer."),
        HEAD: state[MATRIX],
    },
    "the head again": lambda state: {**state, HEAD: state[MATRIX]},
    "the head of a wrapper": lambda state: {**state, "lm_head.0.weight": state[MATRIX]},
}
SAVED: dict[str, dict[str, Any]] = {
    "safetensors": {},
    **{f"pickle {number}": {"pickle_protocol": number} for number in (2, 3, 4, 5)},
}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("form", READ_BY_BOTH)
def test_what_transformers_reads(plain, tmp_path: Path, form: str, saved: str) -> None:
    source = write_source(tmp_path / "source", plain[0], READ_BY_BOTH[form](plain[1]), **SAVED[saved])
    done = convert(source, tmp_path / "bloom")
    if "pickle" in saved:
        # torch's careful reader stops at protocol 3.
        again = READ_BY_BOTH[form](plain[1])
        source = write_source(tmp_path / "again", plain[0], again, pickle_protocol=2)
    assert_runs_as(tmp_path / "bloom", expected_of(transformers_model(source)))
    assert [note for note in done.notes if "buffer" in note] == list(done.notes)
    assert bool(done.notes) == form.startswith("buffers")


STRIDES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "apart": with_strides,
    "within a larger one": lambda tensor: torch.nn.functional.pad(tensor, (3, 5))[..., 3:-5],
    "every second row": lambda tensor: tensor.repeat_interleave(2, 0)[::2],
    "far apart": lambda tensor: torch.nn.functional.pad(tensor, (0, 40_000))[..., : tensor.shape[-1]],
}


@pytest.mark.parametrize("lossless", ["plain", "lossless"])
@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(plain, tmp_path: Path, strides: str, lossless: str) -> None:
    state = {key: STRIDES[strides](tensor) for key, tensor in plain[1].items()}
    assert not any(tensor.is_contiguous() for tensor in state.values() if tensor.dim() == 2)
    source = write_source(tmp_path / "source", plain[0], state, pickle_protocol=2)
    convert(source, tmp_path / "bloom", form=lossless)
    assert_runs_as(tmp_path / "bloom", expected_of(transformers_model(source)))


def test_an_expanded_tensor(plain, tmp_path: Path) -> None:
    state = {**plain[1], "ln_f.bias": torch.tensor([0.5]).bfloat16().expand(48)}
    source = write_source(tmp_path / "source", plain[0], state, pickle_protocol=2)
    convert(source, tmp_path / "bloom")
    assert_runs_as(tmp_path / "bloom", expected_of(transformers_model(source)))


# What transformers does not unwrap: the reference is what is inside.
WRAPPED: dict[str, Callable[[State], dict[str, Any]]] = {
    "module.": lambda state: prefixed(state, "module."),
    "module.transformer.": lambda state: prefixed(state, "module.transformer."),
    "module., with a head": lambda state: prefixed(
        {**prefixed(state, "transformer."), HEAD: state[MATRIX]}, "module."
    ),
    **{f"under {name}": lambda state, name=name: {name: state} for name in ("model", "state_dict", "module")},
    "beside a training state": lambda state: {
        "epoch": 3,
        "optimizer": {"state": {0: {"step": 7}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        "model": prefixed(state, "module."),
        "name": "a run",
    },
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("form", WRAPPED)
def test_wrappers_are_taken_off(plain, tmp_path: Path, form: str, protocol: int) -> None:
    source = write_source(tmp_path / "source", plain[0], WRAPPED[form](plain[1]), pickle_protocol=protocol)
    convert(source, tmp_path / "bloom")
    assert_runs_as(tmp_path / "bloom", expected_of(transformers_model(plain[0])))


REFUSED: dict[str, tuple[Callable[[State], dict[str, Any]], str]] = {
    "module. before some": (
        lambda state: {**state, "module.ln_f.weight": torch.ones(48)},
        "1 tensor that no BLOOM",
    ),
    "another prefix": (lambda state: prefixed(state, "base_model."), "that no BLOOM of this shape has"),
    "two wrapped states": (lambda state: {"model": state, "state_dict": state}, "'model' and one under"),
    "another wrapper": (lambda state: {"weights": state}, "under 'weights' it holds no tensor"),
    "two wrappers": (lambda state: {"model": {"state_dict": state}}, "under 'state_dict' it holds no tensor"),
    "the name before its dtype": (
        lambda state: {**state, "h.0.mask": torch.ones(2, dtype=torch.bool)},
        "no BLOOM of this shape has: h.0.mask",
    ),
    "a buffer of a block that is not there": (
        lambda state: {**state, "h.7.self_attention.bias": torch.ones(2)},
        "h.7.self_attention.bias",
    ),
    "a wrapper's head that differs": (
        lambda state: {**state, "lm_head.0.weight": state[MATRIX] * 2},
        "lm_head.0.weight differs from the embedding",
    ),
    "a wrapper's head alone": (
        lambda state: {**without(state, MATRIX), "lm_head.0.weight": state[MATRIX]},
        "missing: word_embeddings.weight",
    ),
    "two heads": (
        lambda state: {**state, HEAD: state[MATRIX], "lm_head.0.weight": state[MATRIX]},
        "there twice",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_refused_in_one_sentence(plain, tmp_path: Path, form: str) -> None:
    change, words = REFUSED[form]
    source = write_source(tmp_path / "source", plain[0], change(plain[1]), pickle_protocol=2)
    with pytest.raises(BloomdeskError) as caught:
        convert(source, tmp_path / "bloom")
    assert words in caught.value.message and "\n" not in caught.value.message
    assert not (tmp_path / "bloom").exists() or not list((tmp_path / "bloom").glob("*.safetensors"))
