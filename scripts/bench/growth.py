"""How the seconds of a token grow: with the blocks, with the context, and with less RAM; each beside the limit.

    python -m scripts.bench.growth --work WORK --json growth.json
    python -m scripts.bench.growth --work WORK --only context --rounds 1

All on a checkpoint of bloom-3b's shapes, the one that bench_peers.py makes in the same WORK, on a braked disk:

    blocks    its first 6, 12, 18, 24 and 30 blocks in 1 GB, which holds next to none of them
    context   from 16 to 2,048 positions in the KV cache, filled by the prompt, in 3 GB and once more without any
              limit, where nothing hides what attention takes
    ram       from 1 GB to 7 GB, in which everything stays

A directory of the first blocks has the same files under other names (hard links) and a manifest of its own. Each turn
is a fresh process in a fresh control group that finds every file cold; without limits it finds them in the page
cache. A line's points take turns, round by round. The limit of a point is the longer of two: what a pass streams over
the most that the disk gave, before a turn or to the stream in the time in which it read (or its brake), and all
weights and the filled cache over the most that the memory gave. A prompt of 2,048 tokens takes minutes on two cores:
the two lines of the context are most of the script's hour.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import xxhash

from runner.format.layout import MANIFEST, MANIFEST_BACKUP, block_file, part_specs
from runner.format.manifest import CompanionRecord, load_manifest
from scripts.bench import turns
from scripts.bench.peers import forms
from scripts.bench.turns import CannotRun, Limits, machine, numbers, say, size, sizes
from scripts.fakehub.checkpoint import TRUE_SHAPES

PROMPT_TOKENS = 16
LINES = ("blocks", "context", "context in RAM", "ram")
NO_LIMITS = Limits(None, None)


@dataclass(frozen=True)
class Point:
    """What a turn of a line does; `x` is what the line grows with."""

    line: str
    x: float
    prepared: Path
    prompt_tokens: int
    limits: Limits

    @property
    def in_memory(self) -> bool:
        return self.limits == NO_LIMITS


@dataclass(kw_only=True)
class Turn(turns.Turn):
    line: str
    x: float
    round: int
    disk_rate: float | None


class Bench:
    """All turns of one run; `given` are the options."""

    def __init__(self, given: argparse.Namespace, prepared: Path, points: Sequence[Point]) -> None:
        self.given, self.prepared, self.points = given, prepared, points
        self.turns: list[Turn] = []
        self.memory_rates: list[float] = []

    def run(self) -> None:
        for number in range(1, self.given.rounds + 1):
            self.memory_rates.append(turns.memory_rate(self.given.threads))
            for point in self.points:
                turn = self.turn(point, number)
                self.turns.append(turn)
                say(f"round {number}: {point.line} {point.x:g}: {turn.failure or in_words(turn)}")
                self.save()

    def turn(self, point: Point, number: int) -> Turn:
        """The rate that the disk gives now, then a fresh process from its prompt to its last pass."""
        rate = None if point.in_memory else turns.disk_rate(point.prepared, point.limits)
        turns.cool({each.prepared for each in self.points})
        if point.in_memory:
            forms.warm(point.prepared)
        choose = random.Random(0)
        vocabulary = load_manifest(point.prepared).model.vocab_size
        prompt = [choose.randrange(4, vocabulary) for _ in range(point.prompt_tokens)]
        command = turns.module("scripts.bench.peers.one_row_passes", point.prepared)
        command += ["--prompt", ",".join(map(str, prompt)), "--tokens", self.given.tokens + 1]
        command += ["--threads", self.given.threads]
        command += [] if point.in_memory else ["--ram", point.limits.ram]
        turn = turns.take_turn(command, point.limits, point.prepared, self.given.timeout)
        return Turn(**asdict(turn), line=point.line, x=point.x, round=number, disk_rate=rate)

    def measured(self) -> dict[str, list[dict[str, Any]]]:
        """Medians over the rounds of every point with a turn that succeeded, by line."""
        lines: dict[str, list[dict[str, Any]]] = {}
        for point in self.points:
            done = [turn for turn in self.turns if (turn.line, turn.x) == (point.line, point.x)]
            if done := [turn for turn in done if turn.steps]:
                lines.setdefault(point.line, []).append(self.row(point, done))
        return lines

    def row(self, point: Point, done: Sequence[Turn]) -> dict[str, Any]:
        rounds = [median(turn.steps) for turn in done]
        streamed = median(turn.report["streamed_bytes"] for turn in done)
        needed = median(turn.report["weights_bytes"] + turn.report["cache_bytes"] for turn in done)
        by_memory, by_disk, rate = needed / max(self.memory_rates), 0.0, None
        if not point.in_memory:
            own = [turns.rate_while_reading(turn.report) for turn in done]
            rates = [turn.disk_rate for turn in self.turns if turn.disk_rate]
            rate = turns.rate_of_the_limit([median(rates), *own], point.limits)
            by_disk = streamed / rate
        return {
            "x": point.x,
            "ram": point.limits.ram,
            "disk": point.limits.disk,
            "seconds": median(second for turn in done for second in turn.steps),
            "rounds": rounds,
            "prompt_seconds": median(turn.report["seconds"][0] for turn in done),
            "limit": max(by_disk, by_memory),
            "limit_by_disk": by_disk,
            "limit_by_memory": by_memory,
            "disk_rate": rate,
            "streamed_bytes": streamed,
            "weights_bytes": done[0].report["weights_bytes"],
            "cache_bytes": done[0].report["cache_bytes"],
            "group_peak": max(turn.group_peak or 0 for turn in done) or None,
            "peak_rss": max(turn.report["peak_rss"] for turn in done),
        }

    def save(self) -> None:
        """Everything so far as JSON, where it was asked for."""
        if not self.given.json:
            return
        body = {
            "benchmark": "growth",
            "machine": machine(self.prepared),
            "control_group": self.turns[-1].group,
            "threads": self.given.threads,
            "model": asdict(load_manifest(self.prepared).model),
            "memory_rates": self.memory_rates,
            "lines": self.measured(),
            "turns": [asdict(turn) for turn in self.turns],
        }
        self.given.json.write_text(json.dumps(body, indent=1) + "\n")


def in_words(turn: Turn) -> str:
    steps = " ".join(f"{second:.3f}" for second in turn.steps)
    rate = f"; the disk gave {turn.disk_rate / 1e9:.3f} GB/s" if turn.disk_rate else ""
    return f"{steps} s; prompt {turn.report['seconds'][0]:.1f} s{rate}"


COLUMNS = (
    "",
    "s/token",
    "range of rounds",
    "limit s",
    "x limit",
    "streamed GB",
    "KV cache GB",
    "prompt s",
    "group's peak GB",
)
X_COLUMN = {"blocks": "blocks", "ram": "RAM GB"}


def tables(lines: dict[str, list[dict[str, Any]]]) -> str:
    """A table for each line."""
    shown = []
    for line, rows in lines.items():
        cells = [
            (
                f"{row['x']:g}",
                f"{row['seconds']:.3f}",
                f"{min(row['rounds']):.3f} to {max(row['rounds']):.3f}",
                f"{row['limit']:.3f}",
                f"{row['seconds'] / row['limit']:.2f}",
                f"{row['streamed_bytes'] / 1e9:.3f}",
                f"{row['cache_bytes'] / 1e9:.3f}",
                f"{row['prompt_seconds']:.2f}",
                f"{row['group_peak'] / 1e9:.2f}" if row["group_peak"] else "",
            )
            for row in rows
        ]
        columns = (X_COLUMN.get(line, "positions"), *COLUMNS[1:])
        shown.append(f"{line}:\n\n{turns.table(columns, cells)}")
    return "\n\n".join(shown)


def first_blocks(prepared: Path, out: Path, count: int) -> Path:
    """A prepared directory of the first `count` blocks of another: its files by hard links, a manifest of its own.

    The weights of a model cut off like this say nothing, and a pass through it takes what it should.
    """
    manifest = load_manifest(prepared)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    model = replace(manifest.model, n_layer=count)
    parts = {}
    for spec in part_specs(model):
        parts[spec.file] = manifest.parts[spec.file]
    for index in range(count):  # the number's digits are those of the whole
        whole = manifest.parts[block_file(index, manifest.model.n_layer)]
        parts[block_file(index, count)] = replace(whole, file=block_file(index, count))
        os.link(prepared / whole.file, out / block_file(index, count))
    for file in parts.keys() - {path.name for path in out.iterdir()}:
        os.link(prepared / file, out / file)
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


def points(given: argparse.Namespace, work: Path, prepared: Path) -> list[Point]:
    """Every point of the lines that were asked for."""
    found = []
    for line in given.only:
        if line == "blocks":
            limits = Limits(int(given.blocks_ram), given.disk)
            for count in given.blocks:
                cut = first_blocks(prepared, work / f"first-{count}", count)
                found.append(Point(line, count, cut, PROMPT_TOKENS, limits))
        elif line == "ram":
            for ram in given.ram:
                found.append(Point(line, ram / 1e9, prepared, PROMPT_TOKENS, Limits(int(ram), given.disk)))
        else:
            limits = NO_LIMITS if line == "context in RAM" else Limits(int(given.context_ram), given.disk)
            found += [Point(line, length, prepared, length, limits) for length in given.context]
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how a token's seconds grow.")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="on the disk to measure")
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="a prepared directory; else WORK's")
    parser.add_argument("--like", choices=TRUE_SHAPES, default="bloom-3b", help="the shapes that WORK gets")
    parser.add_argument("--only", action="append", choices=LINES, help="this line; may be repeated")
    parser.add_argument("--blocks", type=numbers, default="6,12,18,24,30", metavar="N,...")
    parser.add_argument("--blocks-ram", type=size, default="1GB", metavar="SIZE")
    parser.add_argument("--context", type=numbers, default="16,512,1024,2048", metavar="N,...")
    parser.add_argument("--context-ram", type=size, default="3GB", metavar="SIZE")
    parser.add_argument("--ram", type=sizes, default="1GB,2GB,3GB,4GB,5GB,6GB,7GB", metavar="SIZE,...")
    parser.add_argument("--disk", type=size, default="1.073GB/s", metavar="RATE")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--tokens", type=int, default=3, metavar="N", help="passes of one row in a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="for one turn")
    parser.add_argument("--json", type=Path, metavar="OUT")
    given = parser.parse_args()
    given.only = given.only or list(LINES)
    if None in (*given.ram, given.blocks_ram, given.context_ram) or given.tokens < 1:
        parser.error("RAM must be sizes, and --tokens at least 1")
    return given


def main() -> int:
    given = options()
    work = given.work.resolve()
    try:
        with turns.sole_worker(work, Limits(int(given.context_ram), given.disk)):
            turns.check_room(work, forms.bytes_to_make(work, given.prepared, None, given.like))
            prepared = (given.prepared or forms.prepared(work, None, given.like)).resolve()
            if max(given.blocks) > load_manifest(prepared).model.n_layer:
                raise CannotRun(f"{prepared} has fewer than {max(given.blocks)} blocks: give --blocks")
            bench = Bench(given, prepared, points(given, work, prepared))
            to_the_end = turns.to_the_end(bench.run)
    except CannotRun as error:
        say(str(error))
        return 2
    print(f"{machine(prepared)}\n\n{tables(bench.measured())}")
    return 0 if to_the_end else turns.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
