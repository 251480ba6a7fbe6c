"""Kill `bloomdesk prepare` at random moments while the hub drops, stalls and corrupts its answers.

    python -m scripts.torture.kill_prepare --kills 200 [--seed 1] [--lossless]

A local hub serves the miniature with random faults. `prepare` is started, killed with SIGKILL at a random moment, and
started again, until it ends by itself; then its directory must be, byte for byte, that of an undisturbed run, and the
next round begins with an empty one. A run that gives up must do so with one clear error, and continues when it is
started again.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

from scripts.fakehub.server import LocalHub, RandomFaults
from scripts.torture.attempt import BLOOMDESK, REPO, attack, content, environment, prepared, source_of

# Seconds before the kill at the latest; an undisturbed run takes about as long.
LONGEST_RUN = 6.0
# Runs of one round before it counts as stuck.
TRIES = 500


def one_round(
    command: list[str], variables: dict[str, str], chance: random.Random, counts: Counter[str], kills: int
) -> None:
    """Run the command until it ends well; kill it on the way while fewer than `kills` have been counted."""
    for _ in range(TRIES):
        kill_after = chance.uniform(0.3, LONGEST_RUN) if counts["kills"] < kills else None
        try:
            # At the timeout, `run` sends SIGKILL.
            done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=kill_after)
        except subprocess.TimeoutExpired:
            counts["kills"] += 1
            continue
        if done.returncode == 0:
            counts["rounds"] += 1
            return
        assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr, done
        counts["gave up with a clear error"] += 1
    raise AssertionError(f"not finished after {TRIES} runs")


def run(kills: int, seed: int, work: Path, lossless: bool) -> Counter[str]:
    """Counts of kills and of rounds; raises AssertionError at the first result that differs."""
    chance, counts = random.Random(seed), Counter[str]()
    source, directory = source_of(work), work / "bloom"
    with LocalHub({REPO: source}) as hub:
        expected = prepared(hub, work / "undisturbed", lossless)
    with LocalHub({REPO: source}, faults=RandomFaults(seed, share=0.1, longest_stall=1.0)) as hub:
        variables = environment(hub.endpoint) | {"OMP_NUM_THREADS": "1"}
        command = [*BLOOMDESK, "prepare", REPO, str(directory), *(["--lossless"] if lossless else [])]
        start = time.monotonic()
        while counts["kills"] < kills:
            one_round(command, variables, chance, counts, kills)
            assert content(directory) == expected, "the result differs from that of an undisturbed run"
            shutil.rmtree(directory)
            print(f"{time.monotonic() - start:.0f} s: {dict(counts)}, all byte-identical", flush=True)
    return counts


if __name__ == "__main__":
    attack(run, "Kill prepare at random and compare its results.", "--kills", 200)
