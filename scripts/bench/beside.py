"""Processes that use one prepared directory at once: seconds to the first token of each, and the RAM that each adds.

    python -m scripts.bench.beside WORK/prepared --processes 2

Everything begins in the page cache. RAM is the proportional set size, summed over the processes: a page that several
have mapped counts once. Linux tells it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import psutil

from scripts.bench.harness import Column, prompt_of, save, table
from scripts.bench.peers import forms
from scripts.bench.turns import ROOT

COLUMNS = (
    Column("process", "process"),
    Column("load and first token s", "first"),
    Column("next token s", "next", ".3f"),
    Column("RAM of all, GB", "whole", ".2f", 1e9),
    Column("RAM added, GB", "added", ".2f", 1e9),
)
PROGRAM = """
import sys, time
began = time.perf_counter()
import runner
ids = [int(word) for word in sys.argv[2].split(",")]
tokens = runner.load(sys.argv[1]).generate(ids, max_new_tokens=8, speculate="off")
times = [began]
for _ in tokens:
    times.append(time.perf_counter())
seconds = sorted(after - before for before, after in zip(times[1:], times[2:]))
print(times[1] - began, seconds[len(seconds) // 2], flush=True)
sys.stdin.readline()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Processes that use one prepared directory at once.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=16, metavar="N")
    parser.add_argument("--json", type=Path, metavar="OUT")
    given = parser.parse_args()
    prompt = ",".join(map(str, prompt_of(given.directory, given.prompt_tokens)))
    forms.warm(given.directory)
    rows, running = [], []
    try:
        for number in range(1, given.processes + 1):
            command = [sys.executable, "-c", PROGRAM, str(given.directory.resolve()), prompt]
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            running.append(process)
            first, following = map(float, process.stdout.readline().split())
            whole = sum(psutil.Process(each.pid).memory_full_info().pss for each in running)
            added = whole - (rows[-1]["whole"] if rows else 0)
            rows.append(
                {"process": str(number), "first": first, "next": following, "whole": whole, "added": added}
            )
    finally:
        for process in running:
            process.communicate("\n")
    save(given.json, "beside", {"measured": rows}, given.directory)
    print(table(COLUMNS, rows))


if __name__ == "__main__":
    main()
