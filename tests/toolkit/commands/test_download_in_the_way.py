"""What a download finds in the places of its files: whose it is decides, and nothing is lost that anybody may miss."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.errors import BloomdeskError
from scripts.fakehub.server import LocalHub
from tests.support.bloom_repos import NAME, NEEDED, SHARD, VICTIM, assert_whole, fetched
from tests.support.commands import refused, run
from toolkit.commands.download import download, plan_download
from toolkit.hub.record import RECORD, DownloadRecord, save_record

pytest_plugins = ("tests.support.network",)
pytestmark = pytest.mark.usefixtures("client", "surroundings")

WRONG = {
    "another": lambda data: b"x" * len(data),
    "cut off": lambda data: data[:-1],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
    "a bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
}
wrong = pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)


def everything_in(directory: Path) -> dict[str, object]:
    """Content and target of every name."""
    return {
        str(path): str(path.readlink()) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in sorted(directory.rglob("*"))
    }


def spoil_text(path: Path) -> None:
    """Another letter in a text that stays JSON."""
    text = path.read_text()
    path.write_text(text.replace("added_tokens", "added_tokenz", 1))


def decay(path: Path) -> None:
    """Flip a bit; the date stays."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@wrong
@pytest.mark.parametrize("name", ["config.json", VICTIM])
@pytest.mark.parametrize("record", [False, True], ids=["no record", "recorded as to come"])
def test_a_file_that_is_not_from_here_is_refused_by_name(local, repo, target, spoil, name, record):
    target.mkdir()
    if record:
        save_record(target, DownloadRecord.of(download(NAME, target).revision, None))
    (target / name).write_bytes(spoil((repo / name).read_bytes()))
    before = everything_in(target)
    local.requests.clear()
    with pytest.raises(BloomdeskError, match=f"nor from this program: {name}$") as caught:
        download(NAME, target)
    assert "move it" in caught.value.hint
    assert everything_in(target) == before
    assert not {each for each in fetched(local) if each.endswith(".bin")}


def test_another_checkpoint_is_refused_with_three_names_and_a_count(local, repo, target):
    target.mkdir()
    for name in NEEDED:
        (target / name).write_bytes(b"another's")
    before = everything_in(target)
    dry = run("download", NAME, target, "--dry-run")
    assert dry.returncode == 1 and dry.stdout.count("in the way") == len(NEEDED)
    said = refused("download", NAME, target)
    assert f"{', '.join(NEEDED[:3])} and {len(NEEDED) - 3} more" in said and "move them" in said
    assert everything_in(target) == before


@pytest.mark.parametrize("name", ["manifest.json", "manifest.backup.json"])
def test_a_prepared_directory_is_refused(local, made_copy, name):
    for other in {"manifest.json", "manifest.backup.json"} - {name}:
        (made_copy / other).unlink()
    before = everything_in(made_copy)
    for dry in ((), ("--dry-run",)):
        assert f"is a prepared directory ({name})" in refused("download", NAME, made_copy, *dry)
    assert everything_in(made_copy) == before


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b'{"format": "bloomdesk'])
def test_a_prepared_directory_whose_manifests_are_damaged_is_refused(local, made_copy, data):
    for name in ("manifest.json", "manifest.backup.json"):
        (made_copy / name).write_bytes(data)
    before = everything_in(made_copy)
    assert "is a prepared directory" in refused("download", NAME, made_copy)
    assert everything_in(made_copy) == before


def test_another_programs_manifest_is_not_in_the_way(local, repo, target):
    target.mkdir()
    (target / "manifest.json").write_text('{"name": "my app"}')
    download(NAME, target)
    (target / "manifest.json").unlink()
    assert_whole(target, repo)


