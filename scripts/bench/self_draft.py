"""What the lossless form gains if the int4 form of the same model drafts for it, on a disk that is the limit.

    python -m scripts.bench.self_draft --work WORK --prepared PLAIN --texts held_out.txt --weights 16MB --disk 100MB/s
    python -m scripts.bench.self_draft --work WORK --like bloom-560m --ram 1.5GB --disk 1GB/s

The int4 form stays in RAM, and the lossless one is streamed with what is left. Ways:

    lossless                one prompt at a time, a token a pass
    int4 draft              the same with the int4 form as its draft
    batch of 16             --batch prompts at a time, of which there are --many
    batch of 16, int4 draft

each greedy, and drawn at temperature 1 with one seed. With and without a draft each prompt must get the same tokens.
Tokens a second are counted over the passes that carry no prompt. --texts has the prompts of a trained model, evenly
from all of the file; else they are random ids. --weights is the RAM for weights, buffers and the draft beside what
the process takes, for models that are much smaller than that; then chunks are small, too, so that they are streamed
as large ones are.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from runner.generation.speculation.policy import MOST_DRAFT_TOKENS
from runner.model.tokenizer import Tokenizer
from scripts.bench import harness
from scripts.bench.batch import steady, tokens_per_second
from scripts.bench.harness import Benchmark, Column, Point, Row, Run, Turn
from scripts.bench.peers import forms
from scripts.bench.turns import size

SMALL_CHUNK = 2**18
TEMPERATURES = {"greedy": 0.0, "drawn": 1.0}
COLUMNS = (
    Column("way", "point"),
    Column("tokens/s", "tokens_per_second", ".3f"),
    Column("range of rounds", "rounds", ".3f"),
    Column("x without", "times_without"),
    Column("tokens/pass", "tokens_per_pass"),
    Column("proposed", "proposed", "d"),
    Column("right", "acceptance", ".1%"),
    Column("s/pass", "seconds_per_pass", ".3f"),
    Column("drafting s", "drafting_seconds", ".1f"),
    Column("draft MB", "draft_bytes", ".1f", 1e6),
    Column("streamed MB", "streamed_bytes", ".1f", 1e6),
    Column("texts", "texts", "d"),
    Column("tokens", "same"),
)


def options(parser: argparse.ArgumentParser) -> None:
    harness.add_like(parser)
    harness.add_limits(parser)
    parser.add_argument("--texts", type=Path, metavar="FILE.txt", help="prompts are from there")
    parser.add_argument(
        "--weights", type=size, metavar="SIZE", help="RAM for weights and draft, in place of --ram"
    )
    parser.add_argument("--prompts", type=int, default=12, metavar="N", help="one at a time")
    parser.add_argument("--many", type=int, default=200, metavar="N", help="prompts of the batches")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="at a time")
    parser.add_argument("--tokens", type=int, default=48, metavar="N", help="new ones of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--ways", default="0,1,2,3,4,5,6,7", metavar="0,1,...")


def points(given: argparse.Namespace, work: Path) -> tuple[Path, list[Point]]:
    """The four ways greedy, then drawn."""
    prepared = harness.prepared(given, work, ["lossless", "int4"])
    lossless, draft = (
        forms.convert(prepared, work / form, "--form", form).resolve() for form in ("lossless", "int4")
    )
    prompts = _prompts(given, prepared)
    made = []
    for drawing, temperature in TEMPERATURES.items():
        for batch, count in ((1, given.prompts), (given.batch, given.many)):
            file = work / f"prompts-{count}.json"
            file.write_text(json.dumps(prompts[:count]))
            settings = {"batch": batch, "prompts": file, "temperature": temperature, "seed": 0}
            name = f"{drawing}, batch of {batch}" if batch > 1 else f"{drawing}, lossless"
            made.append(_point(given, name, lossless, settings))
            made.append(_point(given, f"{name}, int4 draft", lossless, {**settings, "draft": draft}))
    return prepared, [made[int(number)] for number in given.ways.split(",")]


def _point(given: argparse.Namespace, name: str, form: Path, settings: dict[str, Any]) -> Point:
    limits = harness.limits_of(None if given.weights else given.ram, given.disk)
    if given.weights:
        settings = {**settings, "weights": int(given.weights), "chunk": SMALL_CHUNK}
    command = harness.peer("batch_passes", form, [0], given.tokens, given, limits)
    return Point(name, [*command, *(word for item in settings.items() for word in ("--set", "=".join(map(str, item))))],
                 limits, form)  # fmt: skip


def _prompts(given: argparse.Namespace, prepared: Path) -> list[list[int]]:
    """Prompts of the same length, of a text or of random ids."""
    count, length = max(given.prompts, given.many), given.prompt_tokens
    if given.texts is None:
        ids = harness.prompt_of(prepared, count * length)
    else:
        ids = Tokenizer(prepared / "tokenizer.json").encode(given.texts.read_text())
    step = len(ids) // count
    return [ids[step * number :][:length] for number in range(count)]


def row(run: Run, point: Point, done: list[Turn], rows: list[Row]) -> Row:
    """Medians over the rounds of a way, beside the way without a draft before it."""
    passes = [each for turn in done for each in steady(turn)]
    reports = [turn.report for turn in done]
    rate = median(map(tokens_per_second, done))
    without = next((each for each in rows if point.name == f"{each['point']}, int4 draft"), {})
    proposed, accepted = (sum(report[name] for report in reports) for name in ("proposed", "accepted"))
    texts = _texts(run, without["point"] if without else point.name)
    return {
        "tokens_per_second": rate,
        "rounds": list(map(tokens_per_second, done)),
        "times_without": rate / without["tokens_per_second"] if "tokens_per_second" in without else None,
        "tokens_per_pass": sum(each["tokens"] for each in passes) / len(passes),
        "proposed": proposed,
        "acceptance": accepted / proposed if proposed else None,
        "seconds_per_pass": median(each["seconds"] for each in passes),
        "drafting_seconds": median(report["drafting_seconds"] for report in reports),
        "draft_bytes": median(report["draft_bytes"] for report in reports),
        "streamed_bytes": median(report["streamed_bytes"] for report in reports),
        "texts": len(reports[0]["ids"]),
        "same": "same" if all(report["ids"] == texts for report in reports) else "DIFFERENT",
    }


def _texts(run: Run, name: str) -> list[list[int]] | None:
    """The tokens that a way gave first."""
    return next((turn.report["ids"] for turn in run.done if turn.point == name), None)


def facts(run: Run) -> dict[str, Any]:
    work = run.points[0].form.parent
    sizes = {form: forms.weights_bytes(work / form) for form in ("lossless", "int4")}
    return {"bytes": sizes, "most_draft_tokens": MOST_DRAFT_TOKENS}


BENCHMARK = Benchmark(
    "self_draft", "Measure what the int4 form gains as the draft of the lossless one.",
    options, points, row, COLUMNS, facts,
    limits=lambda given: [harness.limits_of(None if given.weights else given.ram, given.disk)],
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(harness.main(BENCHMARK))
