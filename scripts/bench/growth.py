"""How the seconds of a token grow: with the blocks, with the context, and with less RAM; each beside the limit.

    python -m scripts.bench.growth --work WORK --json growth.json
    python -m scripts.bench.growth --work WORK --only context --rounds 1

All on a checkpoint of bloom-3b's shapes, the one that against_peers makes in the same WORK, on a braked disk:

    blocks    its first 6, 12, 18, 24 and 30 blocks in 1 GB, which holds next to none of them
    context   from 16 to 2,048 positions in the KV cache, filled by the prompt, in 3 GB and once more without any
              limit, so that nothing hides what attention takes
    ram       from 1 GB to 7 GB, in which everything stays

A directory of the first blocks has the same files under other names (hard links) and a manifest of its own. The limit
of a point is the longer of two: what a pass streams over the most that the disk gave, around a turn or to the stream
in the time in which it read (or its brake), and all weights and the filled cache over the most that the memory gave. A
prompt of 2,048 tokens takes minutes on two cores: the two lines of the context are most of the script's hour.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import xxhash

from runner.format.layout import MANIFEST, MANIFEST_BACKUP, block_file, part_specs
from runner.format.manifest import CompanionRecord, load_manifest
from scripts.bench import harness, turns
from scripts.bench.harness import Benchmark, Column, Point, Row, Run, Turn
from scripts.bench.turns import CannotRun, numbers, size, sizes

PROMPT_TOKENS = 16
LINES = ("blocks", "context", "context in RAM", "ram")
COLUMNS = (
    Column("point", "point"),
    Column("s/token", "seconds", ".3f"),
    Column("range of rounds", "rounds", ".3f"),
    Column("limit s", "limit", ".3f"),
    Column("x limit", "times_limit"),
    Column("streamed GB", "streamed_bytes", ".3f", 1e9),
    Column("KV cache GB", "cache_bytes", ".3f", 1e9),
    Column("prompt s", "prompt_seconds"),
    Column("group's peak GB", "group_peak", ".2f", 1e9),
)


def options(parser: argparse.ArgumentParser) -> None:
    harness.add_like(parser)
    parser.add_argument("--only", action="append", choices=LINES, help="this line; may be repeated")
    parser.add_argument("--blocks", type=numbers, default="6,12,18,24,30", metavar="N,...")
    parser.add_argument("--blocks-ram", type=size, default="1GB", metavar="SIZE")
    parser.add_argument("--context", type=numbers, default="16,512,1024,2048", metavar="N,...")
    parser.add_argument("--context-ram", type=size, default="3GB", metavar="SIZE")
    parser.add_argument("--ram", type=sizes, default="1GB,2GB,3GB,4GB,5GB,6GB,7GB", metavar="SIZE,...")
    parser.add_argument("--disk", type=size, default="1.073GB/s", metavar="RATE")
    parser.add_argument("--tokens", type=int, default=3, metavar="N", help="passes of one row in a turn")


def limits(given: argparse.Namespace) -> list[turns.Limits]:
    """The limits of the lines that were asked for; the context in RAM has none."""
    rams = {"blocks": [given.blocks_ram], "context": [given.context_ram], "ram": given.ram}
    return [harness.limits_of(ram, given.disk) for line in given.only or LINES for ram in rams.get(line, ())]


def points(given: argparse.Namespace, work: Path) -> tuple[Path, list[Point]]:
    """Every point of the lines that were asked for."""
    if None in (*given.ram, given.blocks_ram, given.context_ram) or given.tokens < 1:
        raise CannotRun("RAM must be sizes, and --tokens at least 1")
    prepared = harness.prepared(given, work)
    lines = given.only or LINES
    if "blocks" in lines and max(given.blocks) > load_manifest(prepared).model.n_layer:
        raise CannotRun(f"{prepared} has fewer than {max(given.blocks)} blocks: give --blocks")
    made = []

    def add(line: str, x: float, form: Path, prompt_tokens: int, ram: float | None) -> None:
        limits = harness.limits_of(ram, given.disk if ram else None)
        prompt = harness.prompt_of(form, prompt_tokens)
        command = harness.peer("one_row_passes", form, prompt, given.tokens + 1, given, limits)
        made.append(Point(f"{line} {x:g}", command, limits, form))

    for line in lines:
        if line == "blocks":
            for count in given.blocks:
                cut = first_blocks(prepared, work / f"first-{count}", count)
                add(line, count, cut, PROMPT_TOKENS, given.blocks_ram)
        elif line == "ram":
            for ram in given.ram:
                add(line, ram / 1e9, prepared, PROMPT_TOKENS, ram)
        else:
            for length in given.context:
                add(line, length, prepared, length, None if line == "context in RAM" else given.context_ram)
    return prepared, made


def row(run: Run, point: Point, done: list[Turn], rows: list[Row]) -> Row:
    """Medians over the rounds of a point, beside its limit."""
    line, x = point.name.rsplit(" ", 1)
    streamed = median(turn.report["streamed_bytes"] for turn in done)
    needed = median(turn.report["weights_bytes"] + turn.report["cache_bytes"] for turn in done)
    by_memory, by_disk, rate = needed / max(run.memory_rates), 0.0, None
    if not point.warm:
        own = [turns.rate_while_reading(turn.report) for turn in done]
        rates = [each for turn in run.turns for each in turn.disk_rates]
        rate = turns.rate_of_the_limit([median(rates), *own], point.limits)
        by_disk = streamed / rate
    limit, passes = max(by_disk, by_memory), harness.pass_facts(done)
    return {
        "line": line,
        "x": float(x),
        **passes,
        "limit": limit,
        "times_limit": passes["seconds"] / limit,
        "limit_by_disk": by_disk,
        "limit_by_memory": by_memory,
        "disk_rate": rate,
        "streamed_bytes": streamed,
        "weights_bytes": done[0].report["weights_bytes"],
        "cache_bytes": done[0].report["cache_bytes"],
    }


def facts(run: Run) -> dict[str, Any]:
    return {"model": asdict(load_manifest(run.prepared).model)}


def first_blocks(prepared: Path, out: Path, count: int) -> Path:
    """A prepared directory of the first `count` blocks of another: its files by hard links, a manifest of its own.

    The weights of a model cut off like this say nothing, and a pass through it takes what it should.
    """
    manifest = load_manifest(prepared)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    model = replace(manifest.model, n_layer=count)
    # The number's digits are those of the whole.
    own = {block_file(index, count): block_file(index, manifest.model.n_layer) for index in range(count)}
    parts = {}
    for spec in part_specs(model):
        whole = manifest.parts[own.get(spec.file, spec.file)]
        parts[spec.file] = replace(whole, file=spec.file)
        os.link(prepared / whole.file, out / spec.file)
    companions = dict(manifest.companions)
    for file in companions:
        data = (prepared / file).read_bytes()
        if file == "config.json":
            config = json.loads(data) | {"n_layer": count}
            data = json.dumps(config, indent=2).encode()
        (out / file).write_bytes(data)
        companions[file] = CompanionRecord(file, len(data), xxhash.xxh3_128_hexdigest(data))
    cut = replace(manifest, model=model, parts=parts, companions=companions)
    for name in (MANIFEST, MANIFEST_BACKUP):
        (out / name).write_text(cut.to_json(), encoding="utf-8")
    return out


BENCHMARK = Benchmark(
    "growth", "Measure how a token's seconds grow.", options, points, row, COLUMNS, facts, limits=limits
)

if __name__ == "__main__":
    sys.exit(harness.main(BENCHMARK))
