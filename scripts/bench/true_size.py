"""Blocks of BLOOM-176B's true size beside the disk's limit, in several amounts of RAM.

    python -m scripts.bench.true_size --work WORK --json true_size.json
    python -m scripts.bench.true_size --prepared DIR --work WORK --ram 2GB --disk 1.073GB/s

WORK gets a checkpoint of the true embedding and some true blocks of random weights: 22 GB with 3 of them, and 7 GB
more while it is made. It stays there for the next run. Each turn is a fresh process in a fresh control group that
finds every file cold: a prompt of 16 tokens, then passes of one row. Turns go round and round through all limits.

The disk's rate is measured under a turn's own limits just before and after it. The limit of a pass is what it
streams over the most that the disk gave: before, after, or to the stream itself in the time in which it read; or over
the brake where that held the disk. So where the disk is quicker in a turn than around it, the share of the limit is
the share of the time in which a read was under way, which stands beside it as "disk busy". `bloomdesk plan` forecasts
the same passes under the same limits, at the rates that it measures itself.

The second table is no measurement. It takes what all 70 blocks stream for a text of 32 tokens, by the runner's own
sharing-out of the RAM and the memory that its process took. It divides that by the rate of a drive, or all weights by
the rate of the product for one row where that takes longer, and then by the share of the limit that was reached in
that amount of RAM: with the brake for drives up to its rate, without it for faster ones. The tutorial's own figure is
180 s on a drive of 7 GB/s.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
    coded_share,
    forecast,
    weight_bytes,
)
from runner.estimate.rates import Rates
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import part_specs
from runner.format.manifest import load_manifest
from scripts.bench import turns
from scripts.bench.turns import CannotRun, Limits, machine, numbers, say, sizes
from scripts.fakehub.checkpoint import synthetic

TRUE_SHAPE = f"{SHAPES['bloom'][0]},{SHAPES['bloom'][1]},{VOCABULARY}"
DRIVES = (1.073e9, 3.5e9, 7e9)  # the brake, a drive of PCIe 3, and the tutorial's
PROMPT_TOKENS = 16
NEW_TOKENS = 16  # of the extrapolation: with the prompt 128 MB of KV cache


@dataclass(kw_only=True)
class Turn(turns.Turn):
    """A turn under `limits`: the disk's rates before and after it, and the plan's forecast."""

    limits: Limits
    round: int
    disk_rates: tuple[float, float]
    plan: dict[str, Any] | None

    @property
    def seconds(self) -> float:
        return median(self.steps)

    @property
    def rate(self) -> float:
        """Bytes a second that the limit is computed with."""
        return turns.rate_of_the_limit([*self.disk_rates, turns.rate_while_reading(self.report)], self.limits)

    @property
    def limit(self) -> float:
        """Seconds that a pass of one row can't be faster than, as far as the disk goes."""
        return self.report["streamed_bytes"] / self.rate

    @property
    def busy(self) -> float:
        """The share of its passes in which a read was under way."""
        return sum(self.report["reading_seconds"]) / sum(self.steps)

    @property
    def forecast_ratio(self) -> float | None:
        predicted = self.plan and self.plan["forecast"]["seconds_per_token"]
        return predicted / self.seconds if predicted else None


