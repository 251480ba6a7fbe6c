"""Kill a command at random moments, again and again; it must end with what an undisturbed run gives.

    python -m scripts.torture.kill --command prepare --kills 200 [--seed 1] [--form lossless]
    python -m scripts.torture.kill --command convert-delete-source --kills 200
    python -m scripts.torture.kill --command spread --kills 100
    python -m scripts.torture.kill --command repair --kills 200
    python -m scripts.torture.kill --command session --kills 200
    python -m scripts.torture.kill --command serve --kills 100

The command is started, killed with SIGKILL at a random moment, and started again, until it ends by itself; then its
directory must be, byte for byte, that of an undisturbed run, and the next round begins anew. A local hub serves the
miniature to `prepare`, and drops, stalls and corrupts its answers; a run that gives up must do so with one clear error.
After each kill of `convert --delete-source`, every shard must be there, or on each disk sound parts that name its
sha256; any other source must be as it was. After each kill of `spread`, every part must be there whole, or all of its
slices. After each kill of `repair`, every file must be as it was before or as it should be. A generation with
`--session` must come to the text of an undisturbed one. A server that does a batch must come to the output of an
undisturbed one; after each kill no token that was on the disk may be gone, wrong, or there twice.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import runner
from runner.format.coded import PLAIN
from runner.format.manifest import load_manifest
from runner.format.quantised import FORMS, QUANTISED_FORMS
from runner.format.slices import Slice
from runner.generation.options import Sampling
from runner.generation.session_files import SessionFiles
from scripts.fakehub.checkpoint import synthetic
from scripts.fakehub.server import LocalHub, RandomFaults
from scripts.torture import batch_job
from scripts.torture.attempt import BLOOMDESK, REPO, assert_no_row_lost, content, environment, source_of
from scripts.torture.damage import flip
from scripts.torture.full_disk import SHAPE
from toolkit.commands.convert import convert
from toolkit.commands.prepare import prepare
from toolkit.commands.spread import spread
from toolkit.parts.release import file_hash

# Runs of one round before it counts as stuck.
TRIES = 500
# Of slices, where a command makes them.
SHARES = (2, 1, 1)
# Seconds between looks at whether a command has begun, and those of a server's work before it is killed.
LOOK = 0.02
LONGEST_SERVED = 4.0


@dataclass(frozen=True)
class Attack:
    """A command to kill: `begin` makes what it starts from, and `check` raises AssertionError after a kill.

    A kill comes `shortest` to `longest` seconds after `is_begun` says so; `check` may name what is counted then.
    `expected` is what an undisturbed run leaves, as `result` sees it.
    """

    command: list[str]
    variables: dict[str, str]
    directory: Path
    expected: object
    longest: float
    begin: Callable[[], None] = lambda: None
    check: Callable[[], str | None] = lambda: None
    result: Callable[[Path], object] = content
    shortest: float = 0.3
    is_begun: Callable[[], bool] = lambda: True


def run_once(attack: Attack, kill_after: float | None) -> tuple[int, str] | None:
    """Exit status and standard error of the command, or None if it was killed."""
    with subprocess.Popen(
        attack.command, env=attack.variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        is_begun = False
        while True:
            timeout = LOOK if kill_after is not None and not is_begun else kill_after
            try:
                errors = process.communicate(timeout=timeout)[1]
                return process.returncode, errors
            except subprocess.TimeoutExpired:
                if is_begun:
                    process.kill()
                    process.communicate()
                    return None
                is_begun = attack.is_begun()
            except BaseException:
                process.kill()
                raise


def one_round(attack: Attack, chance: random.Random, counts: Counter[str], kills: int) -> None:
    """Run the command until it ends well; kill it on the way while fewer than `kills` have been counted."""
    for _ in range(TRIES):
        kill_after = chance.uniform(attack.shortest, attack.longest) if counts["kills"] < kills else None
        done = run_once(attack, kill_after)
        if done is None:
            counts["kills"] += 1
            if what := attack.check():
                counts[what] += 1
            continue
        status, errors = done
        if status == 0:
            counts["rounds"] += 1
            return
        assert status == 1 and "error: " in errors and "Traceback" not in errors, done
        counts["gave up with a clear error"] += 1
    raise AssertionError(f"not finished after {TRIES} runs")


def run(attack: Attack, kills: int, seed: int) -> Counter[str]:
    """Counts of kills and of rounds; raises AssertionError at the first result that differs."""
    chance, counts, start = random.Random(seed), Counter[str](), time.monotonic()
    while counts["kills"] < kills:
        attack.begin()
        one_round(attack, chance, counts, kills)
        assert attack.result(attack.directory) == attack.expected, (
            "the result differs from that of an undisturbed run"
        )
        shutil.rmtree(attack.directory)
        print(f"{time.monotonic() - start:.0f} s: {dict(counts)}, all the same", flush=True)
    return counts


def undisturbed(directory: Path, make: Callable[[], object]) -> dict[str, bytes]:
    """The content that `make` gives a directory, which is gone then: slices record the places where they were made."""
    make()
    expected = content(directory)
    shutil.rmtree(directory)
    return expected


def changes(directory: Path) -> Callable[[], bool]:
    """Whether a run has changed the names under a directory; each run is asked often, from its start on."""
    seen: list[list[Path]] = []

    def is_begun() -> bool:
        now = sorted(directory.rglob("*"))
        if not seen or now == seen[0]:
            seen[:] = seen or [now]
            return False
        seen.clear()
        return True

    return is_begun


def small_source(work: Path) -> Path:
    """A checkpoint of fewer blocks than the miniature: manifests of several disks take their time."""
    synthetic(work / "source", **SHAPE)
    return work / "source"


def attack_prepare(work: Path, form: str, hub: LocalHub, *, kind: str = "") -> Attack:
    """`prepare` from a hub with faults: all rows, those of one slice, or a slice on each of three disks."""
    (small_source if kind else source_of)(work)
    first, options, asked = destination(work / "bloom", kind)
    if kind == "slice":
        # Without it nothing vouches for rows, and the hub changes bytes.
        options, asked = [*options, "--check-whole"], asked | {"check_whole": True}
    with LocalHub({REPO: work / "source"}) as calm, patch.dict(os.environ, HF_ENDPOINT=calm.endpoint):
        expected = undisturbed(work / "bloom", lambda: prepare(REPO, first, form=form, **asked))
    command = [*BLOOMDESK, "prepare", REPO, str(first), "--form", form, *options]
    variables = environment(hub.endpoint) | {"OMP_NUM_THREADS": "1"}
    return Attack(command, variables, work / "bloom", expected, 6.0)


def destination(directory: Path, kind: str) -> tuple[Path, list[str], dict[str, Any]]:
    """Where a command writes, its options for that, and those of the function: all in `directory`."""
    shares = ["--shares", ",".join(map(str, SHARES))]
    if kind == "slice":
        return directory, ["--slice", f"2/{len(SHARES)}", *shares], {"own": Slice(1, SHARES)}
    if kind == "also":
        others = [directory / "b", directory / "c"]
        options = [word for each in others for word in ("--also", str(each))]
        return directory / "a", [*options, *shares], {"also": others, "shares": SHARES}
    return directory, [], {}


def attack_convert(
    work: Path, form: str, hub: LocalHub, *, kind: str = "", of_prepared: bool = False
) -> Attack:
    """`convert`, with `--delete-source` if the weights can be had back, which deletes its shards one by one."""
    whole = (small_source if kind or of_prepared else source_of)(work)
    source, directory = work / "out", work / "bloom"
    first, options, asked = destination(directory, kind)
    if of_prepared:
        convert(whole, work / "prepared")
        whole = work / "prepared"
    expected = undisturbed(directory, lambda: convert(whole, first, form=form, **asked))
    before = content(whole)
    deletes = not of_prepared and kind != "slice" and form not in QUANTISED_FORMS
    shards = {
        name: hashlib.sha256(data).hexdigest() for name, data in before.items() if name.endswith(".bin")
    }

    def begin() -> None:
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(whole, source)

    def check() -> None:
        found = content(source)
        gone = before.keys() - found.keys()
        assert found == {name: before[name] for name in before.keys() - gone}, "the source is another"
        assert not gone or (deletes and gone <= shards.keys()), f"{gone} of the source are gone"
        for name, each in itertools.product(gone, (first, *asked.get("also", ()))):
            records = load_manifest(each).parts.values()
            made = [
                record
                for record in records
                if (name, shards[name]) in [(s.file, s.sha256) for s in record.sources]
            ]
            assert made, f"{name} is gone, and no part was made from it"
            for record in made:
                assert file_hash(each / record.file) == record.xxh3_128, f"{record.file} is damaged"

    deletion = ["--delete-source"] if deletes else []
    command = [*BLOOMDESK, "convert", str(source), str(first), "--form", form, *deletion, *options]
    return Attack(
        command,
        environment(hub.endpoint),
        directory,
        expected,
        0.6,
        begin,
        check,
        shortest=0.0,
        is_begun=changes(directory),
    )


def attack_spread(work: Path, form: str, hub: LocalHub) -> Attack:
    """`spread`, which deletes each whole part when its slices are proven; a file of the user's lies beside them."""
    whole, directory = work / "whole", work / "disks"
    convert(small_source(work), whole, form=form)
    first, options, asked = destination(directory, "also")
    manifest = load_manifest(whole)

    def begin() -> None:
        shutil.copytree(whole, first)
        (first / "letter.txt").write_bytes(b"mine")

    def check() -> str:
        count = assert_no_row_lost(manifest, first, asked["also"])
        assert (first / "letter.txt").read_bytes() == b"mine"
        return "with parts of both kinds" if 0 < count < len(manifest.parts) else "before or after"

    begin()
    expected = undisturbed(directory, lambda: spread(first, **asked))
    command = [*BLOOMDESK, "spread", str(first), *options]
    return Attack(
        command,
        environment(hub.endpoint),
        directory,
        expected,
        0.6,
        begin,
        check,
        shortest=0.0,
        is_begun=changes(directory),
    )


