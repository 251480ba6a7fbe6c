"""One command that makes the slices of several disks: from disk or from the Hub, killed, resumed, and out of space."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.errors import BloomdeskError
from runner.format.layout import MANIFEST
from runner.format.manifest import load_manifest
from runner.format.slices import Slice
from runner.system.atomic import TEMPORARY_SUFFIX
from scripts.fakehub.server import LocalHub
from tests.support.commands import refused, run, started
from tests.support.lossless import content, flip, make
from tests.support.streaming import soon
from toolkit.commands.build import carry_out
from toolkit.commands.convert import convert, plan_conversion
from toolkit.commands.download import download
from toolkit.commands.placement import placed
from toolkit.commands.prepare import prepare
from toolkit.commands.repair import repair
from toolkit.commands.verify import verify
from toolkit.parts.destination import STAGING

REPO = "me/bloom"
BLOCK = "block_01.safetensors"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A downloaded checkpoint, and the Hub that has it."""
    make(tmp_path / "repo")
    with LocalHub({REPO: tmp_path / "repo"}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        download(REPO, tmp_path / "source")
        yield tmp_path / "source"


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    return [tmp_path / name for name in "abc"]


def parts_of(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(directory).items() if not name.startswith("manifest")}


@pytest.mark.parametrize("form", ["plain", "lossless", "int4"])
def test_prepare_makes_what_convert_does(source: Path, tmp_path: Path, disks: list[Path], form: str) -> None:
    expected = [tmp_path / "expected" / path.name for path in disks]
    convert(source, expected[0], form=form, also=expected[1:], shares=(2, 1, 1))
    done = prepare(REPO, disks[0], form=form, also=disks[1:], shares=(2, 1, 1))
    assert len(done.written) == 5 and done.received
    for made, other in zip(disks, expected, strict=True):
        assert parts_of(made) == parts_of(other) and not (made / STAGING).exists()
        assert load_manifest(made).parts == load_manifest(other).parts
    again = prepare(REPO, disks[0], form=form, also=disks[1:], shares=(2, 1, 1))
    assert not again.written and not again.received


def test_prepare_goes_on_with_what_one_disk_lacks(source: Path, disks: list[Path]) -> None:
    prepare(REPO, disks[0], also=disks[1:])
    expected = content(disks[1])
    (disks[1] / BLOCK).unlink()
    done = prepare(REPO, disks[0], also=disks[1:])
    assert done.written == (BLOCK,) and content(disks[1]) == expected
    assert all(verify(each).sound for each in disks)


def test_each_disk_is_repaired_from_the_hub(source: Path, disks: list[Path]) -> None:
    prepare(REPO, disks[0], also=disks[1:], form="int8")
    expected = content(disks[2])
    flip(disks[2] / BLOCK, -1)
    assert repair(disks[2]).parts == (BLOCK,)
    assert content(disks[2]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("command", ["convert", "prepare"])
def test_a_killed_command_goes_on(source: Path, tmp_path: Path, disks: list[Path], command: str) -> None:
    what = source if command == "convert" else REPO
    arguments = [command, what, disks[0], "--also", disks[1], "--shares", "2,1", "--form", "lossless"]
    for part in ("embedding.safetensors", "block_01.safetensors"):
        with started(*arguments) as process:
            soon(lambda part=part: (disks[1] / part).exists() or process.poll() is not None)
            process.send_signal(signal.SIGKILL)
    assert run(*arguments).returncode == 0
    convert(source, tmp_path / "x" / "a", form="lossless", also=[tmp_path / "x" / "b"], shares=(2, 1))
    for name in "ab":
        assert parts_of(tmp_path / name) == parts_of(tmp_path / "x" / name)
        assert verify(tmp_path / name).sound


def test_shards_are_deleted_when_all_disks_have_their_parts(source: Path, disks: list[Path]) -> None:
    plan = plan_conversion(source, disks[0], delete_source=True, placement=placed(disks[0], None, disks[1:]))
    assert carry_out(plan).bytes_deleted
    assert not [*source.glob("*.bin")] and all(verify(each).sound for each in disks)


def test_a_disk_that_fails_is_named(source: Path, disks: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real, full = os.write, disks[1] / (BLOCK + TEMPORARY_SUFFIX)

    def write(descriptor: int, data: bytes) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink() == full:
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(BloomdeskError, match=f"^{disks[1] / BLOCK}: "):
        convert(source, disks[0], also=disks[1:])
    monkeypatch.undo()
    assert all(list(load_manifest(each).parts)[-1] == "block_00.safetensors" for each in disks)
    assert len(convert(source, disks[0], also=disks[1:]).written) == 3


def test_each_disk_must_have_the_space(
    source: Path, disks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {disks[0]: 10**9, disks[1]: 10**9, disks[2]: 16_790_000}
    monkeypatch.setattr("toolkit.parts.destination.free_bytes", free.__getitem__)
    with pytest.raises(BloomdeskError, match=f"{disks[2]} needs"):
        convert(source, disks[0], also=disks[1:])
    assert not any(each.exists() for each in disks)


def test_shares_are_the_measured_rates_and_then_the_recorded_ones(
    source: Path, disks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def measured(directories: list[Path]) -> tuple[float, ...]:
        asked.append(directories)
        return 400e6, 200.4e6

    monkeypatch.setattr("runner.estimate.rates.scratch_rates", measured)
    done = run("convert", source, disks[0], "--also", disks[1])
    assert "400 MB/s" in done.stderr and "--shares 400,200" in done.stderr
    assert [load_manifest(each).slice for each in disks[:2]] == [Slice(0, (400, 200)), Slice(1, (400, 200))]
    assert run("convert", source, disks[0], "--also", disks[1]).returncode == 0 and len(asked) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--also", "a"], "given twice"),
        (["--also", "b", "--shares", "1"], "1 shares for 2 directories"),
        (["--also", "b", "--slice", "1/2"], "one of the two"),
        (["--also", "source", "--shares", "1,1"], "is the source itself"),
    ],
)
def test_options_that_contradict_are_refused(
    source: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    given = [str(tmp_path / each) if each in ("a", "b", "source") else each for each in options]
    assert words in refused("convert", source, tmp_path / "a", *given)
    assert not (tmp_path / "a").exists()


def test_info_says_where_the_others_are(source: Path, disks: list[Path]) -> None:
    convert(source, disks[0], also=disks[1:], shares=(2, 1, 1))
    moved = disks[2].rename(disks[2].with_name("moved"))
    lines = run("info", disks[0]).stdout
    assert "slice 1/3 of the shares 2,1,1" in lines
    assert f"slice 2/3  in {disks[1]}" in lines
    assert f"slice 3/3  not found; it was made in {disks[2]}: --also DIR says where" in lines
    found = json.loads(run("info", disks[1], "--also", moved, "--json").stdout)
    assert found["slice"] == {"index": 1, "shares": [2, 1, 1]} and found["complete"]
    assert [each["directory"] for each in found["slices"]] == [str(disks[0]), str(disks[1]), str(moved)]
    assert [each["made_in"] for each in found["slices"]] == [str(each) for each in disks]


def test_another_checkpoint_in_its_place_is_not_taken(source: Path, disks: list[Path]) -> None:
    convert(source, disks[0], also=disks[1:2])
    shutil.rmtree(disks[1])
    make(disks[2] / "other", seed=9)
    convert(disks[2] / "other", disks[1], own=Slice(1, (1, 1)))
    assert "not found" in run("info", disks[0]).stdout


def test_commands_of_the_runner_find_and_take_them(source: Path, disks: list[Path], tmp_path: Path) -> None:
    convert(source, tmp_path / "whole")
    convert(source, disks[0], also=disks[1:2])
    wanted = run("generate", tmp_path / "whole", "Hello", "--max-new-tokens", "5").stdout
    assert run("generate", disks[0], "Hello", "--max-new-tokens", "5").stdout == wanted
    moved = disks[1].rename(disks[2])
    assert f"2/2 (made in {disks[1]})" in refused("generate", disks[0], "Hello")
    also = ["--also", moved]
    assert run("generate", disks[0], "Hello", "--max-new-tokens", "5", *also).stdout == wanted
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "a few words"}) + "\n")
    scores = [
        run("score", each, tmp_path / "text.jsonl", *more)
        for each, more in ((tmp_path / "whole", []), (disks[0], also))
    ]
    assert scores[0].stdout == scores[1].stdout and not scores[1].returncode
    assert MANIFEST in {path.name for path in moved.iterdir()}
