"""What the benchmarks make of their turns, and what they measure on; no timing is tested."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

import runner
from runner.estimate import family
from runner.format.layout import block_file
from runner.format.manifest import load_manifest
from scripts.bench import batch as bench_batch
from scripts.bench import form_products
from scripts.bench import growth as bench_growth
from scripts.bench import product as bench_product
from scripts.bench import self_draft as bench_self_draft
from scripts.bench import speculation as bench_speculation
from scripts.bench import true_size as bench_true_size
from scripts.bench.harness import Point, Run, Turn, table
from scripts.bench.peers import forms
from scripts.bench.true_size import share_for
from scripts.bench.turns import Limits
from scripts.miniature.texts import draw_texts
from toolkit.commands.convert import convert
from toolkit.commands.verify import verify

ROOT = Path(__file__).resolve().parents[2]


def test_the_first_blocks_of_a_checkpoint_are_a_checkpoint(made: Path, tmp_path: Path) -> None:
    cut = bench_growth.first_blocks(made, tmp_path / "cut", 2)
    assert load_manifest(cut).model.n_layer == 2
    assert json.loads((cut / "config.json").read_text())["n_layer"] == 2
    assert verify(cut).sound
    assert (made / block_file(1, 3)).samefile(cut / block_file(1, 2))
    assert len(list(runner.load(cut).generate([5, 6, 7], max_new_tokens=2))) == 2
    assert verify(made).sound


def true_size_turn(limits: Limits, seconds: list[float], reading: float = 9.0) -> Turn:
    streamed = 1.8e9
    report = {
        "seconds": [99.0, *seconds],
        "read_bytes": [0, *[streamed] * len(seconds)],
        "reading_seconds": [reading] * len(seconds),
        "streamed_bytes": streamed,
        "process_bytes": 400_000_000,
        "peak_rss": 7,
    }
    plan = {
        "forecast": {"seconds_per_token": 2.0},
        "rates": {"disk": 1e9, "memory": 20e9, "compute": 50e9, "decoded": 8e9, "int8": 9e9, "int4": 9e9},
    }
    return Turn(report=report, point=str(limits), round=1, disk_rates=[0.8e9, 0.9e9], forecast=plan)


def test_true_size_shares_and_extrapolation(made: Path) -> None:
    braked, free = Limits(2 * 10**9, 1.073e9), Limits(2 * 10**9, None)
    run = Run(argparse.Namespace(), made, [Point(str(each), [], each, made) for each in (braked, free)])
    run.turns = [
        true_size_turn(braked, [2.0, 4.0, 3.0]),
        true_size_turn(braked, [2.5, 2.5, 2.5]),
        true_size_turn(free, [2.2, 2.2, 2.2]),
        true_size_turn(free, [1.5, 1.5, 1.5], reading=1.2),
    ]
    first, second = run.measured(bench_true_size.BENCHMARK)
    assert (first["seconds"], first["rounds"]) == (2.5, [3.0, 2.5])
    assert first["limit"] == pytest.approx(1.8 / 0.9)
    assert first["share"] == pytest.approx(median([2 / 3, 2 / 2.5]))
    # The disk gave 0.9 GB/s around one turn, and 1.5 to the stream of the other while it read.
    assert second["share"] == pytest.approx(median([1.8 / 0.9 / 2.2, 1.2 / 1.5]))
    assert first["forecast_ratio"] == pytest.approx(median([2 / 3, 2 / 2.5]))
    rows = bench_true_size.extrapolated(run)
    assert [row["drive"] for row in rows] == list(bench_true_size.DRIVES)
    whole = family.hyperparameters("bloom")
    for row, share in zip(rows, (first["share"], second["share"], second["share"]), strict=True):
        assert row["seconds"] == pytest.approx(
            max(row["streamed_bytes"] / row["drive"], 352.494e9 / 20e9) / share
        )
        matrices = bench_true_size.weight_bytes(whole) - bench_true_size.vector_bytes(whole)
        assert row["streamed_bytes"] + row["resident_bytes"] == matrices
        assert 350e9 < row["streamed_bytes"] < matrices
    assert "| 2 GB, 1.073 GB/s | 2.50 |" in table(bench_true_size.COLUMNS, [first, second])
    assert table(bench_true_size.EXTRAPOLATED, rows).count("\n") == 4


def test_the_share_is_the_one_reached_at_such_a_drive() -> None:
    rows = [
        {"disk": 1e9, "share": 0.9, "limit": 2.0},
        {"disk": None, "share": 0.8, "limit": 1.0},
        {"disk": 2e9, "share": 0.0, "limit": 0.0},
    ]
    assert [share_for(drive, rows) for drive in (0.5e9, 1e9, 2e9)] == [0.9, 0.9, 0.8]
    assert share_for(1e9, rows[2:]) == 1.0
    assert share_for(1e9, [{"disk": 1e9, "share": 1.2, "limit": 2.0}]) == 1.0


def test_the_prompts_of_the_speculation() -> None:
    unseen = bench_speculation.unseen(200)
    assert len(set(unseen)) == 200
    assert sum(prompt.startswith("The SQL") for prompt in unseen) == 67
    texts = draw_texts("sql", bench_speculation.TEXTS, bench_speculation.TEXT_SEED, unseen=True)
    edits, tables = bench_speculation.edits(texts, 24), bench_speculation.tables(texts, 24)
    assert len(set(edits)) == len(set(tables)) == 24
    answers = {text.prompt: text.answer for text in texts}
    for prompt in edits:
        command, question = prompt.split("\n")
        condition = answers[question].split("WHERE ")[1].split(" ORDER BY")[0]
        assert condition in command and not command.endswith(answers[question])
    for prompt in tables:
        *rows, question = prompt.split("\n")
        assert len(rows) == 3 and question in answers
        assert not any(row.startswith(question) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("way", bench_speculation.WAYS, ids=lambda way: way.name)
def test_the_speculation_compares_answers(
    way: bench_speculation.Way, miniature: tuple[Path, Path], draft: tuple[Path, Path]
) -> None:
    model = runner.load(miniature[1])
    prompts = bench_speculation.prompt_sets(1, 1)["edit"]
    plain, expected = bench_speculation.measure(model, draft[1], "edit", prompts, bench_speculation.PLAIN, ())
    assert plain["passes"] == plain["tokens"] == len(expected[0])
    result, answers = bench_speculation.measure(model, draft[1], "edit", prompts, way, expected)
    assert (result["identical"], answers, result["tokens"]) == (1, expected, plain["tokens"])
    assert result["passes"] <= plain["passes"]
    other = [[*expected[0][:-1], expected[0][-1] + 1]]
    assert bench_speculation.measure(model, draft[1], "edit", prompts, way, other)[0]["identical"] == 0


def batch_turn(way: str, ids: list[list[int]], passes: list[tuple[float, int, bool]]) -> Turn:
    report = {
        "passes": [
            {"seconds": seconds, "tokens": tokens, "prompt": prompt, "read_bytes": 5}
            for seconds, tokens, prompt in passes
        ],
        "ids": ids,
        "batch": len(ids),
        **dict.fromkeys(("proposed", "accepted", "drafting_seconds", "streamed_bytes", "draft_bytes"), 0),
    }
    return Turn(report=report, point=way, round=1)


def test_batches_are_counted_without_the_prompts_passes(made: Path, tmp_path: Path) -> None:
    points = [Point(way, [], Limits(None, None), made) for way in list(bench_batch.WAYS)[:3]]
    run = Run(argparse.Namespace(), made, points)
    run.turns = [
        batch_turn("one prompt", [[1, 2, 3]], [(9.0, 1, True), (2.0, 1, False), (2.0, 1, False)]),
        batch_turn("batch", [[1, 2], [8, 9]], [(9.0, 2, True), (2.5, 2, False)]),
        batch_turn("batch, lookup", [[1, 2], [8, 7]], [(9.0, 2, True), (2.5, 2, False)]),
    ]
    one, batch, lookup = run.measured(bench_batch.BENCHMARK)
    assert (one["tokens_per_second"], batch["tokens_per_second"]) == (0.5, 0.8)
    assert batch["times_plain"] == pytest.approx(1.6)
    assert (one["same"], batch["same"], lookup["same"]) == ("same", "same", "DIFFERENT")
    measured = [
        {"point": "bloomdesk", "seconds": 1.0},
        {"point": "slow", "seconds": 8.0},
        {"point": "quick", "seconds": 4.0},
        {"point": "failed", "failure": "killed"},
    ]
    (tmp_path / "peers.json").write_text(json.dumps({"measured": measured}))
    rows = [{"point": bench_batch.TOGETHER, "tokens_per_second": 2.5}]
    text = bench_batch.beside_peers(rows, tmp_path / "peers.json")
    assert text == "The best peer, quick: 0.250 tokens a second; all means together are 10.0 times that."


def test_a_form_that_drafts_is_compared_with_none(made: Path) -> None:
    points = [
        Point(f"{drawing}{draft}", [], Limits(None, None), made)
        for drawing in ("greedy, lossless", "drawn, lossless")
        for draft in ("", ", int4 draft")
    ]
    run = Run(argparse.Namespace(), made, points)
    run.turns = [
        batch_turn("greedy, lossless", [[1, 2]], [(9.0, 1, True), (2.0, 1, False)]),
        batch_turn("greedy, lossless, int4 draft", [[1, 2]], [(9.0, 1, True), (3.0, 3, False)]),
        batch_turn("drawn, lossless", [[1, 7]], [(9.0, 1, True), (2.0, 1, False)]),
        batch_turn("drawn, lossless, int4 draft", [[1, 8]], [(9.0, 1, True), (1.0, 2, False)]),
    ]
    rows = run.measured(bench_self_draft.BENCHMARK)
    assert [each["times_without"] for each in rows] == [None, 2.0, None, 4.0]
    assert [each["same"] for each in rows] == ["same", "same", "same", "DIFFERENT"]


@pytest.mark.slow
def test_passes_of_given_prompts_in_little_ram_with_a_form_as_draft(made: Path, tmp_path: Path) -> None:
    """One prompt at a time, each with a pass of its own; the draft fits, and the rest is streamed."""
    draft = tmp_path / "int4"
    convert(made, draft, form="int4")
    (tmp_path / "prompts.json").write_text("[[5, 6, 7], [8, 9]]")
    command = [
        sys.executable,
        "-m",
        "scripts.bench.peers.batch_passes",
        made,
        "--prompt",
        "0",
        "--tokens",
        "9",
    ]
    settings = {"prompts": tmp_path / "prompts.json", "temperature": 1, "weights": 3_700_000, "chunk": 9000}
    found = []
    for more in ({}, {"draft": draft}):
        words = [word for item in {**settings, **more}.items() for word in ("--set", "{}={}".format(*item))]
        done = subprocess.run([*map(str, command), "--threads", "1", *words], check=True, capture_output=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    plain, drafted = found
    assert plain["ids"] == drafted["ids"] and len(plain["ids"]) == 2
    assert plain["draft_bytes"] == 0 < drafted["draft_bytes"]
    assert sum(each["prompt"] for each in plain["passes"]) == 2 and plain["batch"] == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="the plots extra is not installed")
def test_pictures_are_the_same_bytes_for_the_same_results(tmp_path: Path) -> None:
    row = {"line": "blocks", "ram": 1e9, "disk": 1e9, "seconds": 2.0, "rounds": [1.9, 2.2], "limit": 1.8}
    rows = [{**row, "x": 6}, {**row, "x": 12, "seconds": 4.0}]
    (tmp_path / "growth.json").write_text(json.dumps({"benchmark": "growth", "measured": rows}))
    pictures = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-m", "scripts.bench.plot", tmp_path / "growth.json"]
        subprocess.run([*command, "--out", tmp_path / name], check=True, capture_output=True)
        pictures.append((tmp_path / name / "performance-blocks.svg").read_bytes())
    assert pictures[0] == pictures[1]
    assert b"seconds a token</text>" in pictures[0]


def test_the_room_that_forms_take(made: Path, tmp_path: Path) -> None:
    there = sum(path.stat().st_size for path in made.iterdir())
    assert forms.bytes_to_make(tmp_path, made, None, None) == 0
    assert forms.bytes_to_make(tmp_path, made, None, None, ["hub", "torch"]) == 2 * there
    assert forms.bytes_to_make(tmp_path, None, made, None, ["hub"]) == 2 * there
    (tmp_path / "hub").mkdir()
    assert 12.0e9 < forms.bytes_to_make(tmp_path, None, None, "bloom-3b", ["hub"]) < 12.1e9


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_products_of_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "product.json"
    given = ["--mb", "2", "--rounds", "1", "--threads", "2", "--rows", "1,3", "--columns", "72,300"]
    bench_product.main([*given, "--json", str(out)])
    measured = json.loads(out.read_text())["measured"]
    assert [(each["rows"], each["columns"]) for each in measured] == [(1, 72), (3, 72), (1, 300), (3, 300)]
    ways = {
        "bloomdesk, threads: 1",
        "bloomdesk, threads: 2",
        "torch, threads: 2",
        "the memory",
        "the multipliers",
    }
    assert all(set(each["rates"]) == ways and min(each["rates"].values()) > 0 for each in measured)
    assert capsys.readouterr().out.count("| rows | 1 | 3 |") == 2


def test_products_of_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "forms.json"
    given = ["--rounds", "1", "--threads", "2", "--rows", "1,3", "--outputs", "30", "--columns", "320"]
    form_products.main([*given, "--json", str(out)])
    measured = json.loads(out.read_text())["measured"]
    assert [each["form"] for each in measured[:5]] == ["plain", "lossless", "int8", "int4", "int5"]
    assert len(measured) == 5 * 2 * 2
    assert all(
        each["share"] == pytest.approx(each["bytes"] / each["memory"]) and each["weights"] > 0
        for each in measured
    )
    assert capsys.readouterr().out.count("| int4 |") == 4
