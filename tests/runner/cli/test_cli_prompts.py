"""`generate --prompts` as a user runs it: results as they are done, a kill, Ctrl-C, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

import runner
from tests.support.commands import COMMAND, refused, run, screen_of, started
from tests.toolkit.cli.test_cli import REPORT_KEYS

WORDS = ("books", "users", "orders", "movies", "students", "cities")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    text = "The SQL command to list all the {} whose year is 1999 is:"
    lines = [{"prompt": text.format(word), "max_new_tokens": 6 + at} for at, word in enumerate(WORDS)]
    lines[2]["id"] = "third"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def given(miniature: tuple[Path, Path], prompts: Path) -> tuple[str | Path, ...]:
    """The command without --out."""
    return "generate", miniature[1], "--prompts", prompts


@pytest.fixture(scope="module")
def wanted(miniature: tuple[Path, Path], prompts: Path) -> list[list[int]]:
    model, found = runner.load(miniature[1]), []
    for line in map(json.loads, prompts.read_text().splitlines()):
        generation = model.generate(line["prompt"], max_new_tokens=line["max_new_tokens"], speculate="off")
        found.append(list(generation))
    return found


def by_index(text: str) -> dict[int, dict[str, object]]:
    found = [json.loads(line) for line in text.splitlines()]
    assert len({each["index"] for each in found}) == len(found)
    return {each["index"]: each for each in found}


@pytest.mark.slow
def test_results_are_those_of_each_prompt_alone(given, wanted: list[list[int]], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = run(*given, "--out", out, "--batch", "4", "--draft", given[1])
    notes = (
        f"{given[1]} is its own draft, which costs as much as it saves: "
        "give a smaller BLOOM, or its int4 form, which bloomdesk convert makes\n"
        f"{out} has the results of 6 of 6 prompts\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", notes)
    found = by_index(out.read_text())
    assert [found[index]["token_ids"] for index in range(6)] == wanted
    assert list(found[0]) == ["index", "model", *REPORT_KEYS]
    assert list(found[2]) == ["index", "model", "id", *REPORT_KEYS]
    before = out.stat().st_mtime_ns
    assert run(*given, "--out", out).returncode == 0
    assert out.stat().st_mtime_ns == before  # nothing was left to do
    assert "is the file that is read" in refused(*given, "--out", given[-1])


@pytest.mark.slow
def test_results_on_standard_output(given, wanted: list[list[int]]) -> None:
    done = run(*given, "--speculate", "off")
    assert (done.returncode, done.stderr) == (0, "")
    found = by_index(done.stdout)
    assert [found[index]["token_ids"] for index in range(6)] == wanted
    assert all(each["proposed"] == 0 and each["acceptance"] is None for each in found.values())


def begun(given: tuple[str | Path, ...], out: Path) -> subprocess.Popen[str]:
    """A run that has written at least one result, and is not through."""
    process = started(*given, "--out", out, "--batch", "1")
    deadline = time.monotonic() + 60
    while not (out.exists() and b"\n" in out.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return process


@pytest.mark.slow
def test_a_killed_run_resumes(given, wanted: list[list[int]], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with begun(given, out) as process:
        process.kill()
    kept = out.read_bytes()
    assert 1 <= kept.count(b"\n") < 6
    out.write_bytes(kept + b'{"index": 5, "prom')  # as if the kill had come while it wrote
    assert run(*given, "--out", out).returncode == 0
    assert out.read_bytes().startswith(kept)
    found = by_index(out.read_text())
    assert [found[index]["token_ids"] for index in range(6)] == wanted


@pytest.mark.slow
def test_an_interrupted_run_says_how_far_it_came(given, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with begun(given, out) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    done = len(out.read_text().splitlines())
    assert errors == f"interrupted: {done} of 6 prompts are done\n"


@pytest.mark.slow
def test_progress_on_a_terminal(given, tmp_path: Path) -> None:
    screen = screen_of(*given, "--out", tmp_path / "o.jsonl", "--batch", "2")
    first, *_, last = screen.replace("\r\n", "\n").strip().split("\n")
    assert first.startswith("(RAM ") and "all weights stay; batch 2; speculation lookup" in first
    assert "0 of 6 prompts done, 2 in the batch, 4 waiting [part " in screen
    assert "6 prompts, " in last and "tokens a second" in last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "a PROMPT, a --prompt-file or a file of --prompts"),
        (["a", "--prompts", "a.txt"], "a PROMPT, a --prompt-file or a file of --prompts"),
        (["a", "--out", "out.jsonl"], "--out and --batch are for a file of --prompts"),
        (["a", "--batch", "2"], "--out and --batch are for a file of --prompts"),
        (["a", "--batch", "0"], "a batch must be of at least 1 prompt"),
        (["a", "--speculate", "dice"], "unknown --speculate 'dice'"),
        (["a", "--draft", "nowhere"], "nowhere"),
        (["--prompts", "none.txt"], "none.txt is missing"),
        (["--prompts", "miniature/unseen.jsonl", "--out", "o.txt"], "give a name that ends in .jsonl"),
        (["--prompts", "miniature/unseen.jsonl", "--out", "no dir/o.jsonl"], "mkdir -p 'no dir'"),
    ],
)
def test_options_that_exclude_each_other_are_refused(
    miniature: tuple[Path, Path], options: list[str], message: str
) -> None:
    assert message in refused("generate", miniature[1], *options)


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ('{"prompt": ""}', [], "line 2: the prompt has no tokens"),
        ('{"prompt": "\\ud800"}', [], "line 2: the prompt is not valid UTF-8 text"),
        ('{"prompt": "a", "id": "a\\ud83d"}', [], 'line 2: the "id" is not valid UTF-8 text'),
        ('{"prompt": "a", "max_new_tokens": 1' + "0" * 400 + "}", [], "line 2: the number of new tokens"),
        ('{"prompt": "a", "max_new_tokens": 90000000}', ["--ram", "3GB"], "for the longest of the prompts"),
    ],
)
def test_a_bad_prompt_is_refused_with_its_line(
    miniature: tuple[Path, Path], tmp_path: Path, line: str, options: list[str], message: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "good"}}\n{line}\n')
    assert message in refused("generate", miniature[1], "--prompts", path, *options)


def test_options_that_do_not_go_together_are_named(
    miniature: tuple[Path, Path], draft: tuple[Path, Path]
) -> None:
    options = ["--max-new-tokens", "1", "--speculate", "off", "--draft", draft[1], "--ram", "900TB"]
    done = run("generate", miniature[1], "The", *options)
    assert done.returncode == 0
    off, ram = done.stderr.splitlines()
    assert off == f"--speculate off leaves out n-grams alone: {draft[1]} drafts"
    assert ram.startswith("--ram 900TB is more than this machine has, ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_prompts_of_standard_input(miniature: tuple[Path, Path], name: str) -> None:
    command = [*COMMAND, "generate", str(miniature[1]), "--prompts", name, "--max-new-tokens", "2"]
    done = subprocess.run(command, input=b"The\n\nA\n", capture_output=True, check=True)
    assert {found["prompt"] for found in map(json.loads, done.stdout.splitlines())} == {"The", "A"}


@pytest.mark.slow
def test_a_terminal_shows_texts_and_no_token_ids(given, wanted: list[list[int]]) -> None:
    screen = screen_of(*given[:2], "--prompts", given[-1], "--max-new-tokens", "2")
    assert "[third] The SQL command to list all the" in screen
    assert "token_ids" not in screen


def test_a_prompt_comes_from_a_file_or_from_standard_input(
    miniature: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, most = "The SQL command to show all the users is:", ("--max-new-tokens", "4", "--json")
    wanted = json.loads(run("generate", miniature[1], prompt, *most).stdout)["token_ids"]
    for text in (prompt, f"{prompt}\n", f"\ufeff{prompt}\r\n"):
        (tmp_path / "prompt.txt").write_bytes(text.encode())
        found = run("generate", miniature[1], "--prompt-file", tmp_path / "prompt.txt", *most)
        assert json.loads(found.stdout)["token_ids"] == wanted
        monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(text.encode())))
        report = json.loads(run("generate", miniature[1], "-", *most).stdout)
        assert report["token_ids"] == wanted and report["prompt"] == prompt
        assert len(report["token_seconds"]) == len(wanted) and min(report["token_seconds"]) >= 0
    (tmp_path / "prompt.txt").write_bytes(b"\xff\xfe")
    assert "prompt.txt: not valid UTF-8" in refused(
        "generate", miniature[1], "--prompt-file", tmp_path / "prompt.txt"
    )
    assert "nowhere is missing" in refused("generate", miniature[1], "--prompt-file", tmp_path / "nowhere")
    assert "one of them alone" in refused(
        "generate", miniature[1], "a", "--prompt-file", tmp_path / "prompt.txt"
    )


def test_a_prompt_file_may_be_standard_input_and_errors_name_it(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(data)))

    given(b"a b\n")
    assert run("generate", made, "--prompt-file", "-", "--max-new-tokens", "1").returncode == 0
    for data, message in (
        (b"\n", "standard input holds no prompt"),
        (b"a\n\xff\n", "standard input, line 2:"),
    ):
        given(data)
        assert message in refused("generate", made, "--prompts", "-")


def test_a_drawn_seed_is_reported_in_every_way_of_running(made: Path, tmp_path: Path) -> None:
    """Without it nobody could have the text again."""
    drawing = ["a b", "--max-new-tokens", "4", "--temperature", "1"]
    for options in ([], ["--n", "3"], ["--session", tmp_path / "s"]):
        first = run("generate", made, *drawing, *options)
        word, seed = first.stderr.split()
        again = run("generate", made, *drawing, *options, "--seed", seed)
        assert word == "seed" and again.stdout == first.stdout and not again.stderr
    assert not run("generate", made, *drawing, "--json").stderr


@pytest.mark.slow
def test_a_terminal_shows_the_seed_and_has_no_room_for_log_probabilities(made: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a b\n")
    command = ["generate", made, "--prompts", tmp_path / "p.txt", "--max-new-tokens", "1"]
    assert "seed " in screen_of(*command, "--temperature", "1")
    assert "log-probabilities have nowhere to go" in screen_of(*command, "--logprobs", "1")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_json_is_json_whatever_the_output_can_encode(made: Path, encoding: str) -> None:
    prompt = "The \U0001f600 \u4f60 \xe9"
    command = [*COMMAND, "generate", str(made), prompt, "--max-new-tokens", "1", "--json"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    assert json.loads(done.stdout.decode(encoding))["prompt"] == prompt