def attack_repair(work: Path, form: str, hub: LocalHub) -> Attack:
    """`repair` of a directory in which a third of the files is damaged."""
    source, directory, chance = source_of(work), work / "bloom", random.Random(1)
    convert(source, work / "undisturbed", form=form)
    expected, damaged = content(work / "undisturbed"), {}

    def begin() -> None:
        shutil.copytree(work / "undisturbed", directory)
        for _ in range(30):
            flip(directory, chance)
        # One of the two must be sound.
        shutil.copy(work / "undisturbed" / "manifest.backup.json", directory)
        damaged.clear()
        damaged.update(content(directory))

    def check() -> None:
        for name, data in content(directory).items():
            assert name.endswith(".incomplete") or data in (expected[name], damaged[name]), (
                f"{name} is another"
            )
        assert set(expected) <= set(content(directory)), "a file is gone"

    command = [*BLOOMDESK, "repair", str(directory), "--source", str(source)]
    return Attack(command, environment(hub.endpoint), directory, expected, 3.0, begin, check)


def attack_session(work: Path, form: str, hub: LocalHub) -> Attack:
    """`generate --session`, whose drawn text is 300 tokens long."""
    bloom, directory = work / "bloom", work / "session"
    convert(source_of(work), bloom, form=form)
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=5, ignore_eos=True)
    prompt = "The SQL command to show all the users is:"
    expected = list(runner.load(bloom).generate(prompt, max_new_tokens=300, sampling=sampling))
    options = [
        "--temperature",
        "0.9",
        "--top-p",
        "0.95",
        "--seed",
        "5",
        "--ignore-eos",
        "--max-new-tokens",
        "300",
        "--json",
    ]
    command = [*BLOOMDESK, "generate", str(bloom), prompt, "--session", str(directory), *options]

    def text(session: Path) -> list[int]:
        return list(SessionFiles.load(session).new_ids)

    return Attack(command, environment(hub.endpoint), directory, expected, 4.0, result=text)


