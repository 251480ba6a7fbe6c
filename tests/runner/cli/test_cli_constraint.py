"""`--json-schema`, `--regex` and `--grammar`: what they take, give, refuse and resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.torture.grammar import CASES, Case
from tests.support.commands import refused, run

PERSON, _, DATE, _, SUM, _ = CASES


@pytest.fixture
def directory(prepared) -> Path:
    return prepared()[1]


def option(case: Case, folder: Path) -> list[str | Path]:
    """The option of the command for a case, with its file."""
    name = f"--{case.field.replace('_', '-')}"
    if case.field == "regex":
        return [name, case.text]
    (folder / case.name).write_text(case.text)
    return [name, folder / case.name]


@pytest.mark.parametrize("case", [PERSON, DATE, SUM], ids=lambda case: case.name)
def test_the_output_is_valid_and_its_report_says_so(directory: Path, tmp_path: Path, case: Case) -> None:
    command = ["generate", directory, "le", *option(case, tmp_path), "--temperature", "1.5", "--seed", "4"]
    shown = run(*command, "--max-new-tokens", "150")
    assert case.is_valid(shown.stdout.removesuffix("\n"))
    found = json.loads(run(*command, "--max-new-tokens", "150", "--json").stdout)
    assert found["text"] + "\n" == shown.stdout
    assert found["valid"] is True and found["stop_reason"] in ("grammar", "eos")
    assert found["passes"] < len(found["token_ids"])
    cut = json.loads(run(*command, "--max-new-tokens", "2", "--json").stdout)
    assert cut["token_ids"] == found["token_ids"][:2]
    assert (cut["stop_reason"], cut["valid"]) == ("length", case is SUM and case.is_valid(cut["text"]))


def test_without_a_constraint_nothing_is_said_of_it(directory: Path) -> None:
    assert "valid" not in json.loads(
        run("generate", directory, "le", "--max-new-tokens", "1", "--json").stdout
    )


def test_each_line_of_prompts_may_have_its_own_and_results_resume(directory: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "le", "json_schema": json.loads(PERSON.text)},
        {"prompt": "la", "regex": DATE.text, "temperature": 0.7},
        {"prompt": "il", "grammar": SUM.text, "n": 2},
        {"prompt": "on"},
    ]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [
        "generate",
        directory,
        "--prompts",
        prompts,
        "--out",
        out,
        "--temperature",
        "1.5",
        "--seed",
        "3",
    ]
    command += ["--regex", "[a-z]{3,9}", "--max-new-tokens", "150"]
    assert run(*command).returncode == 0
    whole = out.read_bytes().splitlines(keepends=True)
    found = {(line["index"], line.get("choice")): line for line in map(json.loads, whole)}
    assert all(line["valid"] for line in found.values()) and len(found) == 5
    for key, case in (((0, None), PERSON), ((1, None), DATE), ((2, 0), SUM), ((2, 1), SUM)):
        assert case.is_valid(found[key]["text"])
    assert 3 <= len(found[3, None]["text"]) <= 9
    for kept in range(5):
        out.write_bytes(b"".join(whole[:kept]))
        assert run(*command, "--speculate", "off", "--batch", "1").returncode == 0
        again = {
            (line["index"], line.get("choice")): line
            for line in map(json.loads, out.read_bytes().splitlines())
        }
        assert {key: line["token_ids"] for key, line in again.items()} == {
            key: line["token_ids"] for key, line in found.items()
        }


def test_a_session_knows_its_constraint(directory: Path, tmp_path: Path) -> None:
    session = tmp_path / "s"
    command = ["generate", directory, "le", "--json", "--max-new-tokens", "150", "--session", session]
    constrained = [*command, *option(PERSON, tmp_path)]
    first = json.loads(run(*constrained).stdout)
    again = json.loads(run(*constrained).stdout)
    assert again["passes"] == 0
    assert (again["text"], again["valid"]) == (first["text"], True)
    shown = run("info", session).stdout
    assert "json_schema" in shown and json.loads(run("info", session, "--json").stdout)["options"][
        "json_schema"
    ] == (PERSON.text)
    other = json.loads(run(*command, "--regex", DATE.text).stdout)
    assert DATE.is_valid(other["text"]) and other["passes"] > 0


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("--json-schema", '{"type": "strin"}', "the JSON schema cannot be used: Invalid type: strin"),
        ("--json-schema", "{", "not valid JSON"),
        ("--grammar", "start: foo", 'unknown name: "foo"'),
        ("--grammar", b"\xff", "not valid UTF-8"),
        ("--grammar", None, "is missing"),
    ],
)
def test_an_unsound_file_is_named_with_the_reason(
    directory: Path, tmp_path: Path, name: str, text: str | bytes | None, reason: str
) -> None:
    path = tmp_path / "constraint"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refused("generate", directory, "le", name, path)
    assert reason in said and str(path) in said


def test_wrong_options_are_one_sentence(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", directory, "le"]
    (tmp_path / "schema").write_text("{}")
    schema = ["--json-schema", tmp_path / "schema"]
    assert "unclosed group" in refused(*command, "--regex", "(a")
    assert "--json-schema and --regex exclude each other" in refused(*command, *schema, "--regex", "a")
    assert "json_schema and ignore_eos exclude each other" in refused(*command, *schema, "--ignore-eos")
    prompts = tmp_path / "p.jsonl"
    for line, reason in (
        ({"regex": "(a"}, "line 2: the regular expression cannot be used"),
        ({"regex": "a", "grammar": "b"}, "line 2: regex and grammar exclude each other"),
        ({"json_schema": 3}, 'line 2: "json_schema" is a text, or an object'),
        ({"regx": "a"}, 'did you mean "regex"'),
    ):
        prompts.write_text("\n" + json.dumps({"prompt": "x", **line}) + "\n")
        assert reason in refused("generate", directory, "--prompts", prompts)
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    assert "pip install 'bloomdesk[grammar]'" in refused(*command, "--regex", "a")
