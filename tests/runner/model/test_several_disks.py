"""A model on several disks: the bits of one, in every form and any RAM, each disk with readers of its own."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import runner
import runner.generation.memory_plan
from runner.errors import BloomdeskError
from runner.format.quantised import FORMS
from runner.format.slices import Slice, even
from runner.weights import chunks
from runner.weights.chunks import Chunk
from runner.weights.stream import Stream
from tests.support.lossless import make
from tests.support.streaming import IDS, SMALL_CHUNK, arrangement, logits_of, opened, promptly
from toolkit.commands.convert import convert

Spread = Callable[[str, tuple[int, ...]], Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("disks")
    make(base / "source", hidden_size=96, heads=6, vocab_size=1200)
    return base


@pytest.fixture(scope="module")
def whole(world: Path) -> Callable[[str], Path]:
    """The directory of a form that is not spread."""

    def of(form: str) -> Path:
        if not (world / form).exists():
            convert(world / "source", world / form, form=form)
        return world / form

    return of


@pytest.fixture(scope="module")
def spread(world: Path) -> Spread:
    """The first directory of a form that is spread by shares."""

    def of(form: str, shares: tuple[int, ...]) -> Path:
        first, *others = (world / f"{form}-{shares}-{index}" for index in range(len(shares)))
        if not first.exists():
            convert(world / "source", first, form=form, also=others, shares=shares)
        return first

    return of


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shares", [(1, 1), (3, 1), (1, 2, 1), even(9)])
def test_logits_have_the_bits_of_one_disk(
    whole, spread: Spread, logits_in_ram, monkeypatch: pytest.MonkeyPatch, form: str, shares: tuple[int, ...]
) -> None:
    wanted = logits_in_ram(whole(form))
    for largest in (SMALL_CHUNK, 32 * 2**20):
        monkeypatch.setattr(chunks, "LARGEST_CHUNK", largest)
        model = opened(spread(form, shares), threads=2)
        for name in ("nothing", "half", "resident", "first"):
            found = promptly(lambda name=name: logits_of(model, *arrangement(model.weights, name)))  # noqa: B023
            assert torch.equal(found, wanted), name


PROMPTS = [IDS, IDS[:3], [7, 7, 7, 7, 7, 7, 7, 7], [1000]]


def continued(directory: Path, ram: int | None = None, **options: object) -> list[list[int]]:
    model = runner.load(directory)
    found = replace(model, ram=ram or model.ram).generate_all(PROMPTS, max_new_tokens=8, **options)
    return [each.ids for each in sorted(found, key=lambda each: each.request.number)]


def least_ram(directory: Path) -> int:
    """RAM in which no matrix stays, or hardly one."""
    model = runner.load(directory)
    plan = replace(model, ram=2**50).memory_plan(64, 64).request
    streaming = runner.generation.memory_plan.FEWEST_BUFFERS * plan.disk_count * plan.buffer_nbytes
    return plan.process + 4 * plan.cache + 4 * plan.activations + streaming


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{"batch": 1, "speculate": "off"}, {"batch": 3}, {"draft": "itself"}])
def test_texts_are_those_of_one_disk_in_any_company_and_ram(
    whole, spread: Spread, monkeypatch: pytest.MonkeyPatch, form: str, options: dict[str, object]
) -> None:
    wanted = continued(whole(form), batch=1, speculate="off")
    monkeypatch.setattr(chunks, "LARGEST_CHUNK", SMALL_CHUNK)
    monkeypatch.setattr(runner.generation.memory_plan, "MARGIN", 0)
    directory = spread(form, (3, 1))
    draft = {"draft": whole(form)} if "draft" in options else {}
    assert promptly(lambda: continued(directory, **{**options, **draft})) == wanted
    if not draft:
        assert promptly(lambda: continued(directory, least_ram(directory), **options)) == wanted


def test_a_slice_alone_says_what_else_is_needed(spread: Spread, tmp_path: Path) -> None:
    first = spread("plain", (1, 2, 1))
    lone = Path(shutil.copytree(first, tmp_path / "lone"))
    # The others are where they were made.
    assert runner.load(lone).weights.stream.disks[:2] != ()
    here = [tmp_path / str(index) for index in range(3)]
    convert(first.parent / "source", here[0], also=here[1:], shares=(1, 2, 1))
    moved = [each.rename(each.with_suffix(".moved")) for each in here]
    with pytest.raises(BloomdeskError) as error:
        runner.load(moved[0])
    assert error.value.message.endswith(f"are needed: 2/3 (made in {here[1]}), 3/3 (made in {here[2]})")
    assert "--also" in error.value.hint
    with pytest.raises(BloomdeskError, match="3/3"):
        runner.load(moved[0], also=moved[1:2])
    # From any of them.
    found = [runner.load(moved[index], also=moved) for index in range(3)]
    assert {model.weights.fingerprint for model in found} == {runner.load(first).weights.fingerprint}


def test_what_does_not_belong_is_refused(world: Path, whole, spread: Spread, tmp_path: Path) -> None:
    first = spread("plain", (1, 1))
    make(tmp_path / "other", hidden_size=96, heads=6, vocab_size=1200, seed=7)
    convert(tmp_path / "other", tmp_path / "b", own=Slice(1, (1, 1)))
    convert(world / "source", tmp_path / "c", own=Slice(1, (2, 1)))
    convert(world / "source", tmp_path / "d", own=Slice(1, (1, 1)), form="int8")
    for name, words in (
        ("b", "made from other weights"),
        ("c", "of the shares 2,1"),
        ("d", "in the form int8"),
    ):
        with pytest.raises(BloomdeskError, match=words):
            runner.load(first, also=[tmp_path / name])
    with pytest.raises(BloomdeskError, match="holds the whole checkpoint"):
        runner.load(first, also=[whole("plain")])


def test_a_whole_model_has_no_others(whole, spread: Spread) -> None:
    with pytest.raises(BloomdeskError, match="no slice"):
        runner.load(whole("plain"), also=[spread("plain", (1, 1))])


def test_all_disks_are_read_at_once(spread: Spread, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each disk waits until the other one is read, too."""
    monkeypatch.setattr(chunks, "LARGEST_CHUNK", SMALL_CHUNK)
    stream = opened(spread("plain", (1, 1))).weights.stream
    both = threading.Barrier(2, timeout=20)

    def read(chunk: Chunk, view: memoryview | None) -> None:
        both.wait()
        chunk.read(view)

    made = Stream(stream.chunks, 1, read)
    made.arrange(frozenset(), 2)
    # As many of the one as of the other.
    assert made.disks.count(0) == made.disks.count(1)

    def use() -> None:
        for index in range(len(made.chunks)):
            with made.chunk(index):
                pass

    promptly(use)


