"""BLOOM-176B on 1 to 16 machines, on paper: from measured rates of the kernel and of gathers, by `runner.estimate`.

    python -m scripts.bench.machines_on_paper [--form lossless]

Nothing of it was run at that size. Rates: drives of 3 and 7 GB/s; the kernel's are those that docs/performance.md has
for two cores, which a desktop with more of them exceeds.
"""

from __future__ import annotations

import argparse
import sys

from runner.errors import BloomdeskError
from runner.estimate.family import hyperparameters
from runner.estimate.forecast import LOSSLESS_SHARE, Stored
from runner.estimate.machines import Network, forecast_machines
from runner.estimate.rates import Rates
from runner.format.coded import LOSSLESS, PLAIN
from scripts.bench.harness import Column, table

BLOOM, GB = hyperparameters("bloom"), 10**9
COUNTS, SIZES, DRIVES, GIGABITS = (1, 2, 4, 8, 16), (16, 64, 128), (3.0, 7.0), (1, 10)
PROCESS, PROMPT, NEW = 6 * 10**8, 16, 64
# Of the RAM, as the runner takes by default.
SHARE = 0.9
KERNEL = {"memory": 30e9, "compute": 73e9, "decoded": 12e9, "int8": 20e9, "int4": 20e9}


def cell(count: int, ram: int, drive: float, gigabit: int, stored: Stored) -> str:
    """Seconds a token, or that it does not fit."""
    rates, network = Rates(disk=drive * 1e9, **KERNEL), Network(count, gigabit * 125e6)
    try:
        found = forecast_machines(
            BLOOM, round(SHARE * ram * GB), PROCESS, rates, PROMPT, NEW, network, stored
        )
    except BloomdeskError:
        return "too little RAM"
    return f"{found.seconds_per_token:.1f}{'' if found.memory_plan.streamed_bytes else ' (no disk)'}"


def main() -> int:
    parser = argparse.ArgumentParser(description="BLOOM-176B on several machines, on paper.")
    parser.add_argument("--form", choices=(PLAIN, LOSSLESS), default=LOSSLESS)
    stored = Stored(LOSSLESS, LOSSLESS_SHARE) if parser.parse_args().form == LOSSLESS else Stored()
    columns = [Column("RAM, drive, network", "name"), *(Column(str(count), str(count)) for count in COUNTS)]
    rows = [
        {
            "name": f"{ram} GB, {drive:g} GB/s, {gigabit} Gbit/s",
            **{str(count): cell(count, ram, drive, gigabit, stored) for count in COUNTS},
        }
        for ram in SIZES
        for drive in DRIVES
        for gigabit in GIGABITS
    ]
    print(table(columns, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