class Bench:
    """All turns of one run; `given` are the options."""

    def __init__(self, given: argparse.Namespace, prepared: Path) -> None:
        self.given, self.prepared = given, prepared
        manifest = load_manifest(prepared)
        self.model, self.coded_share = manifest.model, coded_share(manifest)
        choose = random.Random(0)
        self.prompt = [choose.randrange(4, self.model.vocab_size) for _ in range(PROMPT_TOKENS)]
        self.turns: list[Turn] = []

    def run(self) -> None:
        for number in range(1, self.given.rounds + 1):
            for limits in self.given.limits:
                turn = self.turn(limits, number)
                self.turns.append(turn)
                say(f"round {number}: {limits}: {turn.failure or in_words(turn)}")
                self.save()

    def turn(self, limits: Limits, number: int) -> Turn:
        """A fresh process from nothing in the page cache to its last pass, between two looks at the disk."""
        before = turns.disk_rate(self.prepared, limits)
        turns.cool([self.prepared])
        command = turns.module("scripts.bench.peers.one_row_passes", self.prepared)
        command += ["--prompt", ",".join(map(str, self.prompt)), "--tokens", self.given.tokens + 1]
        command += ["--threads", self.given.threads, "--ram", limits.ram]
        turn = turns.take_turn(command, limits, self.prepared, self.given.timeout)
        after = turns.disk_rate(self.prepared, limits)
        plan = self.plan(limits) if turn.steps else None
        return Turn(**asdict(turn), limits=limits, round=number, disk_rates=(before, after), plan=plan)

    def plan(self, limits: Limits) -> dict[str, Any] | None:
        """What `bloomdesk plan` says under these limits; None where it failed."""
        turns.cool([self.prepared])
        command = turns.module("toolkit.cli.app", "plan", self.prepared, "--json", "--ram", limits.ram)
        command += ["--tokens", self.given.tokens + 1, "--prompt-tokens", PROMPT_TOKENS]
        turn = turns.take_turn(command, limits, self.prepared, self.given.timeout)
        if turn.failure:
            say(f"plan: {turn.failure}")
        return None if turn.failure else turn.report

    def under(self, limits: Limits) -> list[Turn]:
        return [turn for turn in self.turns if turn.limits == limits and turn.steps]

    def measured(self) -> list[dict[str, Any]]:
        """Medians over the rounds, by limits."""
        found = []
        for limits in self.given.limits:
            row: dict[str, Any] = {"ram": limits.ram, "disk": limits.disk}
            if done := self.under(limits):
                passes = [second for turn in done for second in turn.steps]
                ratios = [turn.forecast_ratio for turn in done if turn.forecast_ratio]
                row |= {
                    "seconds": median(passes),
                    "rounds": [turn.seconds for turn in done],
                    "limit": median(turn.limit for turn in done),
                    "share": median(turn.limit / turn.seconds for turn in done),
                    "busy": median(turn.busy for turn in done),
                    "disk_rate": median(turn.rate for turn in done),
                    "streamed_bytes": median(turn.report["streamed_bytes"] for turn in done),
                    "read_bytes": median(count for turn in done for count in turn.report["read_bytes"][1:]),
                    "group_peak": max(turn.group_peak or 0 for turn in done) or None,
                    "peak_rss": max(turn.report["peak_rss"] for turn in done),
                    "forecast_ratio": median(ratios) if ratios else None,
                }
            else:
                row["failure"] = "; ".join(
                    {turn.failure or "" for turn in self.turns if turn.limits == limits}
                )
            found.append(row)
        return found

    def extrapolated(self) -> list[dict[str, Any]]:
        """What a token of the whole model should take, by RAM and drive: see the top of this file."""
        whole = family.hyperparameters("bloom")
        measured = [row for row in self.measured() if "seconds" in row]
        rows = []
        for ram in dict.fromkeys(row["ram"] for row in measured):
            process = self.process_bytes(whole, ram)
            try:
                found = forecast(
                    whole, ram, process, self.rates(math.inf), PROMPT_TOKENS, NEW_TOKENS, self.coded_share
                )
            except BloomdeskError as error:
                rows.append({"ram": ram, "failure": error.message})
                continue
            for drive in DRIVES:
                share = share_for(drive, [row for row in measured if row["ram"] == ram])
                # At a drive that takes no time, the limit is what computing, and decoding, take.
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

    def rates(self, drive: float) -> Rates:
        """The machine's, as the plans measured them, with another drive."""
        found = [turn.plan["rates"] for turn in self.turns if turn.plan]
        return Rates(**{name: median(each[name] for each in found) for name in found[0]} | {"disk": drive})

    def process_bytes(self, whole: Hyperparameters, ram: int) -> int:
        """What a process of the whole model holds beside matrices: as measured, with its vectors and tokenizer."""
        reports = [turn.report for turn in self.turns if turn.steps and turn.limits.ram == ram]
        taken = max(report["process_bytes"] for report in reports)
        tokenizer = (self.prepared / "tokenizer.json").stat().st_size
        more = vector_bytes(whole) - vector_bytes(self.model)
        return taken + more + TOKENIZER_MEMORY * (BLOOMS_TOKENIZER - tokenizer)

    def save(self) -> None:
        """Everything so far as JSON, where it was asked for."""
        if not self.given.json:
            return
        body = {
            "benchmark": "true_size",
            "machine": machine(self.prepared),
            "control_group": self.turns[-1].group,
            "threads": self.given.threads,
            "model": asdict(self.model),
            "weights_bytes": weight_bytes(self.model),
            "coded_share": self.coded_share,
            "measured": self.measured(),
            "extrapolated": self.extrapolated() if any(turn.plan for turn in self.turns) else [],
            "turns": [asdict(turn) for turn in self.turns],
        }
        self.given.json.write_text(json.dumps(body, indent=1) + "\n")


