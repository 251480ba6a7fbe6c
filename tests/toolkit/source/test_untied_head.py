"""A head that is not the embedding: a part of its own, used by all commands and by the runner."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import runner
from runner.errors import BloomdeskError
from runner.estimate.forecast import chunk_bytes, disk_bytes, weight_bytes
from runner.format.manifest import load_manifest
from runner.format.slices import Slice
from tests.support.oracle import (
    IDS,
    State,
    assert_runs_as,
    expected_of,
    plain_source,
    transformers_model,
    use_own_arithmetic,
    write_source,
)
from tests.support.ranks import assert_as_one
from toolkit.commands.convert import convert
from toolkit.commands.export import export
from toolkit.commands.info import inspect
from toolkit.commands.repair import repair
from toolkit.commands.verify import verify

HEAD = "lm_head.weight"
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "config says so": ({"tie_word_embeddings": False}, ""),
    "the values differ": ({}, "transformer."),
    "config says otherwise": ({"tie_word_embeddings": True}, ""),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    source = tmp_path_factory.mktemp("plain") / "source"
    state = plain_source(source)
    noise = torch.randn(300, 48, generator=torch.Generator().manual_seed(7)) * 0.05
    return source, {**state, HEAD: noise.bfloat16()}


@pytest.fixture(autouse=True)
def own_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_arithmetic(monkeypatch)


def source_of(
    plain: tuple[Path, State], directory: Path, kind: str = "config says so", **saving: Any
) -> Path:
    config, prefix = KINDS[kind]
    state = {key if key == HEAD else prefix + key: tensor for key, tensor in plain[1].items()}
    return write_source(directory, plain[0], state, config, **saving)


@pytest.mark.parametrize("form", ["plain", "lossless"])
@pytest.mark.parametrize("saved", [{}, {"pickle_protocol": 2}], ids=["safetensors", "bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_that_of_transformers(plain, tmp_path: Path, kind: str, saved: dict, form: str) -> None:
    source = source_of(plain, tmp_path / "source", kind, **saved)
    convert(source, tmp_path / "bloom", form=form)
    expected = expected_of(transformers_model(source))
    assert_runs_as(tmp_path / "bloom", expected)
    export(tmp_path / "bloom", tmp_path / "exported")
    again, _ = expected_of(transformers_model(tmp_path / "exported"))
    assert torch.equal(again, expected[0])
    assert not convert(source, tmp_path / "bloom", form=form).written


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_one_in_fewer_bits_is_that_of_transformers_on_the_export(plain, tmp_path: Path, form: str) -> None:
    convert(source_of(plain, tmp_path / "source"), tmp_path / "bloom", form=form)
    export(tmp_path / "bloom", tmp_path / "exported")
    rounded = transformers_model(tmp_path / "exported")
    assert_runs_as(tmp_path / "bloom", expected_of(rounded))
    # A head is int8 in both forms: a weight errs by half of a 127th of the largest, and by bfloat16's rounding.
    error = (rounded.lm_head.weight - plain[1][HEAD]).abs().max()
    assert 0 < error < plain[1][HEAD].abs().max() / 100


@pytest.mark.parametrize("form", ["plain", "int4"])
def test_slices_of_one_on_several_disks_give_the_same(plain, tmp_path: Path, form: str) -> None:
    source = source_of(plain, tmp_path / "source")
    disks = [tmp_path / name for name in "abc"]
    convert(source, disks[0], form=form, also=disks[1:], shares=(2, 1, 1))
    assert all((each / "head.safetensors").exists() and verify(each).sound for each in disks)
    convert(source, tmp_path / "bloom", form=form)
    export(tmp_path / "bloom", tmp_path / "exported")
    assert_runs_as(disks[0], expected_of(transformers_model(tmp_path / "exported")))


@pytest.mark.slow
def test_slices_of_one_on_several_machines_give_the_same(plain, tmp_path: Path) -> None:
    source = source_of(plain, tmp_path / "source")
    slices = [tmp_path / "first", tmp_path / "second"]
    convert(source, tmp_path / "bloom", form="int4")
    for index, directory in enumerate(slices):
        convert(source, directory, form="int4", own=Slice(index, (2, 1)))
    assert_as_one(
        tmp_path / "bloom", slices, tmp_path, "generate", "hello there", "--max-new-tokens", "8", "--json"
    )


def test_one_that_says_so_and_has_none_is_refused(plain, tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in plain[1].items() if key != HEAD}
    source = write_source(tmp_path / "source", plain[0], state, {"tie_word_embeddings": False})
    with pytest.raises(BloomdeskError, match=r"missing: lm_head\.weight"):
        convert(source, tmp_path / "bloom")


@pytest.mark.parametrize("form", ["plain", "lossless"])
def test_verify_repair_and_the_format_version(plain, tmp_path: Path, form: str) -> None:
    bloom = tmp_path / "bloom"
    source = source_of(plain, tmp_path / "source")
    convert(source, bloom, form=form)
    manifest = load_manifest(bloom)
    body = json.loads((bloom / "manifest.json").read_text())
    assert manifest.format_version == body["format_version"] == 3
    assert list(manifest.parts)[-1] == "head.safetensors" and verify(bloom).sound
    head = bloom / "head.safetensors"
    sound = head.read_bytes()
    head.write_bytes(sound[:-40] + bytes(40))
    assert {damage.file for damage in verify(bloom).damage} == {"head.safetensors"}
    repair(bloom, source)
    assert head.read_bytes() == sound
    head.unlink()
    with pytest.raises(BloomdeskError):
        runner.load(bloom)
    convert(source, bloom, form=form)
    assert head.read_bytes() == sound


def test_a_tied_model_is_recorded_as_before(plain, tmp_path: Path) -> None:
    convert(plain[0], tmp_path / "bloom")
    body = json.loads((tmp_path / "bloom" / "manifest.json").read_text())
    assert body["format_version"] == 1 and "tie_word_embeddings" not in body["model"]


@pytest.mark.parametrize("ram", ["resident", "streamed"])
def test_memory_and_figures(plain, tmp_path: Path, ram: str) -> None:
    bloom = tmp_path / "bloom"
    convert(source_of(plain, tmp_path / "source"), bloom)
    model = runner.load(bloom)
    shape, weights = model.weights.model, model.weights
    chunks = [chunk.nbytes for chunk in weights.stream.chunks]
    matrix = 300 * 48 * 2
    assert chunks == chunk_bytes(shape) and chunks[-1] == matrix
    assert (
        weights.nbytes == weight_bytes(shape) == sum(tensor.nbytes for tensor in plain[1].values()) - matrix
    )
    parts = sum(part.size for part in load_manifest(bloom).parts.values())
    assert disk_bytes(shape) == pytest.approx(parts, rel=0.2)
    found = inspect(bloom)
    assert found.pass_bytes == weights.nbytes and found.ratio == 1
    if ram == "streamed":
        weights.stream.arrange(frozenset(), 2)
    expected, _ = expected_of(transformers_model(tmp_path / "source"))
    for _ in range(2):
        logits = model.forward(IDS, model.new_cache(len(IDS)), all_rows=True)
        assert torch.equal(logits, expected)


def test_an_interrupted_conversion_goes_on(plain, tmp_path: Path) -> None:
    source, bloom = source_of(plain, tmp_path / "source", "the values differ"), tmp_path / "bloom"
    convert(source, bloom)
    whole = {path.name: path.read_bytes() for path in bloom.glob("*.*")}
    for name in ("embedding.safetensors", "head.safetensors"):
        shutil.copytree(bloom, tmp_path / name)
        (tmp_path / name / name).unlink()
        convert(source, tmp_path / name)
        assert {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.*")} == whole