@pytest.mark.parametrize("shares", [(1, 1), (3, 1), (1, 2, 1)])
def test_a_slow_disk_holds_up_nothing_but_its_own(
    spread: Spread, monkeypatch: pytest.MonkeyPatch, shares: tuple[int, ...]
) -> None:
    """At any place of a pass each disk has given about as much of its bytes as the others."""
    monkeypatch.setattr(chunks, "LARGEST_CHUNK", SMALL_CHUNK)
    stream = opened(spread("plain", shares)).weights.stream
    wholes, so_far = [0] * len(shares), [0] * len(shares)
    for chunk in stream.chunks:
        wholes[chunk.file.disk] += chunk.nbytes
    for chunk in stream.chunks:
        so_far[chunk.file.disk] += chunk.nbytes
        done = [part / whole for part, whole in zip(so_far, wholes, strict=True)]
        assert max(done) - min(done) < 0.1


@pytest.mark.parametrize("shares", [(1, 1), (3, 1)])
def test_every_disk_keeps_the_same_share_in_ram(
    spread: Spread, monkeypatch: pytest.MonkeyPatch, shares: tuple[int, ...]
) -> None:
    monkeypatch.setattr(chunks, "LARGEST_CHUNK", SMALL_CHUNK)
    monkeypatch.setattr(runner.generation.memory_plan, "MARGIN", 0)
    model = runner.load(spread("plain", shares))
    stream = model.weights.stream
    whole = sum(chunk.nbytes for chunk in stream.chunks)
    request = replace(model, ram=2**50).memory_plan(64, 64).request
    ram = request.ram - request.spare + 3 * request.disk_count * request.buffer_nbytes + whole // 2
    plan = replace(model, ram=ram).memory_plan(64, 64)
    for disk in range(len(shares)):
        own = [index for index, of in enumerate(stream.disks) if of == disk]
        kept = sum(stream.chunks[index].nbytes for index in own if index in plan.resident)
        assert kept / sum(stream.chunks[index].nbytes for index in own) == pytest.approx(
            plan.resident_bytes / whole, abs=0.1
        )
