"""Sessions: a text goes on to the very same end, whatever happened to the process, the files or the disk."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

import runner
from runner.errors import BloomdeskError
from runner.generation import session_files as files
from runner.generation.model import Model
from runner.generation.options import GREEDY, Sampling
from runner.generation.session_files import CACHE, SESSION, SessionFiles
from runner.system.lock import sole_writer
from tests.support.commands import refused, run, started
from tests.support.prompts import tokens

PROMPT = tokens(150, 4)
DRAWN = Sampling(temperature=1.0, seed=3, repetition_penalty=1.1, logprobs=1, logit_bias={2: -50.0})


@pytest.fixture
def model(prepared) -> Model:
    return runner.load(prepared()[1])


def text(model: Model, directory: Path | None, new: int = 20, prompt: list[int] = PROMPT, **options: object):
    """Tokens, scores and the number of passes of a run."""
    generation = model.generate(
        prompt, max_new_tokens=new, session=directory, **{"sampling": DRAWN, **options}
    )
    return list(generation), generation.sequence.scores, generation.passes


def test_a_finished_text_costs_no_pass_and_a_longer_one_only_the_rest(model: Model, tmp_path: Path) -> None:
    whole = text(model, None, 30, speculate="off")
    first = text(model, tmp_path, 20, speculate="off")
    assert first[:2] == (whole[0][:20], whole[1][:20])
    assert text(model, tmp_path, 20) == (*first[:2], 0)
    assert text(model, tmp_path, 8) == (first[0][:8], first[1][:8], 0)
    assert text(model, tmp_path, 30, speculate="off") == (*whole[:2], 10)


@pytest.mark.parametrize("speculate", ["off", "lookup"])
def test_a_session_cut_anywhere_goes_on_to_the_same_text(
    model: Model, tmp_path: Path, speculate: str
) -> None:
    """A kill or a power cut leaves any beginning of the last record, or any bytes in its place."""
    whole = text(model, tmp_path, 12, speculate=speculate)
    data, chance = (tmp_path / CACHE).read_bytes(), random.Random(1)
    records = SessionFiles.load(tmp_path).records
    assert [record.stop for record in records[:3]] == [64, 128, 150] and len(records) > 4
    for number in range(40):
        end = chance.randrange(len(data))
        left = data[:end]
        if number % 3 == 1:
            left += chance.randbytes(chance.randrange(2000))
        if number % 3 == 2:
            left = data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]
        (tmp_path / CACHE).write_bytes(left)
        sound = sum(record.offset + record.nbytes <= end for record in records)
        found = text(model, tmp_path, 12, speculate=speculate)
        assert found[:2] == whole[:2]
        assert found[2] <= whole[2] - max(0, sound - 2)
        assert (tmp_path / CACHE).read_bytes() == data or speculate == "lookup"


def test_an_interruption_at_any_part_costs_its_pass(model: Model, tmp_path: Path) -> None:
    whole, calls = text(model, None, 10), []

    def interrupt(part: int, parts: int) -> None:
        calls.append(part)
        if len(calls) % 7 == 0:
            raise KeyboardInterrupt

    for _ in range(200):
        try:
            assert text(model, tmp_path, 10, on_part=interrupt)[:2] == whole[:2]
            break
        except KeyboardInterrupt:
            continue
    else:
        raise AssertionError("it never ends")


def test_another_prompt_keeps_what_both_begin_with(model: Model, tmp_path: Path) -> None:
    text(model, tmp_path, 5)
    longer = [*PROMPT, *tokens(9, 8)]
    assert text(model, tmp_path, 6, longer)[:2] == text(model, None, 6, longer)[:2]
    assert SessionFiles.load(tmp_path).positions == len(longer) + 5
    changed = [*PROMPT[:100], 9, *PROMPT[101:]]
    assert text(model, tmp_path, 6, changed)[:2] == text(model, None, 6, changed)[:2]
    assert SessionFiles.load(tmp_path).records[0].ids == tuple(PROMPT[:64])


@pytest.mark.parametrize("sampling", [GREEDY, replace(DRAWN, seed=4), replace(DRAWN, temperature=0.5)])
def test_other_options_draw_anew(model: Model, tmp_path: Path, sampling: Sampling) -> None:
    """Only the prompt's cache is of use to them."""
    text(model, tmp_path, 8)
    assert text(model, tmp_path, 8, sampling=sampling)[:2] == text(model, None, 8, sampling=sampling)[:2]
    assert text(model, tmp_path, 8)[:2] == text(model, None, 8)[:2]


