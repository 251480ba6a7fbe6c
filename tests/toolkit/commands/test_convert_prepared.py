"""Other forms of a prepared directory: the same bytes as from the checkpoint, of sound parts alone, read once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from runner.errors import BloomdeskError
from runner.format.coded import LOSSLESS, PLAIN
from runner.format.layout import MANIFEST
from runner.format.manifest import load_manifest
from runner.format.quantised import FORMS, INT4_FORM, INT8_FORM
from runner.format.safetensors import read_header
from scripts.fakehub.server import LocalHub
from tests.support.commands import refused, run
from tests.support.lossless import content, flip, interrupt_at, make
from tests.toolkit.source.test_shards import LAYOUTS
from toolkit.commands.convert import convert, plan_conversion
from toolkit.commands.download import download
from toolkit.commands.repair import repair
from toolkit.commands.verify import verify

REPO = "me/bloom"
BLOCK = "block_01.safetensors"
EXACT = (PLAIN, LOSSLESS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of", EXACT)
def test_the_bytes_are_those_that_the_checkpoint_gives(
    forms: Path, tmp_path: Path, of: str, form: str
) -> None:
    summary = convert(forms / of, tmp_path / "out", form=form)
    assert len(summary.written) == 5
    assert content(tmp_path / "out") == content(forms / form)
    assert load_manifest(tmp_path / "out").source_fingerprint == load_manifest(forms / of).fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("form", [PLAIN, INT8_FORM, INT4_FORM])
def test_other_dtypes_and_odd_shapes(tmp_path: Path, dtype: str, form: str) -> None:
    source = make(tmp_path / "source", dtype=dtype, hidden_size=6, heads=2, vocab_size=37)
    convert(source, tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "out", form=form)
    convert(source, tmp_path / "expected", form=form)
    assert content(tmp_path / "out") == content(tmp_path / "expected")


@pytest.mark.parametrize("of", EXACT)
def test_an_interruption_is_resumed_from_either(forms: Path, tmp_path: Path, of: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(forms / of, out, interrupt_at(BLOCK), form=INT4_FORM)
    assert len(load_manifest(out).parts) == 2
    (out / "block_00.safetensors").write_bytes(b"cut")
    other = forms / (PLAIN if of == LOSSLESS else LOSSLESS)
    assert len(convert(other, out, form=INT4_FORM).written) == 4
    (out / "block_00.safetensors.changed").unlink()
    assert content(out) == content(forms / INT4_FORM)


@pytest.mark.parametrize("of", EXACT)
@pytest.mark.parametrize("place", ["mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias", None])
def test_a_damaged_part_is_never_converted(forms: Path, tmp_path: Path, of: str, place: str | None) -> None:
    bloom = Path(shutil.copytree(forms / of, tmp_path / "bloom"))
    flip(bloom / BLOCK, read_header(bloom / BLOCK).tensors[place].start + 3 if place else 9)
    with pytest.raises(BloomdeskError, match=f"{BLOCK} is damaged") as caught:
        convert(bloom, tmp_path / "out", form=INT4_FORM)
    assert "bloomdesk repair" in caught.value.hint
    assert BLOCK not in load_manifest(tmp_path / "out").parts and not (tmp_path / "out" / BLOCK).exists()
    repair(bloom, forms / "source")
    convert(bloom, tmp_path / "out", form=INT4_FORM)
    assert content(tmp_path / "out") == content(forms / INT4_FORM)


def test_a_lossless_part_that_cannot_be_decoded(forms: Path, tmp_path: Path) -> None:
    bloom = Path(shutil.copytree(forms / LOSSLESS, tmp_path / "bloom"))
    flip(bloom / BLOCK, read_header(bloom / BLOCK).tensors["mlp.dense_h_to_4h.weight.strips"].start + 13)
    with pytest.raises(BloomdeskError, match=f"{BLOCK} is damaged: mlp.dense_h_to_4h.weight"):
        convert(bloom, tmp_path / "out", form=INT8_FORM)


@pytest.mark.parametrize("form", [LOSSLESS, INT4_FORM])
def test_a_damaged_directory_is_mended_from_another_form(forms: Path, tmp_path: Path, form: str) -> None:
    bloom = Path(shutil.copytree(forms / form, tmp_path / "bloom"))
    flip(bloom / BLOCK, 9000)
    (bloom / "block_02.safetensors").unlink()
    done = repair(bloom, forms / PLAIN)
    assert set(done.parts) == {BLOCK, "block_02.safetensors"}
    assert content(bloom) == content(forms / form)


def test_repo_commit_and_shards_stay_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "repo")
    with LocalHub({REPO: tmp_path / "repo"}) as local:
        monkeypatch.setenv("HF_ENDPOINT", local.endpoint)
        download(REPO, tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "bloom")
        convert(tmp_path / "bloom", tmp_path / "out", form=INT4_FORM)
        manifest = load_manifest(tmp_path / "out")
        assert manifest.source == load_manifest(tmp_path / "bloom").source and manifest.source.repo == REPO
        flip(tmp_path / "out" / BLOCK, 9000)
        # From the Hub, which the prepared directory was not made from directly.
        assert repair(tmp_path / "out").parts == (BLOCK,)
        assert verify(tmp_path / "out").sound


def test_what_cannot_be_converted_is_refused(forms: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for form in (INT8_FORM, INT4_FORM):
        with pytest.raises(BloomdeskError, match=f"were rounded to {form}"):
            convert(forms / form, out)
    with pytest.raises(BloomdeskError, match="is the source itself"):
        convert(forms / PLAIN, forms / PLAIN, form=INT8_FORM)
    with pytest.raises(BloomdeskError, match="not rounded to another dtype"):
        convert(forms / PLAIN, out, dtype="F16")
    for options in ({"delete_source": True}, {"adapter": tmp_path}):
        with pytest.raises(BloomdeskError, match="prepared already"):
            plan_conversion(forms / PLAIN, out, **options)
    half = tmp_path / "half"
    with pytest.raises(KeyboardInterrupt):
        convert(forms / "source", half, interrupt_at(BLOCK))
    with pytest.raises(BloomdeskError, match="is not complete") as caught:
        convert(half, out, form=INT8_FORM)
    assert "bloomdesk convert SRC" in caught.value.hint
    assert not out.exists()


def test_other_weights_are_not_mixed_in(forms: Path, tmp_path: Path) -> None:
    make(tmp_path / "other", LAYOUTS["bloom"], seed=7)
    convert(tmp_path / "other", tmp_path / "bloom")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(forms / PLAIN, out, interrupt_at(BLOCK), form=INT4_FORM)
    before = content(out)
    with pytest.raises(BloomdeskError, match="of other weights than"):
        convert(tmp_path / "bloom", out, form=INT4_FORM)
    assert content(out) == before


def test_the_command(forms: Path, tmp_path: Path) -> None:
    before = {form: content(forms / form) for form in FORMS}
    done = run("convert", forms / LOSSLESS, tmp_path / "out", "--form", "int4")
    assert done.returncode == 0 and "5 parts written" in done.stdout, done
    assert content(tmp_path / "out") == before[INT4_FORM]
    assert "the checkpoint, or its plain or lossless form" in refused(
        "convert", forms / INT4_FORM, tmp_path / "new"
    )
    assert {form: content(forms / form) for form in FORMS} == before


def test_a_damaged_manifest_or_companion_of_the_source_is_said(forms: Path, tmp_path: Path) -> None:
    for file, words in ((MANIFEST, "not a sound manifest"), ("tokenizer.json", "is damaged")):
        bloom = Path(shutil.copytree(forms / PLAIN, tmp_path / file))
        flip(bloom / file, 200)
        with pytest.raises(BloomdeskError, match=words):
            convert(bloom, tmp_path / "out", form=INT4_FORM)
    assert not os.path.lexists(tmp_path / "out")
