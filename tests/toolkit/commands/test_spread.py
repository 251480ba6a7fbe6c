"""A directory that is spread over several disks: as if it had been made so, killed at any moment, and nothing lost."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import runner
from runner.errors import BloomdeskError
from runner.format.layout import MANIFEST, MANIFEST_BACKUP, SPREADING
from runner.format.manifest import load_manifest
from runner.format.quantised import FORMS
from runner.format.slices import Slice
from tests.support.commands import refused, run, started
from tests.support.lossless import content, flip, interrupt_at, make_forms
from tests.support.streaming import soon
from toolkit.commands import spread as spread_module
from toolkit.commands.convert import convert
from toolkit.commands.export import export
from toolkit.commands.placement import recorded_shares
from toolkit.commands.repair import repair
from toolkit.commands.spread import spread
from toolkit.commands.verify import verify

BLOCK = "block_01.safetensors"
SHARES = (2, 1)
Disks = tuple[Path, Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_forms(tmp_path_factory.mktemp("spread"), hidden_size=96, heads=6, vocab_size=1200)


@pytest.fixture
def disks(world: Path, tmp_path: Path) -> Callable[[str], Disks]:
    """A copy of the directory of a form, and the place for its second slice."""

    def of(form: str) -> Disks:
        return Path(shutil.copytree(world / form, tmp_path / "a")), tmp_path / "b"

    return of


def assert_spread(world: Path, form: str, disks: Disks, tmp_path: Path) -> None:
    """The parts are those that a conversion into slices gives, and what belongs to the rounding is known."""
    expected = tmp_path / "expected" / "a", tmp_path / "expected" / "b"
    convert(world / "source", expected[0], form=form, also=expected[1:], shares=SHARES)
    for index, (found, other) in enumerate(zip(disks, expected, strict=True)):
        manifest = load_manifest(found)
        assert manifest.slice == Slice(index, SHARES) and manifest.places == tuple(map(str, disks))
        assert manifest.fingerprint == load_manifest(world / form).fingerprint
        assert manifest.source_fingerprint == load_manifest(world / form).source_fingerprint
        wanted = {name: data for name, data in content(other).items() if not name.startswith("manifest")}
        assert {
            name: data for name, data in content(found).items() if not name.startswith("manifest")
        } == wanted
        assert verify(found).sound


@pytest.mark.parametrize("form", FORMS)
def test_the_parts_are_those_of_a_spread_conversion(world: Path, disks, tmp_path: Path, form: str) -> None:
    here = disks(form)
    tokens = list(runner.load(here[0]).generate("Hello", max_new_tokens=4))
    assert len(spread(here[0], here[1:], shares=SHARES).written) == 5
    assert_spread(world, form, here, tmp_path)
    assert list(runner.load(here[0]).generate("Hello", max_new_tokens=4)) == tokens
    export(here[0], tmp_path / "hub")
    export(world / form, tmp_path / "whole")
    assert content(tmp_path / "hub") == content(tmp_path / "whole")
    assert not spread(here[0], here[1:], shares=SHARES).written
    flip(here[1] / BLOCK, 5000)
    assert repair(here[1], world / "source").parts == (BLOCK,)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at", ["embedding.safetensors", BLOCK, "final_layernorm.safetensors"])
def test_an_interrupted_one_goes_on(world: Path, disks, tmp_path: Path, form: str, at: str) -> None:
    here = disks(form)
    with pytest.raises(KeyboardInterrupt):
        spread(here[0], here[1:], interrupt_at(at), shares=SHARES)
    out = tmp_path / "out"
    commands = (
        ["generate", here[0], "x"],
        ["export", here[0], out],
        ["repair", here[0]],
        ["spread", here[0]],
    )
    for command in (*commands, ["plan", here[0]], ["convert", here[0], out], ["info", here[1]]):
        said = refused(*command)
        assert "has not ended" in said and f"bloomdesk spread {here[0]} --also" in said
    assert "has not ended" in refused("verify", here[0], status=2)
    assert "has not ended" in refused("convert", world / "source", here[0], "--form", form)
    spread(here[0], here[1:], shares=SHARES)
    assert_spread(world, form, here, tmp_path)


@pytest.mark.parametrize("step", range(8))
def test_the_last_step_may_be_cut_short_anywhere(
    world: Path, disks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    here, calls, real = disks("plain"), [0], spread_module.replace_file

    def replace_file(temporary: Path, path: Path) -> None:
        calls[0] += 1
        if calls[0] > step:
            raise KeyboardInterrupt
        real(temporary, path)

    monkeypatch.setattr(spread_module, "replace_file", replace_file)
    if step < 5:
        with pytest.raises(KeyboardInterrupt):
            spread(here[0], here[1:], shares=SHARES)
        assert "has not ended" in refused("generate", here[0], "x")
    monkeypatch.undo()
    spread(here[0], here[1:], shares=SHARES)
    assert_spread(world, "plain", here, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lossless", "int4"])
def test_a_killed_one_goes_on(world: Path, disks, tmp_path: Path, form: str) -> None:
    here = disks(form)
    arguments = ["spread", here[0], "--also", here[1], "--shares", "2,1"]
    for part in ("embedding.safetensors", BLOCK):
        with started(*arguments) as process:
            soon(lambda part=part: (here[1] / part).exists() or process.poll() is not None)
            process.send_signal(signal.SIGKILL)
    assert run(*arguments).returncode == 0
    assert_spread(world, form, here, tmp_path)


def test_a_part_goes_only_when_its_slices_are_proven(
    world: Path, disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = disks("plain")
    with pytest.raises(KeyboardInterrupt):
        spread(here[0], here[1:], interrupt_at(BLOCK), shares=SHARES)
    assert not (here[0] / "block_00.safetensors").exists() and (here[0] / BLOCK).exists()
    # Slices that decay on their disk keep the whole part.
    shutil.copy(world / "plain" / "block_00.safetensors", here[0])
    flip(here[1] / "block_00.safetensors", -1)
    with pytest.raises(BloomdeskError, match="does not read back"):
        spread(here[0], here[1:], shares=SHARES)
    assert (here[0] / "block_00.safetensors").exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_part_is_not_spread(disks, form: str) -> None:
    here = disks(form)
    flip(here[0] / BLOCK, (here[0] / BLOCK).stat().st_size // 2)
    with pytest.raises(BloomdeskError, match=f"{here[0] / BLOCK} is damaged"):
        spread(here[0], here[1:], shares=SHARES)
    assert (here[0] / BLOCK).exists() and not (here[1] / BLOCK).exists()


def test_the_first_disk_needs_space_for_one_part_more(disks, monkeypatch: pytest.MonkeyPatch) -> None:
    here = disks("plain")
    asked: dict[Path, int] = {}

    def note(directory: Path, needed: int, *_: object) -> None:
        asked[directory] = needed

    monkeypatch.setattr("toolkit.commands.destinations.target.require_free_space", note)
    spread(here[0], here[1:], shares=SHARES)
    parts = [part.size for part in load_manifest(here[0]).parts.values()]
    assert max(parts) <= asked[here[0] / SPREADING] < 2 * max(parts) < sum(parts)
    assert asked[here[1]] == sum(part.size for part in load_manifest(here[1]).parts.values())


def test_what_cannot_be_spread_is_refused(world: Path, disks, tmp_path: Path) -> None:
    here = disks("plain")
    with pytest.raises(BloomdeskError, match="no other directory"):
        spread(here[0], [])
    spread(here[0], here[1:], shares=SHARES)
    with pytest.raises(BloomdeskError, match="only whole checkpoints are spread"):
        spread(here[0], [tmp_path / "c"], shares=(1, 1))
    with pytest.raises(KeyboardInterrupt):
        convert(world / "source", tmp_path / "half", interrupt_at(BLOCK))
    with pytest.raises(BloomdeskError, match="is not complete"):
        spread(tmp_path / "half", [tmp_path / "c"])


@pytest.mark.parametrize("form", ["lossless", "int4"])
def test_a_lost_disk_of_one_that_was_interrupted_is_made_again(
    world: Path, disks, tmp_path: Path, form: str
) -> None:
    """The error names the disks of the first run, and a command that makes the slices from the source."""
    here, new = disks(form), tmp_path / "new"
    with pytest.raises(KeyboardInterrupt):
        spread(here[0], here[1:], interrupt_at(BLOCK), shares=SHARES)
    before = content(here[0] / SPREADING)
    error = refused("spread", here[0], "--also", new)
    assert (
        f"{new} lacks embedding.safetensors" in error
        and f"spread {here[0]} --also {here[1]} resumes" in error
    )
    assert "--also" in refused("spread", here[0], "--also", here[1], "--also", new, "--shares", "1,1,1")
    assert "another slice" in refused("spread", here[0], "--also", here[1], "--shares", "1,1")
    shutil.rmtree(here[1])
    error = refused("spread", here[0], "--also", here[1])
    assert f"{here[1]} lacks" in error and not here[1].exists() and content(here[0] / SPREADING) == before
    error = refused("spread", here[0], "--also", new)
    again = re.search(r"bloomdesk (convert SRC .*) makes its slice again", error)
    assert again and str(new) in again[1]
    command = [str(world / "source") if word == "SRC" else word for word in again[1].split()]
    assert run(*command).returncode == 0
    assert run("spread", here[0], "--also", new).returncode == 0
    assert_spread(world, form, (here[0], new), tmp_path)


def test_a_whole_part_that_decays_meanwhile_is_made_from_the_source(
    world: Path, disks, tmp_path: Path
) -> None:
    here = disks("plain")
    flip(here[0] / BLOCK, (here[0] / BLOCK).stat().st_size // 2)
    error = refused("spread", here[0], "--also", here[1], "--shares", "2,1")
    again = re.search(r"bloomdesk (convert SRC .*) makes the slices", error)
    assert again
    command = [str(world / "source") if word == "SRC" else word for word in again[1].split()]
    assert run(*command).returncode == 0
    assert run("spread", here[0], "--also", here[1]).returncode == 0
    assert_spread(world, "plain", here, tmp_path)


def test_one_that_is_spread_is_not_complete_with_another_directory(disks, tmp_path: Path) -> None:
    here = disks("plain")
    spread(here[0], here[1:], shares=SHARES)
    error = refused("spread", here[0], "--also", tmp_path / "new")
    assert (
        "was spread already" in error and f"convert SRC {tmp_path / 'new'} --slice 2/2 --shares 2,1" in error
    )
    assert not (tmp_path / "new").exists()
    # One that has moved is known by what it holds.
    here[1].rename(tmp_path / "moved")
    assert run("spread", here[0], "--also", tmp_path / "moved").returncode == 0


@pytest.mark.parametrize("place", [SPREADING, f"{SPREADING}/deeper", f"../a/{SPREADING}"])
def test_where_it_is_made_is_no_other_directory(disks, place: str) -> None:
    here, _ = disks("plain")
    before = content(here)
    with pytest.raises(BloomdeskError, match=r"where the slice of .* itself is made"):
        spread(here, [here / place], shares=SHARES)
    assert content(here) == before and not (here / SPREADING).exists()


def test_what_others_put_there_stays(disks) -> None:
    here, other = disks("plain")
    spread(here, [other], shares=SHARES)
    (here / SPREADING).mkdir()
    (here / SPREADING / "mine.txt").write_text("x")
    with pytest.raises(BloomdeskError, match=r"did not put there: 'mine\.txt'"):
        spread(here, [other], shares=SHARES)
    assert (here / SPREADING / "mine.txt").read_text() == "x"


@pytest.mark.parametrize("at", ["embedding.safetensors", BLOCK])
def test_the_shares_of_one_that_was_interrupted_are_known(disks, at: str) -> None:
    """Even before it has a part: the measured ones of the next time would be others."""
    here, other = disks("plain")
    with pytest.raises(KeyboardInterrupt):
        spread(here, [other], interrupt_at(at), shares=SHARES)
    for directory in (here / SPREADING, other):
        assert recorded_shares([here, other]) == SHARES
        for name in (MANIFEST, MANIFEST_BACKUP):
            (directory / name).unlink()


def test_shares_without_slices_are_refused(world: Path, tmp_path: Path) -> None:
    error = refused("convert", world / "source", tmp_path / "made", "--shares", "1,1")
    assert "--shares are for slices" in error and not (tmp_path / "made").exists()


def test_one_that_is_made_again_alone_knows_the_others(world: Path, disks) -> None:
    here, other = disks("plain")
    spread(here, [other], shares=SHARES)
    wanted = f"convert SRC {here} --also {other} --shares 2,1"
    assert all(wanted in load_manifest(each).command(each) for each in (here, other))
    (other / BLOCK).unlink()
    convert(world / "source", other, own=Slice(1, SHARES))
    assert load_manifest(other).places == (str(here), str(other))
    assert runner.load(other)
