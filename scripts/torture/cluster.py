"""Kill a random machine of several in the middle of a session, again and again; all must go on to the same text.

    python -m scripts.torture.cluster --kills 50 [--machines 3] [--seed 1] [--form lossless]

Each machine is a process with a slice of the miniature and a session directory of its own. A random one is killed with
SIGKILL at a random moment after the text has grown. The others must end by themselves, each with one sentence that
names the one that was killed. Then all of them are started again. A round ends with the text, which must be that of one
machine; then the next one begins without a session.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import runner
from runner.format.coded import PLAIN
from runner.format.quantised import FORMS
from runner.format.slices import Slice, even
from runner.generation.options import Sampling
from runner.generation.session_files import CACHE
from scripts.torture.attempt import BLOOMDESK, ROOT, source_of
from toolkit.commands.convert import convert

PROMPT, TOKENS = "The SQL command to show all the users is:", 60
SAMPLING = Sampling(temperature=0.9, top_p=0.95, seed=5, ignore_eos=True)
OPTIONS = ("--temperature", "0.9", "--top-p", "0.95", "--seed", "5", "--ignore-eos", "--json")
# Seconds after the text has grown within which a kill comes; those in which the others must end; between two looks.
LONGEST, SOON, LOOK = 2.0, 30.0, 0.01


@dataclass(frozen=True)
class Machines:
    """The directories of all slices, and those of their sessions."""

    slices: Sequence[Path]
    sessions: Sequence[Path]

    def start(self) -> list[subprocess.Popen[str]]:
        """All of them, as torchrun would start them."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(self.slices))}
        return [
            subprocess.Popen(
                [
                    *BLOOMDESK,
                    "generate",
                    path,
                    PROMPT,
                    "--max-new-tokens",
                    str(TOKENS),
                    *OPTIONS,
                    "--session",
                    kept,
                ],
                env={
                    **os.environ,
                    **meeting,
                    "RANK": str(rank),
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(ROOT),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, (path, kept) in enumerate(zip(self.slices, self.sessions, strict=True))
        ]

    @property
    def progress(self) -> int:
        """Bytes that the first session has."""
        cache = self.sessions[0] / CACHE
        return cache.stat().st_size if cache.exists() else 0

    def forget(self) -> None:
        for session in self.sessions:
            shutil.rmtree(session)


def kill_one(machines: Machines, chance: random.Random) -> float | str:
    """Seconds until the others had ended after a kill, or the text if that was there before."""
    before, ranks = machines.progress, machines.start()
    while ranks[0].poll() is None and machines.progress <= before:
        time.sleep(LOOK)
    time.sleep(chance.uniform(0, LONGEST))
    victim = chance.randrange(len(ranks))
    ranks[victim].kill()
    began = time.monotonic()
    outputs = [rank.communicate(timeout=SOON) for rank in ranks]
    if ranks[0].returncode == 0:
        return outputs[0][0]
    taken = time.monotonic() - began
    for number, (rank, (_, errors)) in enumerate(zip(ranks, outputs, strict=True)):
        is_named = f"rank {victim} (" in errors and errors.startswith("error: ")
        assert number == victim or (rank.returncode == 1 and is_named), (
            victim,
            number,
            rank.returncode,
            errors,
        )
    return taken


def whole_text(machines: Machines) -> str:
    """What the first machine prints if nobody is killed."""
    ranks = machines.start()
    outputs = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), outputs
    return outputs[0][0]


def run(work: Path, given: argparse.Namespace) -> tuple[Counter[str], list[float]]:
    """Counts, and the seconds until the others had ended; raises AssertionError at the first text that differs."""
    source, shares = source_of(work), even(given.machines)
    convert(source, work / "whole", form=given.form)
    slices = [work / f"slice{index}" for index in range(given.machines)]
    for index, path in enumerate(slices):
        convert(source, path, form=given.form, own=Slice(index, shares))
    model = runner.load(work / "whole")
    expected = list(model.generate(PROMPT, max_new_tokens=TOKENS, sampling=SAMPLING))
    machines = Machines(slices, [work / f"session{index}" for index in range(given.machines)])
    chance, counts, seconds = random.Random(given.seed), Counter[str](), []
    while True:
        done = kill_one(machines, chance) if counts["kills"] < given.kills else whole_text(machines)
        if isinstance(done, float):
            counts["kills"] += 1
            seconds.append(done)
            continue
        assert json.loads(done)["token_ids"] == expected, "the text is another"
        counts["texts"] += 1
        machines.forget()
        print(f"{dict(counts)}, all the same", flush=True)
        if counts["kills"] >= given.kills:
            return counts, sorted(seconds)


def main() -> None:
    """Kill as often as the options say, and print the counts."""
    parser = argparse.ArgumentParser(
        description="Kill one of several machines at random and compare the texts."
    )
    parser.add_argument("--kills", type=int, default=50, metavar="N")
    parser.add_argument("--machines", type=int, default=3, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--form", choices=FORMS, default=PLAIN)
    with tempfile.TemporaryDirectory() as work:
        counts, seconds = run(Path(work), parser.parse_args())
    middle, last = seconds[len(seconds) // 2], seconds[-1]
    print(
        f"{dict(counts)}: every text the same; the others ended after {middle:.1f} s, the last {last:.1f} s"
    )


if __name__ == "__main__":
    main()