def test_a_stop_text_or_an_end_is_not_part_of_what_is_kept(
    miniature: tuple[Path, Path], tmp_path: Path
) -> None:
    model, prompt = runner.load(miniature[1]), "SELECT name FROM"
    whole = list(model.generate(prompt, max_new_tokens=12))
    stop = Sampling(stop=("WHERE",))
    stopped = list(model.generate(prompt, max_new_tokens=12, sampling=stop, session=tmp_path))
    assert len(stopped) < len(whole)
    assert list(model.generate(prompt, max_new_tokens=12, session=tmp_path)) == whole
    again = model.generate(prompt, max_new_tokens=12, sampling=stop, session=tmp_path)
    assert list(again) == stopped and again.passes == 0 and again.stop_reason == "stop"


def test_the_lossless_form_goes_on_and_another_model_does_not(
    prepared, coded: tuple[Path, Path], tmp_path: Path
) -> None:
    from toolkit.commands.convert import convert

    convert(coded[0], tmp_path / "plain")
    prompt = [token % 290 + 4 for token in PROMPT]
    options = {"max_new_tokens": 6, "sampling": replace(DRAWN, logit_bias={})}
    plain = runner.load(tmp_path / "plain")
    first = list(plain.generate(prompt, session=tmp_path / "session", **options))
    lossless = runner.load(coded[1]).generate(prompt, session=tmp_path / "session", **options)
    assert list(lossless) == first and lossless.passes == 0
    with pytest.raises(BloomdeskError, match="session of another model"):
        runner.load(prepared()[1]).generate(prompt, session=tmp_path / "session", **options)


