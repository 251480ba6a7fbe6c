"""Scores of given texts: the reference's, in any company and any RAM."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import runner
from runner.generation.memory_plan import memory_plan
from runner.generation.scorer import Scorer, Text, plan_scoring, windows
from runner.generation.scoring import score
from tests.support.commands import refused, run
from tests.support.prompts import tokens


def some_texts(count: int) -> list[Text]:
    source = random.Random(3)
    found = []
    for index in range(count):
        ids = tokens(source.randint(2, 40), index)
        found.append(Text(index, ids, source.randint(1, len(ids) - 1)))
    return found


def alone(model, text: Text) -> list:
    rows = model.forward(text.ids[:-1], model.cache(text.rows), all_rows=True)[text.first - 1 :]
    return [score(row, token, 1) for row, token in zip(rows, text.ids[text.first :], strict=True)]


@pytest.mark.parametrize("rows", [1, 3, 17, 400])
def test_scores_do_not_depend_on_the_company(prepared, rows: int) -> None:
    """Whatever fits into a pass, and wherever a text is cut."""
    model = runner.load(prepared()[1])
    texts = some_texts(12)
    plan = plan_scoring(model.memory_request([1], 1), texts)
    request = plan.request
    for logit_rows in {1, rows}:
        small = memory_plan(
            type(request)(
                **{**request.__dict__, "rows": rows, "logit_rows": logit_rows, "capacities": (48, 64)}
            )
        )
        scorer = Scorer(model, texts, small)
        found = list(scorer.run())
        assert [each.text.index for each in found] == list(range(12))
        assert [each.scores for each in found] == [alone(model, text) for text in texts]
        assert scorer.passes >= sum(text.rows for text in texts) / rows


def test_an_interrupted_pass_is_made_again(prepared) -> None:
    model = runner.load(prepared()[1])
    texts, calls = some_texts(3), []

    def interrupt(part: int, parts: int) -> None:
        calls.append(part)
        if len(calls) == 2:
            raise KeyboardInterrupt

    scorer = model.scorer(texts, interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(scorer.run())
    assert [each.scores for each in scorer.run()] == [alone(model, text) for text in texts]


@pytest.mark.parametrize(("context", "stride"), [(10, 9), (10, 3), (100, 7), (2, 1)])
def test_windows_score_every_token_but_the_first_once(context: int, stride: int) -> None:
    ids = list(range(50))
    found = list(windows(ids, context, stride))
    scored = [token for text in found for token in text.ids[text.first :]]
    assert scored == ids[1:]
    assert all(1 <= text.first < len(text.ids) <= context for text in found)
    assert list(windows([1], 10, 5)) == []


@pytest.fixture(scope="module")
def files(miniature: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A long text, and lines of texts."""
    directory = tmp_path_factory.mktemp("texts")
    text = "SELECT name FROM employees WHERE name LIKE 'A%'; thank you for your help, John is older. " * 5
    (directory / "long.txt").write_text(text)
    lines = [
        {"text": "SELECT name FROM employees"},
        {"context": "SELECT name FROM ", "continuation": "employees WHERE", "id": "b"},
        {"context": "", "continuation": "thank you"},
        {"context": "John", "continuation": " is older"},
    ]
    (directory / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory / "long.txt", directory / "lines.jsonl"


def test_a_perplexity_is_the_references(miniature: tuple[Path, Path], files: tuple[Path, Path]) -> None:
    done = run("score", miniature[1], files[0], "--context", "40", "--stride", "15", "--json")
    found = json.loads(done.stdout)
    model = AutoModelForCausalLM.from_pretrained(miniature[0], dtype="auto")
    ids = torch.tensor(runner.load(miniature[1]).tokenizer.encode(files[0].read_text()))
    expected, before = 0.0, 1
    for begin in range(0, len(ids), 15):
        window = ids[begin : begin + 40]
        end = begin + len(window)
        with torch.inference_mode():
            logprobs = model(window[None]).logits[0].float().log_softmax(-1)
        for place in range(before - begin, len(window)):
            expected += float(logprobs[place - 1, window[place]])
        before = end
        if end == len(ids):
            break
    assert found["tokens"] == len(ids) - 1
    assert found["logprob"] == pytest.approx(expected, rel=0.01)
    assert found["perplexity"] == pytest.approx(math.exp(-found["logprob"] / found["tokens"]))
    assert "bits a byte" in run("score", miniature[1], files[0], "--context", "40").stdout


def test_lines_are_scored_and_a_rerun_goes_on(
    miniature: tuple[Path, Path], files: tuple[Path, Path], tmp_path: Path
) -> None:
    out, command = tmp_path / "out.jsonl", ["score", miniature[1], files[1]]
    printed = [json.loads(line) for line in run(*command).stdout.splitlines()]
    assert run(*command, "--out", out).returncode == 0
    whole = out.read_bytes()
    found = [json.loads(line) for line in whole.splitlines()]
    added = {"text_sha256", "model"}
    assert [{key: line[key] for key in line if key not in added} for line in found] == printed
    text, named, empty, last = found
    assert text["token_logprobs"][0] is None and len(text["tokens"]) == len(text["token_logprobs"])
    assert named["id"] == "b" and None not in named["token_logprobs"]
    assert named["logprob"] == sum(named["token_logprobs"])
    # The space at the end of the context belongs to the continuation.
    tokenizer = runner.load(miniature[1]).tokenizer
    assert tokenizer.decode(named["tokens"]) == " employees WHERE"
    assert (
        tokenizer.decode(empty["tokens"]) == "thank you" and tokenizer.decode(last["tokens"]) == " is older"
    )
    for kept in range(4):
        lines = whole.splitlines(keepends=True)
        out.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        assert run(*command, "--out", out).returncode == 0
        assert out.read_bytes() == whole


def test_a_long_text_goes_on(miniature: tuple[Path, Path], files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = ["score", miniature[1], files[0], "--context", "40", "--stride", "15", "--json", "--out", out]
    first = run(*command).stdout
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    assert run(*command).stdout == first and out.read_bytes() == whole
    (tmp_path / "other.txt").write_text("another text of some tokens")
    assert "does not hold results" in refused("score", miniature[1], tmp_path / "other.txt", "--out", out)
    # Windows of other lengths would not be those of one perplexity.
    assert "the context is 40, that" in refused(*command[:3], "--context", "50", "--out", out)
    assert "the stride is 15, that" in refused(*command[:5], "--stride", "20", "--out", out)
    assert out.read_bytes() == whole


def test_results_of_another_model_are_not_taken_for_this_ones(
    prepared, made: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    texts, prompts = tmp_path / "texts.jsonl", tmp_path / "prompts.txt"
    texts.write_text('{"text": "a b c"}\n')
    prompts.write_text("a b\n")
    generate = ["--prompts", prompts, "--max-new-tokens", "1"]
    for name, command in {"score": [texts], "generate": generate}.items():
        out = tmp_path / f"{name}.jsonl"
        assert run(name, made, *command, "--out", out).returncode == 0
        assert "it is of another model" in refused(name, prepared()[1], *command, "--out", out)
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line.pop("model") for line in lines] == [runner.load(made).weights.fingerprint[:16]]
        # As older versions wrote it.
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert run(name, made, *command, "--out", out).returncode == 0


def test_ends_of_lines_are_scored_as_they_are(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"Hello\r\nworld\r\n")
    count = len(runner.load(made).tokenizer.encode("Hello\r\nworld\r\n"))
    assert json.loads(run("score", made, path, "--json").stdout)["tokens"] == count - 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.jsonl", ["--context", "5"], "--context and --stride are for a long text"),
        ("a.jsonl", ["--stride", "5"], "--context and --stride are for a long text"),
        ("a.txt", ["--context", "1"], "--context must be at least 2 tokens, found 1"),
        ("a.txt", ["--context", "4", "--stride", "4"], "--stride must be at least 1 and below --context"),
        ("a.txt", ["--out", "scores.txt"], "a name that ends in .jsonl"),
        ("a.jsonl", ["--out", "a.jsonl"], "is the file that is read"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text('{"text": "a b c"}\n')
    assert message in refused("score", made, name, *options)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "fewer than 2 tokens"),
        ("a.jsonl", "", "holds no text"),
        ("a.csv", "x", "must end in .txt or .jsonl"),
        ("a.jsonl", '{"text": "x", "context": "y", "continuation": "z"}', "line 1: expected"),
        ("a.jsonl", '{"context": "y"}', "line 1: expected"),
        ("a.jsonl", '{"text": 3}', "line 1: expected"),
        ("a.jsonl", '\n{"text": ""}', "line 2: no token is left to score"),
        ("a.jsonl", '{"context": "a", "continuation": ""}', "line 1: no token is left to score"),
        ("a.jsonl", "[]", "line 1: expected"),
        ("a.jsonl", '{"text": "a\\ud800 b"}', "line 1: not valid UTF-8 text"),
        ("a.jsonl", '{"text": "a b", "continuaton": "c"}', 'line 1: unknown "continuaton"'),
        ("a.jsonl", '{"text": "a b", "text": "c d"}', 'line 1: "text" is there twice'),
        ("a.jsonl", '{"id": 1, "text": "a b"}\n' * 2, "line 2: the id 1 is that of line 1"),
    ],
)
def test_what_cannot_be_scored_is_named(
    miniature: tuple[Path, Path], tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    assert message in refused("score", miniature[1], tmp_path / name)
