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