def test_a_full_disk_ends_the_writing_and_not_the_text(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = text(model, None, 10), []
    real = os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 7:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.warns(UserWarning, match="not written any more: No space left"):
        assert text(model, tmp_path, 10)[:2] == whole[:2]
    monkeypatch.undo()
    kept = SessionFiles.load(tmp_path)
    assert 0 < kept.positions < 159 and (tmp_path / CACHE).stat().st_size == kept.nbytes
    assert text(model, tmp_path, 10)[:2] == whole[:2]


@pytest.mark.parametrize("harm", ["edited", "cut", "foreign"])
def test_what_is_no_session_is_refused_and_left_alone(model: Model, tmp_path: Path, harm: str) -> None:
    text(model, tmp_path, 3)
    path = tmp_path / SESSION
    whole = path.read_bytes()
    if harm == "foreign":
        path.rename(tmp_path / "letter.txt")
    else:
        path.write_bytes(whole[:-9] if harm == "cut" else whole.replace(b'"seed": 3', b'"seed": 4'))
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    with pytest.raises(
        BloomdeskError, match="no session and is not empty" if harm == "foreign" else "not sound"
    ):
        text(model, tmp_path, 3)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_the_command_keeps_its_drawn_seed(miniature: tuple[Path, Path], tmp_path: Path) -> None:
    session = ["--session", tmp_path / "s"]
    command = ["generate", miniature[1], "John is 3 years", "--temperature", "1.2", "--json", *session]
    first = json.loads(run(*command, "--max-new-tokens", "4").stdout)
    again = json.loads(run(*command, "--max-new-tokens", "9").stdout)
    assert (
        again["seed"] == first["seed"] and again["token_ids"][: len(first["token_ids"])] == first["token_ids"]
    )
    shown = json.loads(run("info", tmp_path / "s", "--json").stdout)
    assert shown["token_ids"] == again["token_ids"] and shown["options"]["seed"] == first["seed"]
    assert "new ones" in run("info", tmp_path / "s").stdout
    (tmp_path / "p.txt").write_text("x\n")
    assert "one prompt" in refused(
        "generate", miniature[1], "--prompts", tmp_path / "p.txt", "--session", tmp_path / "s"
    )
    assert "one continuation" in refused(*command, "--n", "2")


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_text(miniature: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["generate", miniature[1], "John is 3 years older than", "--temperature", "1.1", "--seed", "5"]
    command += ["--ignore-eos", "--max-new-tokens", "40", "--speculate", "off", "--json"]
    whole = json.loads(run(*command).stdout)["token_ids"]
    for wanted in (20_000, 400_000):
        process = started(*command, "--session", tmp_path / "s")
        cache = tmp_path / "s" / CACHE
        while process.poll() is None and not (cache.exists() and cache.stat().st_size > wanted):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = json.loads(run(*command, "--session", tmp_path / "s").stdout)
    assert done["token_ids"] == whole and done["passes"] < 40


def test_no_directory_is_made_for_a_run_without_a_session(tmp_path: Path) -> None:
    assert SessionFiles.load(tmp_path / "absent").records == []
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("kind", ["a file", "a link that leads nowhere"])
def test_what_is_no_directory_is_no_session(model: Model, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    if kind == "a file":
        path.touch()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(BloomdeskError, match="s is not a directory") as raised:
        text(model, path)
    assert raised.value.hint == "give a new directory, or one of a session"


def test_a_session_that_can_never_be_written_does_not_end_the_text(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: SessionFiles, *_: object) -> None:
        raise PermissionError(13, "Permission denied")

    whole = text(model, None, 5)
    monkeypatch.setattr(SessionFiles, "begin", fail)
    with pytest.warns(UserWarning, match="not written any more: Permission denied"):
        assert text(model, tmp_path / "s", 5) == whole


def test_a_longer_prompt_gets_its_own_text_though_the_disk_takes_nothing(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens that are there are a part of the prompt then, and not what follows it."""
    ids = text(model, tmp_path, 8)[0]
    longer = [*PROMPT, *ids[:2], 7]
    whole = text(model, None, 5, longer)[:2]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.warns(UserWarning, match="not written any more: No space left"):
        assert text(model, tmp_path, 5, longer)[:2] == whole
    monkeypatch.undo()
    assert text(model, tmp_path, 5, longer)[:2] == whole


def test_a_text_that_another_process_has_begun_there_ends_the_writing(model: Model, tmp_path: Path) -> None:
    """Each gets its own text, and the session is of one of them alone."""
    other = [*PROMPT[:70], *tokens(40, 9)]
    wholes = [text(model, None, 10, prompt)[:2] for prompt in (PROMPT, other)]
    first = model.generate(PROMPT, max_new_tokens=10, sampling=DRAWN, session=tmp_path)
    begun = [next(first) for _ in range(3)]
    second = model.generate(other, max_new_tokens=10, sampling=DRAWN, session=tmp_path)
    next(second)
    with pytest.warns(UserWarning, match="another process has written there"):
        assert [*begun, *first] == wholes[0][0]
    assert [*second.sequence.ids[:1], *second] == wholes[1][0]
    assert text(model, tmp_path, 10, other) == (*wholes[1], 0)
    assert text(model, tmp_path, 10)[:2] == wholes[0]


def test_records_of_another_text_count_as_nothing(model: Model, tmp_path: Path) -> None:
    """As of two processes that wrote into one session."""
    whole = text(model, tmp_path / "one", 6)
    text(model, tmp_path / "other", 6, [*PROMPT[:-1], 8])
    (tmp_path / "one" / CACHE).write_bytes((tmp_path / "other" / CACHE).read_bytes())
    assert text(model, tmp_path / "one", 6)[:2] == whole[:2]


def test_a_session_that_another_process_uses_is_refused(miniature: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["generate", miniature[1], "John", "--max-new-tokens", "2", "--session", tmp_path]
    with sole_writer(tmp_path):
        assert "another bloomdesk is writing there" in refused(*command)
    assert run(*command).stdout


def test_what_a_kill_or_a_system_leaves_in_a_new_session_is_no_hindrance(
    model: Model, tmp_path: Path
) -> None:
    for name in (CACHE, SESSION + ".incomplete", ".DS_Store"):
        (tmp_path / name).write_bytes(b"left")
    (tmp_path / "lost+found").mkdir()
    whole = text(model, tmp_path, 5)
    assert whole == text(model, None, 5) and text(model, tmp_path, 5) == (*whole[:2], 0)


@pytest.mark.parametrize("kind", ["a directory", "a pipe", "a device"])
def test_a_cache_that_is_no_file_is_named(model: Model, tmp_path: Path, kind: str) -> None:
    text(model, tmp_path, 2)
    path = tmp_path / CACHE
    path.unlink()
    if kind == "a directory":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(BloomdeskError, match=r"cache\.bin is not a regular file"):
        text(model, tmp_path, 2)
