"""One to four machines on this one: how long a token takes, what goes over the wire, what the gathers cost.

    python -m scripts.bench.cluster --work WORK --out OUT.json [--model bloom-1b7] [--machines 1,2,3,4]

Each rank is in a network namespace of its own, behind a wire of 1 Gbit/s (a token bucket at both ends), and in a
control group of its own, whose brake is its disk: so neither depends on the cores that all ranks share here. The
checkpoint is noise of a BLOOM's shapes, made in WORK, with a slice for each rank. Every rank has so little RAM that
next to nothing of the weights stays. A prompt of 128 tokens is read, then some more tokens come, a pass each.

The bytes are those that the first rank counts of what it sends, and those that the interface of its namespace has
counted, with TCP/IP, gloo's own messages and torch's store. Needs root, `ip` and `tc`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from runner.format.slices import Slice, even
from scripts.bench.control_group import control_group
from scripts.bench.harness import Column, save, table
from scripts.bench.turns import cool, say
from scripts.fakehub import checkpoint
from toolkit.commands.convert import convert

BRIDGE, NETWORK, PORT = "bloomdesk0", "10.99.0", 29_400
PROMPT_TOKENS = 128
COLUMNS = (
    Column("machines", "machines"),
    Column("s/token", "seconds_per_token"),
    Column("of 1/n of one", "share", ".0%"),
    Column("prompt of 128, s", "prompt_seconds"),
    Column("in gathers, s/token", "gather_seconds", ".3f"),
    Column("sent by a rank, MB/token", "sent", ".3f", 1e6),
    Column("on its wire, MB/token", "on_wire", ".3f", 1e6),
)


@dataclass(frozen=True)
class Machine:
    """A rank's namespace and its address there."""

    number: int

    @property
    def namespace(self) -> str:
        return f"bloomdesk-{self.number}"

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number + 1}"

    def inside(self, *command: object) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *map(str, command)]

    def bytes_sent(self) -> int:
        """What its interface has sent so far."""
        done = subprocess.run(
            self.inside("cat", "/sys/class/net/wire/statistics/tx_bytes"),
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)


def run(*command: object) -> None:
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def wired(count: int, rate: str) -> Iterator[list[Machine]]:
    """Machines that a bridge connects, each by a wire of `rate`."""
    machines = [Machine(number) for number in range(count)]
    with ExitStack() as undo:
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        undo.callback(run, "ip", "link", "del", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for each in machines:
            run("ip", "netns", "add", each.namespace)
            undo.callback(run, "ip", "netns", "del", each.namespace)
            outside = f"bd{each.number}"
            run("ip", "link", "add", outside, "type", "veth", "peer", "name", "wire", "netns", each.namespace)
            run("ip", "link", "set", outside, "master", BRIDGE, "up")
            run(*each.inside("ip", "address", "add", f"{each.address}/24", "dev", "wire"))
            run(*each.inside("ip", "link", "set", "lo", "up"))
            run(*each.inside("ip", "link", "set", "wire", "up"))
            bucket = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", "10ms")
            run("tc", "qdisc", "add", "dev", outside, *bucket)
            run(*each.inside("tc", "qdisc", "add", "dev", "wire", *bucket))
        yield machines


def make_slices(work: Path, model: str, counts: Sequence[int]) -> dict[int, list[Path]]:
    """The directories of each number of machines; those that are there are kept."""
    found = {count: [work / f"{model}-{count}-{index}" for index in range(count)] for count in counts}
    if all((path / "done").exists() for paths in found.values() for path in paths):
        return found
    source = work / f"{model}-source"
    hidden_size, heads, blocks = checkpoint.TRUE_SHAPES[model]
    sizes = {"hidden_size": hidden_size, "heads": heads, "blocks": blocks}
    checkpoint.synthetic(source, **sizes, vocab_size=checkpoint.TRUE_VOCABULARY)
    for count, paths in found.items():
        for index, path in enumerate(paths):
            convert(source, path, own=Slice(index, even(count)) if count > 1 else None)
            (path / "done").touch()
    shutil.rmtree(source)
    return found


def measure(
    directories: Sequence[Path], machines: Sequence[Machine], given: argparse.Namespace
) -> dict[str, Any]:
    """What the first rank reports of a prompt and some tokens, and what its interface has sent."""
    cool(directories)
    before = machines[0].bytes_sent()
    with ExitStack() as held:
        processes = []
        for machine, directory in zip(machines, directories, strict=False):
            group = held.enter_context(control_group(read_rate=given.disk, disk_of=directory))
            command = [sys.executable, "-m", "toolkit.cli.start", "generate", directory, " a" * PROMPT_TOKENS]
            command += ["--max-new-tokens", given.tokens + 1, "--ram", given.ram, "--speculate", "off"]
            command += ["--ignore-eos", "--json"]
            processes.append(start(machine, len(directories), group.command(machine.inside(*command))))
        out, *_ = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit("a rank has failed")
    return {**json.loads(out), "on_wire": machines[0].bytes_sent() - before}


def start(machine: Machine, count: int, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """A rank, as torchrun would start it."""
    meeting = {"MASTER_ADDR": f"{NETWORK}.1", "MASTER_PORT": str(PORT)}
    rank = {"RANK": str(machine.number), "WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "wire"}
    return subprocess.Popen(command, env={**os.environ, **meeting, **rank}, stdout=subprocess.PIPE)


def row_of(report: dict[str, Any], count: int) -> dict[str, Any]:
    """A row of the table; the prompt's bytes are taken for as many as its rows have."""
    prompt, *tokens = report["token_seconds"]
    wire, rows = report.get("machines", {}), len(report["prompt_token_ids"]) + len(tokens)
    return {
        "machines": str(count),
        "seconds_per_token": median(tokens),
        "token_seconds": tokens,
        "prompt_seconds": prompt,
        "prompt_tokens": len(report["prompt_token_ids"]),
        "gather_seconds": median(wire["pass_waiting_seconds"][1:]) if wire else 0,
        "sent": wire.get("bytes_sent", 0) / rows,
        "on_wire": report["on_wire"] / rows if count > 1 else 0,
        "token_ids": report["token_ids"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure one to four machines on this one.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="bloom-1b7")
    parser.add_argument("--machines", default="1,2,3,4")
    parser.add_argument("--tokens", type=int, default=3)
    parser.add_argument("--disk", type=float, default=0.15e9, help="bytes a second")
    parser.add_argument("--wire", default="1gbit")
    parser.add_argument("--ram", default="1.5GB")
    given = parser.parse_args()
    counts = [int(each) for each in given.machines.split(",")]
    given.work.mkdir(parents=True, exist_ok=True)
    slices = make_slices(given.work, given.model, counts)
    rows = []
    with wired(max(counts), given.wire) as machines:
        for count in counts:
            rows.append(row_of(measure(slices[count], machines, given), count))
            say(json.dumps(rows[-1]))
    for row in rows:
        if rows[0]["machines"] == "1":
            row["share"] = rows[0]["seconds_per_token"] / int(row["machines"]) / row["seconds_per_token"]
    if len({tuple(row["token_ids"]) for row in rows}) > 1:
        raise SystemExit("the texts differ")
    print(table(COLUMNS, rows))
    save(
        given.out,
        "cluster",
        {"model": given.model, "disk": given.disk, "wire": given.wire, "rows": rows},
        given.work,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
