"""What `prepare` asks of the Hub: nothing if nothing is missing; and what becomes of it while the Hub is gone."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from runner.errors import BloomdeskError
from runner.format.manifest import load_manifest
from scripts.fakehub.checkpoint import synthetic
from scripts.fakehub.server import Fault, LocalHub
from tests.support.clocks import FastClock
from tests.support.commands import refused, run
from tests.support.lossless import content
from toolkit.commands.convert import convert
from toolkit.commands.download import download
from toolkit.commands.prepare import prepare
from toolkit.hub import retry
from toolkit.hub.line import Line
from toolkit.hub.record import RECORD

REPO = "me/bloom"
PAUSES = retry.BACKOFF


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`serve()` -> (hub, what download and conversion give)."""
    synthetic(tmp_path / "repo", hidden_size=64, heads=8, blocks=6, vocab_size=700)
    with LocalHub({REPO: tmp_path / "repo"}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr(retry, "BACKOFF", (0.01,) * 5)
        download(REPO, tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "expected")
        yield lambda: (hub, content(tmp_path / "expected"))


@pytest.fixture
def whole(serve, tmp_path: Path) -> tuple[LocalHub, Path]:
    """A hub, and a complete directory made from it."""
    hub, _ = serve()
    prepare(REPO, tmp_path / "out")
    hub.requests.clear()
    return hub, tmp_path / "out"


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("offline", [False, True])
def test_a_complete_directory_needs_no_hub(whole, monkeypatch, named: bool, offline: bool) -> None:
    hub, out = whole
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = content(out)
    commit = ["--revision", load_manifest(out).source.commit.upper()] if named else []
    done = run("prepare", REPO, out, *commit)
    assert done.returncode == 0 and "is complete: 0 parts written, 8 kept" in done.stdout
    assert hub.requests == [] and content(out) == before
    for wrong in (["--form", "lossless"], ["--dtype", "f32"]):
        assert "was started" in refused("prepare", REPO, out, *wrong)


def test_a_directory_that_only_looks_complete_asks_the_hub(whole) -> None:
    hub, out = whole
    before = content(out)
    (out / "tokenizer.json").write_text("{}")
    refused("prepare", "me/other", out)
    run("prepare", REPO, out)
    assert hub.requests
    (out / "block_03.safetensors").unlink()
    (out / "tokenizer.json").write_bytes(before["tokenizer.json"])
    assert prepare(REPO, out).written == ("block_03.safetensors",)
    assert content(out) == before


def test_what_an_earlier_run_has_left_beside_a_complete_directory_goes_without_the_hub(
    whole, tmp_path: Path
) -> None:
    """The last shard, if the run was ended before it could delete it."""
    hub, out = whole
    download(REPO, tmp_path / "staged")
    shard = max(path.name for path in (tmp_path / "staged").glob("*.bin"))
    (out / ".source").mkdir()
    for name in (shard, RECORD):
        (tmp_path / "staged" / name).rename(out / ".source" / name)
    hub.requests.clear()
    prepare(REPO, out)
    assert hub.requests == [] and not (out / ".source").exists()


def test_a_branch_that_has_moved_is_named_and_nothing_is_to_be_deleted(whole, tmp_path: Path) -> None:
    _, out = whole
    held = load_manifest(out).source.commit
    (tmp_path / "repo" / "README.md").write_text("another commit")
    said = refused("prepare", REPO, out, "--revision", "main")
    assert "was started from another source" in said and held[:12] in said and "--revision main is " in said
    assert "leave out --revision to resume it" in said and "delete" not in said


def test_a_commit_that_the_hub_has_no_more_is_not_blamed_on_an_option(whole, tmp_path: Path) -> None:
    hub, out = whole
    (out / "block_03.safetensors").unlink()
    (tmp_path / "repo" / "README.md").write_text("another commit")
    said = refused("prepare", REPO, out)
    assert f"{hub.endpoint}: {REPO} has no revision" in said and "--revision" not in said


def test_an_outage_in_the_night_is_waited_out(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, expected = serve()
    monkeypatch.setattr(retry, "BACKOFF", PAUSES)
    monkeypatch.setattr("toolkit.hub.line.Clock", lambda: FastClock(2000.0))
    shard = "pytorch_model_00004-of-00008.bin"
    hub.fail(shard, Fault(status=503, times=20))
    done = run("prepare", REPO, tmp_path / "out", "--limit-rate", "50 GB/s")
    assert done.returncode == 0 and content(tmp_path / "out") == expected
    assert f"answered 503 for {shard}" in done.stderr and "nothing has come since" in done.stderr
    assert "something comes again, after" in done.stderr


def test_parts_that_fail_end_a_wait_for_the_hub(
    serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, _ = serve()
    hub.fail("pytorch_model_00002-of-00008.bin", Fault(status=503))
    began = threading.Event()

    def full(*_: object) -> None:
        began.wait(10)
        raise BloomdeskError("the part cannot be written")

    def say(text: str) -> None:
        if "nothing has come since" in text:
            began.set()

    monkeypatch.setattr(retry, "BACKOFF", PAUSES)
    monkeypatch.setattr("toolkit.commands.build.write_part", full)
    line = Line(patience=1e9, say=say, clock=FastClock(2000.0))
    with pytest.raises(BloomdeskError, match="the part cannot be written"):
        prepare(REPO, tmp_path / "out", line=line)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--limit-rate", "fast"], "'fast' is not a rate"),
        (["--limit-rate", "0"], "'0' is not a rate"),
        (["--patience", "long"], "'long' is not a length of time"),
    ],
)
@pytest.mark.parametrize("command", ["prepare", "download"])
def test_options_of_the_line_that_say_nothing(
    tmp_path: Path, command: str, option: list, expected: str
) -> None:
    assert expected in refused(command, REPO, tmp_path / "out", *option)
    assert not (tmp_path / "out").exists()


def test_a_repair_refuses_a_rate_that_is_none(tmp_path: Path) -> None:
    assert "is not a rate" in refused("repair", tmp_path, "--limit-rate", "20 parsecs")
