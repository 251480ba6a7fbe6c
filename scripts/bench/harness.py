"""What every benchmark shares: points that take turns round by round, columns, medians, a table and JSON.

A benchmark of whole processes declares its points, and for each what it runs; the columns of its table; and the row
that it makes of a point's turns:

    BENCHMARK = Benchmark("batch", "Measure batches.", options, points, row, COLUMNS)

    if __name__ == "__main__":
        sys.exit(main(BENCHMARK))

Each turn is a fresh process in a fresh control group that finds every file cold (or, without limits, all of its files
in the page cache). The disk's rate is measured under the turn's limits just before and after it, the memory's once a
round. A benchmark inside one process uses `interleaved`, `table` and `save` alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from runner.format.manifest import load_manifest
from scripts.bench import turns
from scripts.bench.peers import forms
from scripts.bench.turns import CannotRun, Limits, machine, say, size
from scripts.fakehub.checkpoint import TRUE_SHAPES

T = TypeVar("T")
Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, the key of a row, how the value is written, and what it is divided by."""

    title: str
    key: str
    form: str = ".2f"
    unit: float = 1

    def cell(self, row: Mapping[str, Any]) -> str:
        """The value as text; of a list its range; empty if the row has none."""
        value = row.get(self.key)
        if value is None or isinstance(value, str):
            return value or ""
        if isinstance(value, list):
            return f"{min(value) / self.unit:{self.form}} to {max(value) / self.unit:{self.form}}"
        return f"{value / self.unit if self.unit != 1 else value:{self.form}}"


def table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; all columns but the first are numbers. A row with a `failure` has nothing else."""
    lines = [[column.title for column in columns], ["---", *["---:"] * (len(columns) - 1)]]
    for row in rows:
        first, *rest = (column.cell(row) for column in columns)
        lines.append(
            [f"{first}: {row['failure']}", *["" for _ in rest]] if "failure" in row else [first, *rest]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save(path: Path | None, benchmark: str, body: Mapping[str, Any], machine_of: Path | None = None) -> None:
    """Write results as JSON, if a path is given."""
    if path:
        whole = {"benchmark": benchmark, "machine": machine(machine_of or Path.cwd()), **body}
        path.write_text(json.dumps(whole, indent=1) + "\n")


def interleaved(ways: Mapping[str, Callable[[], T]], rounds: int, warm_up: int = 0) -> dict[str, list[T]]:
    """What each way returned in every round; ways take turns, and every other round goes backwards."""
    found: dict[str, list[T]] = {name: [] for name in ways}
    for number in range(-warm_up, rounds):
        for name in ways if number % 2 else reversed(ways):
            result = ways[name]()
            if number >= 0:
                found[name].append(result)
    return found


def seconds(work: Callable[[], object]) -> float:
    """How long the work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def at_once(works: Sequence[Callable[[], object]]) -> float:
    """How long all of them take together, each in a thread of its own."""
    threads = [threading.Thread(target=work) for work in works]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Point:
    """What is measured in one turn of each round: a command that reads `form`, and `others`, under limits.

    `forecast` is a second command, run cold under the same limits after the first; its report is kept beside it.
    """

    name: str
    command: Sequence[object]
    limits: Limits
    form: Path
    forecast: Sequence[object] | None = None
    others: Sequence[Path] = ()

    @property
    def warm(self) -> bool:
        """Without limits everything begins in the page cache."""
        return self.limits == Limits(None, None)


@dataclass(kw_only=True)
class Turn(turns.Turn):
    """A turn of a point: the disk's rates before and after it in bytes a second, and its forecast."""

    point: str
    round: int
    disk_rates: list[float] = field(default_factory=list)
    forecast: dict[str, Any] | None = None


