"""Blocks of BLOOM-176B's true size beside the disk's limit, in several amounts of RAM.

    python -m scripts.bench.true_size --work WORK --json true_size.json
    python -m scripts.bench.true_size --prepared DIR --work WORK --ram 2GB --disk 1.073GB/s

WORK gets a checkpoint of the true embedding and some true blocks of random weights: 22 GB with 3 of them, and 7 GB
more while it is made. It stays there for the next run. Each turn is a prompt of 16 tokens,
then passes of one row, as scripts/bench/harness.py takes turns, round by round through all limits.

The disk's rate is measured under a turn's own limits just before and after it. The limit of a pass is what it
streams over the most that the disk gave: before, after, or to the stream itself in the time in which it read; or over
the brake if that held the disk. So where the disk is quicker in a turn than around it, the share of the limit is
the share of the time in which a read was under way, which stands beside it as "disk busy". `bloomdesk plan` forecasts
the same passes under the same limits, at the rates that it measures itself.

The second table is no measurement. It takes what all 70 blocks stream for a text of 32 tokens, by the runner's own
memory plan and the memory that its process took. It divides that by the rate of a drive, or all weights by
the rate of the product for one row if that takes longer, and then by the share of the limit that was reached in
that amount of RAM: with the brake for drives up to its rate, without it for faster ones. The tutorial's own figure is
180 s on a drive of 7 GB/s.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from runner.errors import BloomdeskError
from runner.estimate import family
from runner.estimate.family import SHAPES, VOCABULARY
from runner.estimate.forecast import (
    BLOOMS_TOKENIZER,
    TOKENIZER_MEMORY,
    chunk_bytes,
    forecast,
    stored_as,
    weight_bytes,
)
from runner.estimate.rates import Rates
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import part_specs
from runner.format.manifest import load_manifest
from scripts.bench import harness, turns
from scripts.bench.harness import Benchmark, Column, Point, Row, Run, Turn
from scripts.bench.peers import forms
from scripts.bench.turns import CannotRun, Limits, numbers, say, sizes

TRUE_SHAPE = f"{SHAPES['bloom'][0]},{SHAPES['bloom'][1]},{VOCABULARY}"
DRIVES = (1.073e9, 3.5e9, 7e9)  # the brake, a drive of PCIe 3, and the tutorial's
PROMPT_TOKENS = 16
NEW_TOKENS = 16  # of the extrapolation: with the prompt 128 MB of KV cache
COLUMNS = (
    Column("RAM, disk", "point"),
    Column("s/pass", "seconds"),
    Column("range of rounds", "rounds"),
    Column("limit s", "limit"),
    Column("share of it", "share", ".3f"),
    Column("disk busy", "busy", ".3f"),
    Column("disk GB/s", "disk_rate", ".3f", 1e9),
    Column("streamed GB", "streamed_bytes", ".3f", 1e9),
    Column("read GB, the kernel's count", "read_bytes", ".3f", 1e9),
    Column("group's peak GB", "group_peak", ".2f", 1e9),
    Column("process's peak GB", "peak_rss", ".2f", 1e9),
    Column("plan / measured", "forecast_ratio"),
)
EXTRAPOLATED = (
    Column("RAM GB", "ram", "g", 1e9),
    Column("drive GB/s", "drive", "g", 1e9),
    Column("stays GB", "resident_bytes", ".1f", 1e9),
    Column("streamed GB", "streamed_bytes", ".1f", 1e9),
    Column("disk alone s", "disk_seconds", ".0f"),
    Column("products alone s", "compute_seconds", ".0f"),
    Column("share reached", "share", ".3f"),
    Column("s/token expected", "seconds", ".0f"),
)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, default=3, metavar="N")
    parser.add_argument(
        "--shape", type=numbers, default=TRUE_SHAPE, metavar="HIDDEN,HEADS,VOCABULARY", help="for a quick try"
    )
    parser.add_argument("--ram", type=sizes, default="1GB,2GB,4GB,16GB", metavar="SIZE,...")
    parser.add_argument("--disk", type=sizes, default="1.073GB/s,none", metavar="RATE,...")
    parser.add_argument("--tokens", type=int, default=3, metavar="N", help="passes of one row in a turn")


def points(given: argparse.Namespace, work: Path) -> tuple[Path, list[Point]]:
    """A point for each amount of RAM on each disk."""
    if None in given.ram or given.tokens < 1:
        raise CannotRun("--ram must be sizes, and --tokens at least 1")
    prepared = (given.prepared or checkpoint(work, given.blocks, given.shape)).resolve()
    prompt, made = harness.prompt_of(prepared, PROMPT_TOKENS), []
    for limits in harness.given_limits(given):
        command = harness.peer("one_row_passes", prepared, prompt, given.tokens + 1, given, limits)
        plan = turns.module("toolkit.cli.app", "plan", prepared, "--json", "--ram", limits.ram)
        plan += ["--tokens", given.tokens + 1, "--prompt-tokens", PROMPT_TOKENS]
        made.append(Point(str(limits), command, limits, prepared, plan))
    return prepared, made


def checkpoint(work: Path, blocks: int, shape: Sequence[int]) -> Path:
    """The prepared directory in `work`, made of random weights if it is missing; shards go as parts come.

    Raises `CannotRun` if the disk is too small, or if the directory there has another shape.
    """
    prepared, source = work / "prepared", work / "source"
    model = Hyperparameters(shape[0], shape[1], blocks, shape[2], "BF16")
    if forms.is_prepared(prepared):
        if load_manifest(prepared).model.n_layer != blocks:
            raise CannotRun(f"{prepared} has another number of blocks: delete it, or take another --work")
        return prepared
    if not (source / "config.json").exists():
        largest = max(spec.nbytes(model.dtype) for spec in part_specs(model))
        turns.check_room(work, weight_bytes(model) + largest + 2**28)
        say(f"writing {weight_bytes(model) / 1e9:.1f} GB of random weights to {source}")
    forms.random_weights(source, (shape[0], shape[1], blocks, shape[2]))
    return forms.convert(source, prepared, "--delete-source")


def limit_of(turn: Turn, limits: Limits) -> tuple[float, float]:
    """Seconds that a pass of one row takes from the disk at least, and the rate that this is computed with."""
    rate = turns.rate_of_the_limit([*turn.disk_rates, turns.rate_while_reading(turn.report)], limits)
    return turn.report["streamed_bytes"] / rate, rate


def row(run: Run, point: Point, done: list[Turn], rows: list[Row]) -> Row:
    """Medians over the rounds under these limits."""
    own = [median(turn.steps) for turn in done]
    limits, rates = zip(*(limit_of(turn, point.limits) for turn in done), strict=True)
    forecasts = [turn.forecast and turn.forecast["forecast"]["seconds_per_token"] for turn in done]
    ratios = [promised / each for promised, each in zip(forecasts, own, strict=True) if promised]
    return {
        **harness.pass_facts(done),
        "limit": median(limits),
        "share": median(limit / each for limit, each in zip(limits, own, strict=True)),
        "busy": median(sum(turn.report["reading_seconds"]) / sum(turn.steps) for turn in done),
        "disk_rate": median(rates),
        "streamed_bytes": median(turn.report["streamed_bytes"] for turn in done),
        "forecast_ratio": median(ratios) if ratios else None,
    }


def extrapolated(run: Run) -> list[Row]:
    """What a token of the whole model should take, by RAM and drive: see the top of this file."""
    found_rates = [turn.forecast["rates"] for turn in run.done if turn.forecast]
    if not found_rates:
        return []
    rates = {name: median(each[name] for each in found_rates) for name in found_rates[0]}
    # At a drive that takes no time, the limit is what computing, and decoding, take.
    rates = Rates(**rates | {"disk": math.inf})
    whole, stored = family.hyperparameters("bloom"), stored_as([load_manifest(run.prepared)])
    measured = [row for row in run.measured(BENCHMARK) if "seconds" in row]
    rows: list[Row] = []
    for ram in dict.fromkeys(row["ram"] for row in measured):
        process = process_bytes(run, whole, ram)
        try:
            found = forecast(whole, ram, process, rates, PROMPT_TOKENS, NEW_TOKENS, stored)
        except BloomdeskError as error:
            rows.append({"ram": ram, "failure": error.message})
            continue
        for drive in DRIVES:
            share = share_for(drive, [row for row in measured if row["ram"] == ram])
            streamed, compute = found.memory_plan.streamed_bytes / drive, found.limit_seconds
            rows.append(
                {
                    "ram": ram,
                    "drive": drive,
                    "streamed_bytes": found.memory_plan.streamed_bytes,
                    "resident_bytes": found.memory_plan.resident_bytes,
                    "disk_seconds": streamed,
                    "compute_seconds": compute,
                    "share": share,
                    "seconds": max(streamed, compute) / share,
                }
            )
    return rows


def process_bytes(run: Run, whole: Hyperparameters, ram: int) -> int:
    """Bytes of the whole model's process beside matrices: as measured, with its vectors and tokenizer."""
    points = [point for point in run.points if point.limits.ram == ram]
    taken = max(turn.report["process_bytes"] for point in points for turn in run.of(point))
    tokenizer = (run.prepared / "tokenizer.json").stat().st_size
    more = vector_bytes(whole) - vector_bytes(load_manifest(run.prepared).model)
    return taken + more + TOKENIZER_MEMORY * (BLOOMS_TOKENIZER - tokenizer)