def vector_bytes(model: Hyperparameters) -> int:
    return weight_bytes(model) - sum(chunk_bytes(model))


def share_for(drive: float, rows: Sequence[dict[str, Any]]) -> float:
    """The share of the limit reached at the brake that the drive keeps to, else the one without a brake.

    1 where nothing was streamed under these limits.
    """
    streamed = [row for row in rows if row["limit"]]
    braked = [row for row in streamed if row["disk"] and drive <= row["disk"]]
    free = [row for row in streamed if not row["disk"]]
    found = braked or free or streamed
    return min(1.0, found[0]["share"]) if found else 1.0


def in_words(turn: Turn) -> str:
    steps = " ".join(f"{second:.2f}" for second in turn.steps)
    before, after = (f"{rate / 1e9:.3f}" for rate in turn.disk_rates)
    return (
        f"{steps} s; limit {turn.limit:.2f} s, {turn.limit / turn.seconds:.1%} reached, disk busy {turn.busy:.1%}; "
        f"disk {before} before, {after} GB/s after; peak {(turn.group_peak or 0) / 1e9:.2f} GB"
    )


MEASURED_COLUMNS = (
    "RAM, disk",
    "s/pass",
    "range of rounds",
    "limit s",
    "share of it",
    "disk busy",
    "disk GB/s",
    "streamed GB",
    "read GB, the kernel's count",
    "group's peak GB",
    "process's peak GB",
    "plan / measured",
)


def measured_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        limits = str(Limits(row["ram"], row["disk"]))
        if "seconds" not in row:
            lines.append((f"{limits}: {row['failure']}", *[""] * (len(MEASURED_COLUMNS) - 1)))
            continue
        lines.append(
            (
                limits,
                f"{row['seconds']:.2f}",
                f"{min(row['rounds']):.2f} to {max(row['rounds']):.2f}",
                f"{row['limit']:.2f}",
                f"{row['share']:.3f}",
                f"{row['busy']:.3f}",
                f"{row['disk_rate'] / 1e9:.3f}",
                f"{row['streamed_bytes'] / 1e9:.3f}",
                f"{row['read_bytes'] / 1e9:.3f}",
                f"{row['group_peak'] / 1e9:.2f}" if row["group_peak"] else "",
                f"{row['peak_rss'] / 1e9:.2f}",
                f"{row['forecast_ratio']:.2f}" if row["forecast_ratio"] else "",
            )
        )
    return turns.table(MEASURED_COLUMNS, lines)


EXTRAPOLATED_COLUMNS = (
    "RAM",
    "drive GB/s",
    "stays GB",
    "streamed GB",
    "disk alone s",
    "products alone s",
    "share reached",
    "s/token expected",
)