@dataclass
class Run:
    """All turns of one run of a benchmark, and what the memory gave in each round, in bytes a second."""

    given: argparse.Namespace
    prepared: Path
    points: list[Point]
    turns: list[Turn] = field(default_factory=list)
    memory_rates: list[float] = field(default_factory=list)

    def of(self, point: Point) -> list[Turn]:
        """The turns of a point that succeeded."""
        return [turn for turn in self.done if turn.point == point.name]

    @property
    def done(self) -> list[Turn]:
        return [turn for turn in self.turns if not turn.failure]

    def measured(self, benchmark: Benchmark) -> list[Row]:
        """A row for each point, in order: medians over its rounds, or why there is none."""
        rows: list[Row] = []
        for point in self.points:
            row: Row = {"point": point.name, "ram": point.limits.ram, "disk": point.limits.disk}
            if done := self.of(point):
                peaks = [turn.group_peak for turn in done if turn.group_peak]
                row |= {"group_peak": max(peaks, default=None), **benchmark.row(self, point, done, rows)}
            else:
                reasons = {turn.failure or "" for turn in self.turns if turn.point == point.name}
                row["failure"] = "; ".join(sorted(reasons)) or "no turn yet"
            rows.append(row)
        return rows

    def round(self, number: int, after_turn: Callable[[], None]) -> None:
        """One turn of every point."""
        self.memory_rates.append(turns.memory_rate(self.given.threads))
        say(f"round {number}: the memory gives {self.memory_rates[-1] / 1e9:.1f} GB/s")
        for point in self.points:
            turn = self.turn(point, number)
            self.turns.append(turn)
            rates = " and ".join(f"{rate / 1e9:.3f}" for rate in turn.disk_rates)
            said = turn.failure or f"{in_words(turn.report)}; the disk gives {rates or '-'} GB/s"
            say(f"round {number}: {point.name}: {said}")
            after_turn()

    def turn(self, point: Point, number: int) -> Turn:
        """A fresh process from nothing in the page cache to its last pass, between two looks at the disk."""
        place = point.form if point.others else self.prepared
        rates = [] if point.warm else [turns.disk_rate(place, point.limits)]
        cold = {self.prepared, *(path for each in self.points for path in (each.form, *each.others))}
        turns.cool(cold)
        if point.warm:
            forms.warm(point.form)
        turn = turns.take_turn(point.command, point.limits, point.form, self.given.timeout)
        rates += [] if point.warm else [turns.disk_rate(place, point.limits)]
        made = Turn(**asdict(turn), point=point.name, round=number, disk_rates=rates)
        if point.forecast and not turn.failure:
            turns.cool(cold)
            second = turns.take_turn(point.forecast, point.limits, point.form, self.given.timeout)
            made.forecast = None if second.failure else second.report
            if second.failure:
                say(f"forecast: {second.failure}")
        return made


@dataclass(frozen=True)
class Benchmark:
    """What one benchmark adds: options, points (which are made in WORK), the row of a point, and columns.

    `row` gets the run, the point, its turns, and the rows before it. `limits` are those that its turns will be under.
    `facts` are more fields of the JSON, `below` is text after the table.
    """

    name: str
    description: str
    options: Callable[[argparse.ArgumentParser], None]
    points: Callable[[argparse.Namespace, Path], tuple[Path, list[Point]]]
    row: Callable[[Run, Point, list[Turn], list[Row]], Row]
    columns: Sequence[Column]
    facts: Callable[[Run], dict[str, Any]] = lambda run: {}
    below: Callable[[Run], str] = lambda run: ""
    limits: Callable[[argparse.Namespace], list[Limits]] = lambda given: given_limits(given)

    def result(self, run: Run) -> dict[str, Any]:
        """Everything so far, as the JSON has it."""
        return {
            "ram": getattr(run.given, "ram", None),
            "disk": getattr(run.given, "disk", None),
            "control_group": run.turns[-1].group,
            "threads": run.given.threads,
            "memory_rates": run.memory_rates,
            **self.facts(run),
            "measured": run.measured(self),
            "turns": [asdict(turn) for turn in run.turns],
        }


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark from its options to its table; the exit status."""
    given = parser_of(benchmark).parse_args(arguments)
    work = given.work.resolve()
    try:
        with turns.sole_worker(work):
            turns.check_limits(work, benchmark.limits(given))
            prepared, points = benchmark.points(given, work)
            run = Run(given, prepared.resolve(), points)
            complete = turns.to_the_end(lambda: _rounds(benchmark, run))
    except CannotRun as error:
        say(str(error))
        return 2
    groups = ", ".join(sorted({turn.group for turn in run.turns})) or "none"
    print(f"{machine(prepared)}\n{len(run.memory_rates)} rounds, control groups: {groups}\n")
    print(table(benchmark.columns, run.measured(benchmark)))
    if run.done and (below := benchmark.below(run)):
        print(f"\n{below}")
    return 0 if complete else turns.INTERRUPTED


def _rounds(benchmark: Benchmark, run: Run) -> None:
    for number in range(1, run.given.rounds + 1):
        run.round(number, lambda: save(run.given.json, benchmark.name, benchmark.result(run), run.prepared))


def parser_of(benchmark: Benchmark) -> argparse.ArgumentParser:
    """The benchmark's own options, and those that all have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m scripts.bench.{benchmark.name}", description=benchmark.description
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="on the disk to measure")
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="a prepared directory; else WORK's")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="for one turn")
    parser.add_argument("--json", type=Path, metavar="OUT")
    benchmark.options(parser)
    return parser