def vector_bytes(model: Hyperparameters) -> int:
    return weight_bytes(model) - sum(chunk_bytes(model))


def share_for(drive: float, rows: Sequence[dict[str, Any]]) -> float:
    """The share of the limit reached at the brake that the drive keeps to, else the one without a brake.

    1 if nothing was streamed under these limits.
    """
    streamed = [row for row in rows if row["limit"]]
    braked = [row for row in streamed if row["disk"] and drive <= row["disk"]]
    free = [row for row in streamed if not row["disk"]]
    found = braked or free or streamed
    return min(1.0, found[0]["share"]) if found else 1.0


def facts(run: Run) -> dict[str, Any]:
    manifest = load_manifest(run.prepared)
    return {
        "model": asdict(manifest.model),
        "weights_bytes": weight_bytes(manifest.model),
        "coded_share": stored_as([manifest]).share,
        "extrapolated": extrapolated(run),
    }


def below(run: Run) -> str:
    """The second table, if a plan succeeded."""
    rows = extrapolated(run)
    return f"Extrapolated to 70 blocks, not measured:\n\n{harness.table(EXTRAPOLATED, rows)}" if rows else ""


BENCHMARK = Benchmark(
    "true_size", "Measure blocks of BLOOM-176B's true size against the disk.",
    options, points, row, COLUMNS, facts, below,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(harness.main(BENCHMARK))
