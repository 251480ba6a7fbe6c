"""Passes with weights in fewer bits: the bits of transformers on what an export has, in any company and any RAM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import runner
from runner.errors import BloomdeskError
from runner.format.manifest import load_manifest
from runner.format.quantised import QUANTISED_FORMS, SCALES_SUFFIX
from runner.format.safetensors import read_header
from runner.weights import chunks
from tests.support.lossless import flip, make
from tests.support.oracle import assert_runs_as, expected_of, transformers_model, use_own_arithmetic
from tests.support.streaming import IDS, SMALL_CHUNK, arrangement, logits_of, opened, promptly
from toolkit.commands.convert import convert
from toolkit.commands.export import export

SHAPES = {"whole groups": {"hidden_size": 256, "heads": 8}, "cut groups": {"hidden_size": 48, "heads": 6}}
FORMS = pytest.mark.parametrize("form", QUANTISED_FORMS)


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A directory of a form, a dtype and a shape, made once."""
    base = tmp_path_factory.mktemp("forms")

    def of(form: str, dtype: str = "bfloat16", shape: str = "cut groups") -> Path:
        out, source = base / f"{form}-{dtype}-{shape}", base / f"{dtype}-{shape}"
        if not source.exists():
            make(source, dtype=dtype, **{**SHAPES[shape], "blocks": 2, "vocab_size": 1200})
        if not out.exists():
            convert(source, out, form=form)
        return out

    return of


@pytest.mark.slow
@FORMS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_tokens_are_those_of_transformers_on_the_export(
    bloom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, dtype: str, shape: str
) -> None:
    directory = bloom(form, dtype, shape)
    export(directory, tmp_path / "hub")
    use_own_arithmetic(monkeypatch)
    assert_runs_as(directory, expected_of(transformers_model(tmp_path / "hub")))


@pytest.mark.slow
@FORMS
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("largest", [SMALL_CHUNK, 32 * 2**20])
def test_logits_have_the_same_bits_for_every_budget(
    bloom, logits_in_ram, monkeypatch: pytest.MonkeyPatch, form: str, dtype: str, largest: int
) -> None:
    directory = bloom(form, dtype)
    wanted = logits_in_ram(directory)
    monkeypatch.setattr(chunks, "LARGEST_CHUNK", largest)
    model = opened(directory, readers=2, threads=2)
    for name in ("nothing", "half", "resident", "first"):
        shares = arrangement(model.weights, name)
        assert torch.equal(promptly(lambda shares=shares: logits_of(model, *shares)), wanted), name


@pytest.mark.slow
@FORMS
def test_prompts_together_have_the_tokens_that_they_have_alone(bloom, form: str) -> None:
    model = runner.load(bloom(form))
    prompts = [[5, 6, 7], list(range(9, 29)), [250]]
    alone = [list(model.generate(ids, max_new_tokens=9)) for ids in prompts]
    together = {each.request.number: each.ids for each in model.generate_all(prompts, max_new_tokens=9)}
    assert [together[number] for number in range(len(prompts))] == alone
    plain = [list(model.generate(ids, max_new_tokens=9, speculate="off")) for ids in prompts]
    assert plain == alone


@FORMS
def test_a_part_that_is_cut_is_named(bloom, tmp_path: Path, form: str) -> None:
    directory = bloom(form)
    manifest = load_manifest(directory)
    (tmp_path / "bloom").mkdir()
    for path in directory.iterdir():
        (tmp_path / "bloom" / path.name).write_bytes(path.read_bytes())
    block = tmp_path / "bloom" / "block_01.safetensors"
    block.write_bytes(block.read_bytes()[:-1])
    with pytest.raises(BloomdeskError, match=r"block_01.safetensors has .* bytes, expected"):
        runner.load(tmp_path / "bloom")
    assert manifest.fingerprint == runner.load(directory).weights.fingerprint


@FORMS
def test_damaged_scales_change_numbers_and_nothing_else(bloom, tmp_path: Path, form: str) -> None:
    """Only verify tells, as with plain weights; no memory is touched that is not theirs."""
    directory = bloom(form)
    (tmp_path / "bloom").mkdir()
    for path in directory.iterdir():
        (tmp_path / "bloom" / path.name).write_bytes(path.read_bytes())
    block = tmp_path / "bloom" / "block_01.safetensors"
    entry = read_header(block).tensors["mlp.dense_h_to_4h.weight" + SCALES_SUFFIX]
    for position in range(entry.start, entry.end, 7):
        flip(block, position, 255)
    model = runner.load(tmp_path / "bloom")
    assert model.forward(IDS, model.cache(len(IDS)), all_rows=True).shape[0] == len(IDS)
