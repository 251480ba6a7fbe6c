"""BLOOM-176B on 1 to 16 machines, on paper: from measured rates of the kernel and of gathers, by `runner.estimate`.

    python -m scripts.bench.machines_on_paper [--form lossless] [--cores 8]

Nothing of it was run at that size. Rates: drives of 3 and 7 GB/s; those of the kernel were measured on two cores with
AVX2, and grow with the cores as far as the memory of a desktop goes.
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
# Of two cores, and bytes a second of a desktop's memory.
KERNEL = {"memory": 25e9, "compute": 57e9, "decoded": 8.3e9, "int8": 25e9, "int4": 25e9}
MEMORY = 50e9


def rates_of(cores: int, drive: float) -> Rates:
    """What a machine with `cores` cores and a drive of `drive` GB/s does in a second."""
    kernel = {name: rate * cores / 2 for name, rate in KERNEL.items()}
    return Rates(disk=drive * 1e9, **{**kernel, "memory": min(MEMORY, kernel["memory"])})


def cell(count: int, ram: int, rates: Rates, gigabit: int, stored: Stored) -> str:
    """Seconds a token, or that it does not fit."""
    network = Network(count, gigabit * 125e6)
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
    parser.add_argument("--cores", type=int, default=8, metavar="N")
    given = parser.parse_args()
    stored = Stored(LOSSLESS, LOSSLESS_SHARE) if given.form == LOSSLESS else Stored()
    columns = [Column("RAM, drive, network", "name"), *(Column(str(count), str(count)) for count in COUNTS)]
    rows = [
        {
            "name": f"{ram} GB, {drive:g} GB/s, {gigabit} Gbit/s",
            **{
                str(count): cell(count, ram, rates_of(given.cores, drive), gigabit, stored)
                for count in COUNTS
            },
        }
        for ram in SIZES
        for drive in DRIVES
        for gigabit in GIGABITS
    ]
    print(table(columns, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