def attack_serve(work: Path, form: str, hub: LocalHub) -> Attack:
    """`serve --data` with a batch of 64 lines, drawn texts and likeliest ones, some with log-probabilities."""
    bloom, data, made = work / "bloom", work / "data", work / "made"
    convert(source_of(work), bloom, form=form)
    batch_job.make(bloom, made, lines=64, tokens=40)
    variables = environment(hub.endpoint) | {"OMP_NUM_THREADS": "1"}

    def command(directory: Path) -> list[str]:
        return [sys.executable, "-m", "scripts.torture.batch_job", str(bloom), str(directory)]

    calm = Path(shutil.copytree(made, work / "undisturbed"))
    began = time.monotonic()
    subprocess.run(command(calm), env=variables, check=True, capture_output=True)
    print(f"{time.monotonic() - began:.0f} s undisturbed", flush=True)
    watch = batch_job.Watch(data, batch_job.output(calm))

    def begin() -> None:
        shutil.copytree(made, data)
        watch.begin()

    return Attack(
        command(data),
        variables,
        data,
        batch_job.output(calm),
        LONGEST_SERVED,
        begin,
        watch.check,
        batch_job.output,
        0.0,
        watch.has_grown,
    )


ATTACKS = {
    "prepare": attack_prepare,
    "prepare-slice": partial(attack_prepare, kind="slice"),
    "prepare-also": partial(attack_prepare, kind="also"),
    "convert-delete-source": attack_convert,
    "convert-slice": partial(attack_convert, kind="slice"),
    "convert-also": partial(attack_convert, kind="also"),
    "convert-prepared": partial(attack_convert, of_prepared=True),
    "spread": attack_spread,
    "repair": attack_repair,
    "session": attack_session,
    "serve": attack_serve,
}


def main() -> None:
    """Kill the command that the options name, and print the counts."""
    parser = argparse.ArgumentParser(description="Kill a command at random and compare its results.")
    parser.add_argument("--command", choices=ATTACKS, default="prepare")
    parser.add_argument("--kills", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--form", choices=FORMS, default=PLAIN)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        faults = RandomFaults(given.seed, share=0.1, longest_stall=1.0)
        with LocalHub({REPO: work / "source"}, faults=faults) as hub:
            counts = run(ATTACKS[given.command](work, given.form, hub), given.kills, given.seed)
    print(f"{dict(counts)}: every result the same")


if __name__ == "__main__":
    main()
