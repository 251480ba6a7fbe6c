"""Kill `bloomdesk prepare` at random, again and again, on a line that drops, stalls and corrupts.

    python -m scripts.torture.kill_prepare --kills 200 [--seed 1] [--lossless]

A local hub serves the miniature with random faults. `prepare` is started, killed with SIGKILL at a random moment, and
started again, until it ends by itself; then its directory must be, byte for byte, that of an undisturbed run, and the
next round begins with an empty one. A run that gives up by itself must do so with one clear error, and goes on when it
is started again.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from scripts.fakehub.server import LocalHub, RandomFaults
from scripts.torture.attempt import REPO, content, options, prepared, source_of

LONGEST_RUN = 6.0  # seconds before the kill at the latest; an undisturbed run takes about as long
TRIES = 500  # runs of one round before it counts as stuck


def run_once(command: list[str], environment: dict[str, str], kill_after: float | None) -> tuple[int, str]:
    """Exit status and standard error of one run, killed after this many seconds unless it ends before."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _, said = process.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            _, said = process.communicate()
    return process.returncode, said


def one_round(
    command: list[str], environment: dict[str, str], chance: random.Random, counts: Counter[str], kills: int
) -> None:
    """From nothing to the end, with kills on the way as long as fewer than `kills` have been counted."""
    for _ in range(TRIES):
        kill_after = chance.uniform(0.3, LONGEST_RUN) if counts["kills"] < kills else None
        status, said = run_once(command, environment, kill_after)
        if status == 0:
            counts["rounds"] += 1
            return
        if status == -signal.SIGKILL:
            counts["kills"] += 1
            continue
        assert status == 1 and "error: " in said and "Traceback" not in said, (status, said)
        counts["gave up with a clear error"] += 1
    raise AssertionError(f"not through after {TRIES} runs; the last said: {said}")


def run(kills: int, seed: int, work: Path, lossless: bool) -> Counter[str]:
    """What happened; raises AssertionError at the first result that differs."""
    chance, counts = random.Random(seed), Counter[str]()
    source, directory = source_of(work), work / "bloom"
    with LocalHub({REPO: source}) as hub:
        expected = prepared(hub, work / "undisturbed", lossless)
    with LocalHub({REPO: source}, faults=RandomFaults(seed, share=0.1, longest_stall=1.0)) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "toolkit.cli.app", "prepare", REPO, str(directory)]
        command += ["--lossless"] if lossless else []
        start = time.monotonic()
        while counts["kills"] < kills:
            one_round(command, environment, chance, counts, kills)
            assert content(directory) == expected, "the result differs from that of an undisturbed run"
            shutil.rmtree(directory)
            print(f"{time.monotonic() - start:.0f} s: {dict(counts)}, all byte-identical", flush=True)
    return counts


def main() -> None:
    given = options("kill_prepare", "Kill prepare at random and compare what comes of it.", "--kills", 200)
    with tempfile.TemporaryDirectory() as work:
        counts = run(given.kills, given.seed, Path(work), given.lossless)
    print(
        f"{counts['kills']} kills, {counts['rounds']} finished directories, every one byte-identical: {dict(counts)}"
    )


if __name__ == "__main__":
    main()
