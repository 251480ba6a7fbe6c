"""The `bloomdesk` command as a user runs it: its output and its exit status."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import runner
from runner.weights.stream import READERS
from scripts.fakehub.server import LocalHub
from tests.support.commands import COMMAND, refused, run, screen_of, started
from tests.support.lossless import content, flip
from tests.support.streaming import soon

PROMPT = "The SQL command to list all the books whose year is 1999 is:"


@pytest.mark.slow
def test_a_hub_to_generated_text(miniature: tuple[Path, Path], tmp_path: Path) -> None:
    """Hub, download, convert, verify, info, generate: as scripts/demo does it."""
    with LocalHub({"bloomdesk/miniature": miniature[0]}) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint}
        dry = run("download", "bloomdesk/miniature", tmp_path / "source", "--dry-run", **environment)
        assert dry.returncode == 0 and "it fits" in dry.stdout and not (tmp_path / "source").exists()
        done = run("download", "bloomdesk/miniature", tmp_path / "source", **environment)
        assert done.returncode == 0 and "77 files fetched" in done.stdout, done
    done = run("convert", tmp_path / "source", tmp_path / "bloom")
    assert done.returncode == 0 and "72 parts written" in done.stdout, done
    shutil.rmtree(tmp_path / "source")
    report = json.loads(run("verify", tmp_path / "bloom", "--json").stdout)
    assert report["sound"] and report["files_checked"] == 76
    info = json.loads(run("info", tmp_path / "bloom", "--json").stdout)
    assert info["complete"] and info["model"]["n_layer"] == 70
    assert info["source"]["repo"] == "bloomdesk/miniature"
    done = run("generate", tmp_path / "bloom", PROMPT)
    assert done.stdout == " SELECT * FROM books WHERE year = 1999\n"
    assert done.stderr == ""


REPORT_KEYS = [
    "prompt", "prompt_token_ids", "token_ids", "text", "seconds_per_token", "token_seconds", "passes", "bytes_read",
    "stop_reason",
    "tokens_per_pass", "proposed", "accepted", "acceptance", "drafting_seconds",
]  # fmt: skip


def test_json_of_generate(miniature: tuple[Path, Path]) -> None:
    done = run("generate", miniature[1], PROMPT, "--max-new-tokens", "5", "--json", "--speculate", "off")
    report = json.loads(done.stdout)
    assert list(report) == REPORT_KEYS
    assert report["prompt"] == PROMPT
    assert len(report["token_ids"]) == report["passes"] == 5
    assert report["stop_reason"] == "length"
    assert report["text"] and " SELECT * FROM books WHERE year".startswith(report["text"])
    chunks = runner.load(miniature[1]).weights.stream.chunks
    # All of them stay, and are read once.
    assert report["bytes_read"] == sum(chunk.nbytes for chunk in chunks)


@pytest.mark.slow
def test_the_runner_generates_without_the_toolkit(miniature: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "runner", str(miniature[1]), PROMPT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, " SELECT * FROM books WHERE year = 1999\n")


@pytest.mark.slow
def test_text_and_progress_on_a_terminal(miniature: tuple[Path, Path]) -> None:
    """Text grows on standard output, the status of the pass comes and goes, and a summary ends it."""
    screen = screen_of("generate", miniature[1], PROMPT)
    assert "[part " in screen and "of 72]" in screen
    assert screen.replace("\r", "").rstrip().endswith("; the model ended its text)")


@pytest.mark.slow
def test_interrupted_generation_keeps_its_text(miniature: tuple[Path, Path]) -> None:
    with started("generate", miniature[1], "When I was 6", "--max-new-tokens", "2000", "--json") as process:
        # The threads that read ahead start with the first pass.
        threads = Path(f"/proc/{process.pid}/task")
        soon(lambda: process.poll() is not None or len([*threads.iterdir()]) > READERS)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    if process.returncode == 130:  # else the model ended its text first
        assert "Traceback" not in errors
        assert json.loads(out)["stop_reason"] == "interrupted"


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error(miniature: tuple[Path, Path]) -> None:
    line = " ".join([*COMMAND, "info", str(miniature[1]), "| true"])
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.slow
def test_verify_tells_sound_damaged_and_unable_apart(miniature: tuple[Path, Path], tmp_path: Path) -> None:
    bloom = Path(shutil.copytree(miniature[1], tmp_path / "bloom"))
    assert run("verify", bloom).returncode == 0
    assert run("verify", bloom, "--quick").returncode == 0
    flip(bloom / "block_31.safetensors", -1)
    assert run("verify", bloom, "--quick").returncode == 0  # the header and the size are right
    done = run("verify", bloom)
    assert done.returncode == 1
    assert "block_31.safetensors: mlp.dense_4h_to_h.bias: wrong xxh3-128" in done.stdout
    (bloom / "manifest.json").unlink()
    done = run("verify", bloom)  # the backup still tells
    assert done.returncode == 1 and "manifest.json: it is missing" in done.stdout
    (bloom / "manifest.backup.json").unlink()
    assert "is not a prepared checkpoint" in refused("verify", bloom, status=2)


@pytest.mark.slow
def test_repair_and_export(miniature: tuple[Path, Path], tmp_path: Path) -> None:
    bloom = Path(shutil.copytree(miniature[1], tmp_path / "bloom"))
    whole = content(bloom)
    (bloom / "block_31.safetensors").unlink()
    os.truncate(bloom / "tokenizer.json", 10)
    assert "give that checkpoint" in refused("repair", bloom)
    assert (bloom / "tokenizer.json").exists()  # nothing is deleted before there is something to repair from
    done = run("repair", bloom, "--source", miniature[0])
    assert done.returncode == 0 and "1 parts and 1 small files made anew" in done.stdout, done
    assert content(bloom) == whole
    assert "is sound" in run("verify", bloom, "--sample", "5%").stdout
    for share in ("much", "0.05"):
        assert "a sample is a share" in refused("verify", bloom, "--sample", share, status=2)
    assert "found 150%" in refused("verify", bloom, "--sample", "150", status=2)
    assert "72 shards written" in run("export", bloom, tmp_path / "hub").stdout


@pytest.mark.parametrize(
    ("command", "rest", "status"),
    [("info", (), 1), ("generate", ("a prompt",), 1), ("verify", (), 2), ("convert", ("somewhere",), 1)],
)
def test_a_directory_that_is_missing(
    command: str, rest: tuple[str, ...], status: int, tmp_path: Path
) -> None:
    refused(command, tmp_path / "nowhere", *rest, status=status)


def test_errors_of_the_network_are_sentences(tmp_path: Path) -> None:
    with LocalHub({}) as hub:
        said = refused("download", "bloomdesk/none", tmp_path / "source", HF_ENDPOINT=hub.endpoint)
    assert "bloomdesk/none" in said
    assert not (tmp_path / "source").exists()
    assert "offline" in refused("download", "some/model", tmp_path / "source", HF_HUB_OFFLINE="1").lower()


def test_an_empty_prompt_is_refused(miniature: tuple[Path, Path]) -> None:
    assert "no tokens" in refused("generate", miniature[1], "")


def test_a_bug_shows_its_traceback_only_with_debug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("toolkit.commands.info.inspect", broken)
    assert "unexpected RuntimeError: a bug" in refused("info", tmp_path)
    for command in (
        ["--debug", "info", tmp_path],
        ["info", "--debug", tmp_path],
        ["info", tmp_path, "--debug"],
    ):
        done = run(*command)
        assert done.returncode == 1
        assert "Traceback" in done.stderr and "RuntimeError: a bug\nerror: unexpected" in done.stderr
    assert "argument(s) (--debug)" in refused("info", tmp_path, "--", "--debug", status=2)


@pytest.mark.slow
def test_the_process_ends_with_the_status_of_its_command(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "verify", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_every_command_and_breaks_no_word(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = run(option)
    assert shown.returncode == 0
    names = [line.split()[0] for line in shown.stdout.split("Commands:\n")[1].splitlines()]
    assert {"download", "prepare", "convert", "verify", "repair", "info", "generate", "plan"} < set(names)
    for name in names:
        lines = run(name, option).stdout.splitlines()
        assert len(lines) > 5
        assert not [line for line in lines if len(line) > 80 or line.endswith("-")]


def test_the_version_is_shown() -> None:
    assert re.fullmatch(r"bloomdesk \d+\.\d+\.\d+\n", run("--version").stdout)


def test_what_was_mistyped_is_one_sentence() -> None:
    for arguments in (["generate", "--no-such"], ["generate"], ["no-such"], ["plan", "--tokens", "0"]):
        assert "--help" in refused(*arguments, status=2)
    done = run()
    assert done.returncode == 2 and done.stderr.startswith("Usage: bloomdesk")


@pytest.mark.slow
def test_ctrl_c_while_modules_are_imported_says_nothing() -> None:
    script = """
import os, signal, sys
from toolkit.cli import start

class Interrupts:
    def find_spec(self, name, *_):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupts())
start.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.slow
def test_completion(tmp_path: Path) -> None:
    assert "--show-completion" in run("--help").stdout
    asked = {"_BLOOMDESK_COMPLETE": "complete_bash", "COMP_WORDS": "bloomdesk verify --sa", "COMP_CWORD": "2"}
    done = subprocess.run(COMMAND, env={**os.environ, **asked}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "--sample\n", "")


@pytest.mark.parametrize("kind", ["a file", "a link that leads nowhere"])
def test_a_place_that_is_no_directory_is_refused_before_the_hub_is_asked(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "a file":
        path.touch()
    else:
        path.symlink_to("nowhere")
    for command in ("download", "prepare"):
        said = refused(command, "bigscience/bloom-560m", path, HF_HUB_OFFLINE="1")
        assert said == f"error: {path} is not a directory\n  next: give a new directory to write to\n"


def test_a_complete_directory_comes_with_the_next_command(
    miniature: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "it's here"
    said = run("convert", miniature[0], out).stdout
    assert said.endswith(f"""\n  next: bloomdesk generate {shlex.quote(str(out))} "PROMPT"\n""")