def extrapolated_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        ram = f"{row['ram'] / 1e9:g} GB"
        if "seconds" not in row:
            lines.append((f"{ram}: {row['failure']}", *[""] * (len(EXTRAPOLATED_COLUMNS) - 1)))
            continue
        lines.append(
            (
                ram,
                f"{row['drive'] / 1e9:g}",
                f"{row['resident_bytes'] / 1e9:.1f}",
                f"{row['streamed_bytes'] / 1e9:.1f}",
                f"{row['disk_seconds']:.0f}",
                f"{row['compute_seconds']:.0f}",
                f"{row['share']:.3f}",
                f"{row['seconds']:.0f}",
            )
        )
    return turns.table(EXTRAPOLATED_COLUMNS, lines)


def checkpoint(work: Path, blocks: int, shape: Sequence[int]) -> Path:
    """The prepared directory in `work`, made there of random weights where it is not; shards go as parts come.

    Raises `CannotRun` where the disk is too small, or what is there has another shape.
    """
    prepared, source = work / "prepared", work / "source"
    model = Hyperparameters(shape[0], shape[1], blocks, shape[2], "BF16")
    if (prepared / "manifest.backup.json").exists():
        if load_manifest(prepared).model.n_layer != blocks:
            raise CannotRun(f"{prepared} has another number of blocks: delete it, or take another --work")
        return prepared
    if not (source / "config.json").exists():  # it is written last
        largest = max(spec.nbytes(model.dtype) for spec in part_specs(model))
        turns.check_room(work, weight_bytes(model) + largest + 2**28)
        say(f"writing {weight_bytes(model) / 1e9:.1f} GB of random weights to {source}")
        hidden, heads, vocabulary = shape
        sizes_ = {"hidden_size": hidden, "heads": heads, "blocks": blocks, "vocab_size": vocabulary}
        synthetic(source, **sizes_, normal_embedding=True)
    command = turns.module("toolkit.cli.app", "convert", source, prepared, "--delete-source")
    subprocess.run(list(map(str, command)), cwd=turns.ROOT, stdout=sys.stderr, check=True)
    return prepared


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure blocks of BLOOM-176B's true size against the disk.")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="on the disk to measure")
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="measure this one, and make nothing")
    parser.add_argument("--blocks", type=int, default=3, metavar="N")
    parser.add_argument(
        "--shape", type=numbers, default=TRUE_SHAPE, metavar="HIDDEN,HEADS,VOCABULARY", help="for a quick try"
    )
    parser.add_argument("--ram", type=sizes, default="1GB,2GB,4GB,16GB", metavar="SIZE,...")
    parser.add_argument("--disk", type=sizes, default="1.073GB/s,none", metavar="RATE,...")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--tokens", type=int, default=3, metavar="N", help="passes of one row in a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="for one turn")
    parser.add_argument("--json", type=Path, metavar="OUT")
    given = parser.parse_args()
    if None in given.ram or given.tokens < 1:
        parser.error("--ram must be sizes, and --tokens at least 1")
    given.limits = [Limits(int(ram), disk) for disk in given.disk for ram in given.ram]
    return given


def main() -> int:
    given = options()
    work = given.work.resolve()
    try:
        with turns.sole_worker(work, *given.limits):
            bench = Bench(given, (given.prepared or checkpoint(work, given.blocks, given.shape)).resolve())
            interrupted = not turns.to_the_end(bench.run)
            report(bench)
    except CannotRun as error:
        say(str(error))
        return 2
    return turns.INTERRUPTED if interrupted else 0


def report(bench: Bench) -> None:
    """Both tables, of what there is so far."""
    model = bench.model
    print(
        f"{machine(bench.prepared)}\n{model.n_layer} blocks of hidden size {model.hidden_size:,} and the head, "
        f"{weight_bytes(model) / 1e9:.2f} GB; prompt of {PROMPT_TOKENS}, passes of one row\n"
    )
    print(f"Measured:\n\n{measured_table(bench.measured())}\n")
    if any(turn.plan for turn in bench.turns):
        print(f"Extrapolated to 70 blocks, not measured:\n\n{extrapolated_table(bench.extrapolated())}")


if __name__ == "__main__":
    sys.exit(main())
