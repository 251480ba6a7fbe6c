"""Slices of a checkpoint: together they are its bytes, each is made, resumed, verified and repaired alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runner.errors import BloomdeskError
from runner.format.coded import LOSSLESS, PLAIN
from runner.format.layout import part_specs
from runner.format.manifest import load_manifest
from runner.format.quantised import FORMS
from runner.format.slices import Slice, even
from tests.support.commands import refused, run
from tests.support.lossless import content, flip, interrupt_at, make
from toolkit.commands.convert import convert, plan_conversion
from toolkit.commands.export import export
from toolkit.commands.placement import placed
from toolkit.commands.repair import repair
from toolkit.commands.verify import verify

BLOCK = "block_01.safetensors"
Sliced = Callable[[str, tuple[int, ...]], list[Path]]


@pytest.fixture(scope="module")
def sliced(forms: Path, tmp_path_factory: pytest.TempPathFactory) -> Sliced:
    """The directories of all slices of a form; copy them before changing them."""
    base = tmp_path_factory.mktemp("slices")

    def made(form: str, shares: tuple[int, ...]) -> list[Path]:
        found = [base / f"{form}-{index}-{shares}" for index in range(len(shares))]
        for index, directory in enumerate(found):
            if not directory.exists():
                convert(forms / "source", directory, form=form, own=Slice(index, shares))
        return found

    return made


def joined(directories: list[Path], file: str, name: str) -> torch.Tensor:
    return torch.cat([load_file(directory / file)[name] for directory in directories])


@pytest.mark.parametrize("form", [form for form in FORMS if form != LOSSLESS])
@pytest.mark.parametrize("shares", [(1,), (2, 1), even(9)])
def test_rows_of_all_slices_are_the_whole_matrices(
    forms: Path, sliced: Sliced, form: str, shares: tuple[int, ...]
) -> None:
    directories = sliced(form, shares)
    for spec in part_specs(load_manifest(forms / form).model):
        for name, tensor in load_file(forms / form / spec.file).items():
            is_matrix = tensor.dim() == 2
            found = joined(directories if is_matrix else directories[:1], spec.file, name)
            assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("shares", [(1,), (2, 1), even(9)])
def test_row_groups_of_all_slices_are_those_of_the_whole(
    forms: Path, sliced: Sliced, shares: tuple[int, ...]
) -> None:
    directories = sliced(LOSSLESS, shares)
    spec = part_specs(load_manifest(forms / LOSSLESS).model)[1]
    for name in spec.matrices:
        whole = load_file(forms / LOSSLESS / spec.file)[name]
        assert torch.equal(joined(directories, spec.file, name), whole)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shares", [(1,), (2, 1), even(9)])
def test_each_slice_is_sound_and_knows_the_whole(
    forms: Path, sliced: Sliced, form: str, shares: tuple[int, ...]
) -> None:
    whole = load_manifest(forms / form)
    for index, directory in enumerate(sliced(form, shares)):
        manifest = load_manifest(directory)
        assert manifest.slice == Slice(index, shares) and manifest.places == ()
        assert manifest.fingerprint == whole.fingerprint
        assert manifest.source_fingerprint == whole.source_fingerprint
        assert verify(directory).sound


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of", [PLAIN, LOSSLESS])
def test_a_prepared_directory_gives_the_same_slice(
    forms: Path, sliced: Sliced, tmp_path: Path, of: str, form: str
) -> None:
    convert(forms / of, tmp_path / "out", form=form, own=Slice(1, (2, 1)))
    assert content(tmp_path / "out") == content(sliced(form, (2, 1))[1])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_and_odd_heads(tmp_path: Path, dtype: str) -> None:
    source = make(tmp_path / "source", dtype=dtype, hidden_size=6, heads=2, vocab_size=37)
    convert(source, tmp_path / "whole")
    found = [tmp_path / str(index) for index in range(3)]
    for index, directory in enumerate(found):
        convert(source, directory, own=Slice(index, even(3)))
    for name, tensor in load_file(tmp_path / "whole" / BLOCK).items():
        if tensor.dim() == 2:
            assert torch.equal(joined(found, BLOCK, name), tensor)


@pytest.mark.parametrize("form", FORMS)
def test_directories_made_together_are_those_made_alone(
    forms: Path, sliced: Sliced, tmp_path: Path, form: str
) -> None:
    here = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    summary = convert(forms / "source", here[0], form=form, also=here[1:], shares=(1, 2, 1))
    assert len(summary.written) == 5
    for index, directory in enumerate(here):
        manifest = load_manifest(directory)
        assert manifest.slice == Slice(index, (1, 2, 1))
        assert manifest.places == tuple(map(str, here))
        expected = load_manifest(sliced(form, (1, 2, 1))[index])
        assert manifest.parts == expected.parts and verify(directory).sound
    assert convert(forms / "source", here[0], form=form, also=here[1:], shares=(1, 2, 1)).written == ()


@pytest.mark.parametrize("form", [PLAIN, "int4"])
def test_an_interrupted_conversion_goes_on(forms: Path, tmp_path: Path, form: str) -> None:
    here = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(KeyboardInterrupt):
        convert(forms / "source", here[0], interrupt_at(BLOCK), form=form, also=here[1:])
    assert all(
        list(load_manifest(each).parts) == ["embedding.safetensors", "block_00.safetensors"] for each in here
    )
    # The second disk was replaced by an empty one.
    shutil.rmtree(here[1])
    summary = convert(forms / "source", here[0], form=form, also=here[1:])
    assert len(summary.written) == 5 and all(verify(each).sound for each in here)
    assert load_manifest(here[0]).fingerprint == load_manifest(forms / form).fingerprint


@pytest.mark.parametrize("form", FORMS)
def test_a_lone_slice_is_repaired(forms: Path, sliced: Sliced, tmp_path: Path, form: str) -> None:
    directory = Path(shutil.copytree(sliced(form, (2, 1))[1], tmp_path / "out"))
    flip(directory / BLOCK, -1)
    (directory / "final_layernorm.safetensors").unlink()
    assert {item.file for item in verify(directory).damage} == {BLOCK, "final_layernorm.safetensors"}
    done = repair(directory, forms / "source")
    assert set(done.parts) == {BLOCK, "final_layernorm.safetensors"}
    assert content(directory) == content(sliced(form, (2, 1))[1])


def test_a_directory_keeps_its_slice(forms: Path, sliced: Sliced, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(sliced(PLAIN, (2, 1))[0], tmp_path / "out"))
    for own in (None, Slice(1, (2, 1)), Slice(0, (1, 1))):
        with pytest.raises(BloomdeskError, match="was started with slice 1/2 of the shares 2,1"):
            convert(forms / "source", directory, own=own)
    assert convert(forms / "source", directory, own=Slice(0, (2, 1))).written == ()


def test_a_slice_is_no_source_of_a_whole(sliced: Sliced, tmp_path: Path) -> None:
    with pytest.raises(BloomdeskError, match="is slice 1/2 of the shares 2,1 alone"):
        convert(sliced(PLAIN, (2, 1))[0], tmp_path / "out", form=LOSSLESS)


def test_other_weights_are_not_mixed(forms: Path, tmp_path: Path) -> None:
    here = [tmp_path / "a", tmp_path / "b"]
    make(tmp_path / "other", seed=5)
    convert(tmp_path / "other", here[1], own=Slice(1, even(2)))
    with pytest.raises(BloomdeskError, match="other weights"):
        convert(forms / "source", here[0], own=Slice(0, even(2)))
        convert(forms / "source", here[0], also=here[1:])


def test_the_source_stays_while_slices_are_missing(forms: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(forms / "source", tmp_path / "source"))
    lone = placed(tmp_path / "a", Slice(0, even(2)))
    with pytest.raises(BloomdeskError, match="other slices"):
        plan_conversion(source, tmp_path / "a", delete_source=True, placement=lone)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--slice", "3/2"], "there is no slice 3 of 2"),
        (["--slice", "0/2"], "there is no slice 0 of 2"),
        (["--slice", "half"], "is no slice"),
        (["--slice", "1/2", "--shares", "1"], "1 shares for 2 slices"),
        (["--slice", "1/2", "--shares", "1,x"], "are no shares"),
        (["--slice", "1/2", "--shares", "1,0"], "share must be"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    forms: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    assert words in refused("convert", forms / "source", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_the_command_makes_a_slice(forms: Path, sliced: Sliced, tmp_path: Path) -> None:
    run("convert", forms / "source", tmp_path / "out", "--slice", "2/2", "--shares", "2,1", "--form", "int8")
    assert content(tmp_path / "out") == content(sliced("int8", (2, 1))[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shares", [(2, 1), even(9)])
def test_slices_are_exported_as_the_whole_is(
    forms: Path, sliced: Sliced, tmp_path: Path, form: str, shares: tuple[int, ...]
) -> None:
    first, *others = sliced(form, shares)
    export(first, tmp_path / "hub", also=others)
    export(forms / form, tmp_path / "expected")
    assert content(tmp_path / "hub") == content(tmp_path / "expected")


def test_an_export_names_the_slice_that_is_damaged(sliced: Sliced, tmp_path: Path) -> None:
    first, second = sliced(LOSSLESS, (2, 1))
    second = Path(shutil.copytree(second, tmp_path / "second"))
    with pytest.raises(BloomdeskError, match="the others are needed: 2/2"):
        export(first, tmp_path / "hub")
    flip(second / BLOCK, (second / BLOCK).stat().st_size // 2)
    with pytest.raises(BloomdeskError, match=f"{second / BLOCK} is damaged"):
        export(first, tmp_path / "hub", also=[second])
    assert not (tmp_path / "hub" / "model-00003-of-00005.safetensors").exists()