def add_like(parser: argparse.ArgumentParser) -> None:
    """The option for the shapes of the checkpoint that WORK gets."""
    parser.add_argument("--like", choices=TRUE_SHAPES, default="bloom-3b", help="the shapes that WORK gets")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The options for one amount of RAM and one rate of the disk."""
    parser.add_argument("--ram", type=size, default="3GB", metavar="SIZE")
    parser.add_argument("--disk", type=size, default="1.073GB/s", metavar="RATE")


def given_limits(given: argparse.Namespace) -> list[Limits]:
    """Every pair of an amount of RAM and a rate of the disk in the options."""
    rams, disks = (each if isinstance(each, list) else [each] for each in (given.ram, given.disk))
    return [limits_of(ram, disk) for disk in disks for ram in rams]


def limits_of(ram: float | None, disk: float | None) -> Limits:
    return Limits(None if ram is None else int(ram), disk)


def prepared(given: argparse.Namespace, work: Path, more: Collection[str] = ()) -> Path:
    """The directory of --prepared or the one in `work`, made where there is room for it and `more` forms."""
    source = getattr(given, "checkpoint", None)
    turns.check_room(work, forms.bytes_to_make(work, given.prepared, source, given.like, more))
    return (given.prepared or forms.prepared(work, source, given.like)).resolve()


def prompt_of(prepared: Path, count: int) -> list[int]:
    """Random token ids, the same in every run."""
    choose, vocabulary = random.Random(0), load_manifest(prepared).model.vocab_size
    return [choose.randrange(4, vocabulary) for _ in range(count)]


def peer(program: str, form: Path, prompt: Sequence[int], tokens: int, given: Any, limits: Limits) -> list:
    """The command of a program of scripts/bench/peers."""
    command = turns.module(f"scripts.bench.peers.{program}", form, "--tokens", tokens)
    command += ["--prompt", ",".join(map(str, prompt)), "--threads", given.threads]
    return command + ([] if limits.ram is None else ["--ram", limits.ram])


def in_words(report: Mapping[str, Any]) -> str:
    """The seconds of a turn's passes, and what else it said of itself in few words."""
    passes = report.get("passes") or []
    steps = " ".join(f"{each:.3f}" for each in report.get("seconds") or [each["seconds"] for each in passes])
    return f"{steps} s; {report.get('settings', '')}"


def pass_facts(done: Sequence[Turn]) -> Row:
    """Medians over the passes of one row: seconds, each round's, the prompt's, bytes read, and peak memory."""
    return {
        "seconds": median(second for turn in done for second in turn.steps),
        "rounds": [median(turn.steps) for turn in done],
        "prompt_seconds": median(turn.report["seconds"][0] for turn in done),
        "read_bytes": median(count for turn in done for count in turn.report["read_bytes"][1:]),
        "peak_rss": max(turn.report["peak_rss"] for turn in done),
    }