@pytest.mark.parametrize("name", ["config.json", VICTIM])
def test_a_beginning_that_no_run_has_recorded_stays_as_it_is(local, target, name):
    target.mkdir()
    (target / f"{name}.incomplete").write_bytes(b"mine")
    assert "no record that this program has begun it" in refused("download", NAME, target)
    assert (target / f"{name}.incomplete").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda source: spoil_text(source / "tokenizer.json"),
            "tokenizer.json is damaged or has changed",
        ),
        (lambda source: (source / "chat_template.jinja").write_text("mine"), "is not of the download"),
    ],
)
def test_a_download_vouches_for_its_small_files_too(made, target, tmp_path, change, said):
    with LocalHub({NAME: made.parent / "source"}) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        download(NAME, target)
    change(target)
    assert said in refused("convert", target, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_export_is_refused(local, made_copy, target):
    run("export", made_copy, target)
    before = everything_in(target)
    for dry in ((), ("--dry-run",)):
        assert "is an export (bloomdesk-export.json)" in refused("download", NAME, target, *dry)
    assert everything_in(target) == before


@wrong
def test_a_file_that_was_written_since_is_never_lost(local, repo, target, spoil):
    download(NAME, target)
    written = spoil((repo / VICTIM).read_bytes())
    for number in ("", ".2", ".3"):
        (target / VICTIM).write_bytes(written)
        assert (
            "renamed" in run("download", NAME, target, "--dry-run", "--check").stdout or len(written) == SHARD
        )
        done = run("download", NAME, target)
        aside = target / f"{VICTIM}.changed{number}"
        assert done.returncode == 0 and f"{aside} had changed" in done.stdout
        assert aside.read_bytes() == written
    for path in target.glob("*.changed*"):
        path.unlink()
    assert_whole(target, repo)


@pytest.mark.parametrize("name", ["config.json", VICTIM])
def test_check_finds_what_has_decayed_and_fetches_it(local, repo, target, name):
    download(NAME, target)
    decay(target / name)
    local.requests.clear()
    done = run("download", NAME, target)
    assert f"{len(NEEDED)} of the size and date that they had" in done.stdout
    assert fetched(local) == set()
    done = run("download", NAME, target, "--check")
    assert f"1 files fetched and checked against their hashes, {len(NEEDED) - 1} kept" in done.stdout
    assert f"{len(NEEDED) - 1} hashed now (" in done.stdout and f"{name} was damaged" in done.stdout
    assert fetched(local) == {name}
    assert_whole(target, repo)


@pytest.mark.parametrize("what", ["decayed", "changed"])
@pytest.mark.parametrize("obstacle", ["offline", "disk"])
def test_nothing_makes_way_for_a_file_that_cannot_come(local, target, monkeypatch, what, obstacle):
    download(NAME, target)
    decay(target / VICTIM)
    if what == "changed":
        os.utime(target / VICTIM)
    before = everything_in(target)
    with monkeypatch.context() as patch:
        if obstacle == "offline":
            patch.setenv("HF_HUB_OFFLINE", "1")
        else:
            patch.setattr("toolkit.commands.download.free_bytes", lambda _: -1)
        with pytest.raises(BloomdeskError, match=r"offline mode is on|bytes are still to come"):
            download(NAME, target, everything=True)
    assert everything_in(target) == before


OBSTACLES: dict[str, Callable[[Path], object]] = {
    "is a directory": lambda path: path.mkdir(),
    "is not a regular file": os.mkfifo,
    "is a link that leads to no file": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", [VICTIM, "config.json", f"{VICTIM}.incomplete"])
@pytest.mark.parametrize("what", OBSTACLES)
def test_what_is_no_file_is_refused_in_one_sentence(local, target, what, name):
    if name.endswith(".incomplete") and "link" in what:
        pytest.skip("it is replaced")
    target.mkdir()
    OBSTACLES[what](target / name)
    before = everything_in(target)
    for dry in ((), ("--dry-run",)):
        assert f"{target / name} {what}" in refused("download", NAME, target, *dry)
    assert everything_in(target) == before


def test_a_link_is_kept_if_its_target_is_right_and_never_replaced(local, repo, target, tmp_path):
    (tmp_path / "elsewhere").write_bytes((repo / VICTIM).read_bytes())
    target.mkdir()
    (target / VICTIM).symlink_to(tmp_path / "elsewhere")
    assert VICTIM in download(NAME, target).kept
    assert_whole(target, repo)
    decay(tmp_path / "elsewhere")
    spoilt = (tmp_path / "elsewhere").read_bytes()
    with pytest.raises(BloomdeskError, match=f"nor from this program: {VICTIM}"):
        download(NAME, target, everything=True)
    assert (target / VICTIM).is_symlink() and (tmp_path / "elsewhere").read_bytes() == spoilt


def test_a_link_in_the_place_of_a_beginning_is_replaced(local, repo, target, tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"mine")
    target.mkdir()
    (target / f"{VICTIM}.incomplete").symlink_to(tmp_path / "elsewhere")
    download(NAME, target)
    assert_whole(target, repo)
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
@pytest.mark.parametrize("recorded", [False, True])
def test_what_cannot_be_read_is_not_taken_for_damaged(local, repo, target, monkeypatch, number, recorded):
    download(NAME, target)
    if not recorded:
        (target / RECORD).unlink()
    before = everything_in(target)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("toolkit.hub.revision.hash_file", fail)
        with pytest.raises(BloomdeskError, match=f"cannot be read: {os.strerror(number)}"):
            download(NAME, target, everything=True)
    assert everything_in(target) == before
    assert {each.state for each in plan_download(NAME, target, everything=True).files} == {"unchecked"}
    assert download(NAME, target).kept == NEEDED
    assert_whole(target, repo)
