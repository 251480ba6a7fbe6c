"""Whatever a command is started in: one sentence, no traceback, no lost work, and verify's 1 means damage alone."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.commands import COMMAND, refused, started
from tests.support.lossless import content, make
from tests.support.streaming import soon
from toolkit.commands.convert import convert


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and what `convert` makes of it."""
    source = make(tmp_path_factory.mktemp("checkpoint") / "source")
    convert(source, source.with_name("bloom"))
    return source, source.with_name("bloom")


def shell(line: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command line of bash, in which `bloomdesk` is the command and $1 the first argument."""
    line = line.replace("bloomdesk", " ".join(COMMAND)).replace("python -m runner", f"{COMMAND[0]} -m runner")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = ["bash", "-c", line, "bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


# The standard streams.


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full", "<&-", "<&- 2>&-", "2> >(true)"])
def test_without_standard_error_the_work_goes_on(
    made: tuple[Path, Path], tmp_path: Path, streams: str
) -> None:
    source, bloom = made
    done = shell(f"bloomdesk convert $1 $2 {streams}", source, tmp_path / "out")
    assert done.returncode == 0 and "is complete" in done.stdout and not done.stderr
    assert content(tmp_path / "out") == content(bloom)
    assert shell(f"bloomdesk verify $1 {streams}", tmp_path / "nowhere").returncode == 2
    assert shell(f"bloomdesk info $1 {streams}", tmp_path / "nowhere").returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&-", ">/dev/full", ">&- 2>&-", ">/dev/full 2>&1", "<&- >&- 2>&-"])
def test_without_standard_output_a_command_fails_and_its_work_stays(
    made: tuple[Path, Path], tmp_path: Path, streams: str
) -> None:
    source, bloom = made
    done = shell(f"bloomdesk convert $1 $2 {streams}", source, tmp_path / "out")
    assert done.returncode == 1
    # No file that it wrote got the descriptor of a stream that was closed.
    assert content(tmp_path / "out") == content(bloom)
    for command, status in (("verify $1", 2), ("verify --json $1", 2), ("info $1", 1), ("--version", 1)):
        done = shell(f"bloomdesk {command} {streams}", bloom)
        assert done.returncode == status, (command, done)
        said = done.stderr.splitlines()
        assert len(said) == ("2>" not in streams) and not done.stdout
        assert all(line.startswith("error: standard output cannot be written: ") for line in said)
    for command in ("bloomdesk generate $1 hello --max-new-tokens 2", "python -m runner $1 hello --json"):
        assert shell(f"{command} {streams}", bloom).returncode == 1


@pytest.mark.slow
def test_damage_that_cannot_be_told_is_no_damage_found(made: tuple[Path, Path], tmp_path: Path) -> None:
    bloom = Path(shutil.copytree(made[1], tmp_path / "bloom"))
    (bloom / "block_01.safetensors").unlink()
    assert shell("bloomdesk verify $1", bloom).returncode == 1
    assert shell("bloomdesk verify $1 > /dev/full", bloom).returncode == 2
    assert shell("bloomdesk verify $1 2>&- | true; exit ${PIPESTATUS[0]}", bloom).returncode in (1, 2)
    assert shell("bloomdesk --debug verify $1", tmp_path / "nowhere").returncode == 2


# What the system refuses.


@pytest.mark.parametrize("command", ["verify", "info", "generate", "convert", "repair", "export"])
@pytest.mark.parametrize(
    ("number", "step"),
    [
        (errno.EACCES, "right"),
        (errno.EPERM, "right"),
        (errno.ENAMETOOLONG, "shorter"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "files open"),
        (errno.ENOMEM, "ulimit -v"),
        (errno.EROFS, "written"),
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room"),
        (errno.EFBIG, "ulimit -f"),
        (errno.ESTALE, "mounted"),
        (errno.ELOOP, "link"),
        (errno.ENOTDIR, "another path"),
        (errno.EIO, "log"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, number: int, step: str
) -> None:
    path = tmp_path / "file"

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    # Wherever it comes up: the first thing that a command does with a directory.
    monkeypatch.setattr("toolkit.commands.info.inspect", fail)
    monkeypatch.setattr("toolkit.commands.verify.plan_verify", fail)
    monkeypatch.setattr("toolkit.commands.convert.plan_conversion", fail)
    monkeypatch.setattr("toolkit.commands.repair.repair", fail)
    monkeypatch.setattr("toolkit.commands.export.plan_export", fail)
    monkeypatch.setattr("runner.load", fail)
    rest = {"generate": ["x"], "convert": ["x"], "export": ["x"]}.get(command, [])
    said = refused(command, tmp_path, *rest, status=2 if command == "verify" else 1)
    assert said.startswith(f"error: {path}: ") and step in said
    assert "unexpected" not in said and "report it" not in said


def test_too_little_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("can't start new thread"),
    ):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("toolkit.commands.info.inspect", fail)
        said = refused("info", tmp_path)
        assert "unexpected" not in said and "end other programs" in said


@pytest.mark.slow
def test_a_deleted_current_directory_and_a_name_too_long(made: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    for command, status in (
        ("convert a b", 1),
        ("verify a", 2),
        ("info a", 1),
        ("plan", 1),
        ("generate a b", 1),
    ):
        (tmp_path / "gone").mkdir(exist_ok=True)
        done = shell(f"cd $1/gone; rmdir $1/gone; bloomdesk {command}", tmp_path)
        assert done.returncode == status and "the current directory has been deleted" in done.stderr, done
    name = "n" * 256
    for arguments in (("convert", made[0], name), ("convert", name, "x"), ("export", made[1], name)):
        said = refused(*arguments)
        assert "File name too long" in said and "give a shorter name" in said
    assert "give a shorter name" in refused("verify", name, status=2)


# Signals.


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("TERM", 143), ("HUP", 129), ("INT", 130)])
def test_a_signal_ends_a_command_and_what_is_finished_stays(
    miniature: tuple[Path, Path], tmp_path: Path, name: str, status: int
) -> None:
    out = tmp_path / "out"
    with started("convert", miniature[0], out) as process:
        soon(lambda: process.poll() is not None or len([*out.glob("block_*.safetensors")]) > 3)
        process.send_signal(getattr(signal, f"SIG{name}"))
        _, said = process.communicate(timeout=60)
    # Else it was faster.
    if process.returncode != 0:
        assert (process.returncode, said) == (status, "interrupted\n")
        assert not [*out.glob("*.incomplete")]
    done = shell("bloomdesk convert $1 $2", miniature[0], out)
    assert done.returncode == 0 and " kept" in done.stdout
    assert content(out) == content(miniature[1])


@pytest.mark.slow
def test_a_hangup_that_is_ignored_stays_ignored(made: tuple[Path, Path]) -> None:
    line = "trap '' HUP; bloomdesk generate $1 hello --max-new-tokens 200 --json & sleep 1; kill -HUP $!; wait $!"
    done = shell(line, made[1])
    assert done.returncode == 0, done


# Empty arguments.


@pytest.mark.parametrize(
    "line",
    [
        "download r|", "download |d", "download r d --revision=", "prepare r|", "prepare |d", "convert s|",
        "convert |d", "verify |", "verify d --sample|", "repair |", "repair d --source=", "export d|", "export |d",
        "info |", "generate |p", "generate d --prompts|", "generate d --prompts p --out=", "generate d p --ram=",
        "generate d p --draft=", "bench |", "plan |", "plan --model=",
    ],
)  # fmt: skip
def test_an_empty_argument_is_refused(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [part for word in line.split(" ") for part in _words(word)]
    assert "is empty" in refused(*arguments, status=2)
    assert not any(tmp_path.iterdir())


def _words(word: str) -> list[str]:
    """`a|` is the words "a" and "", `|b` is "" and "b"."""
    return word.split("|") if word != "|" else [""]
