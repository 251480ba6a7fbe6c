"""Commands on several machines: here each is a process on loopback, forked from one that has torch imported."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from runner.cli.machines import LOG_LEVEL_VARIABLE
from runner.cluster import gather
from runner.kernel.library import ENVIRONMENT, usable_variants
from tests.support.commands import run

# Seconds that a command may take, on a machine that does other things as well.
LONGEST = 90
# As the commands set it before they import torch.
os.environ.setdefault(LOG_LEVEL_VARIABLE, "ERROR")
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["tests.support.ranks", "toolkit.cli.app", "runner.cluster.lead", "runner.cluster.follow"]
)


@dataclass
class Rank:
    """A process of the command, its output, and once it has ended its exit status."""

    process: multiprocessing.process.BaseProcess
    output: Path

    @property
    def status(self) -> int | None:
        return self.process.exitcode

    @property
    def out(self) -> str:
        return self.output.with_suffix(".out").read_text()

    @property
    def errors(self) -> str:
        return self.output.with_suffix(".err").read_text()


def start(
    place: Path,
    directories: Sequence[Path],
    command: Callable[[int, Path], Sequence[object]],
    *,
    of_last: Mapping[str, str] = MappingProxyType({}),
    **environment: str,
) -> list[Rank]:
    """A process for each directory, which runs what `command` gives for its number and its directory.

    The last one has the variables `of_last`, too.
    """
    place.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ranks = []
    for number, directory in enumerate(directories):
        variables = {
            "RANK": str(number),
            "WORLD_SIZE": str(len(directories)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **environment,
            **(of_last if number == len(directories) - 1 else {}),
        }
        output = place / f"rank{number}"
        arguments = [str(each) for each in command(number, directory)]
        process = _forks.Process(target=_run, args=(variables, arguments, output))
        process.start()
        ranks.append(Rank(process, output))
    return ranks


def finish(ranks: Sequence[Rank]) -> list[int | None]:
    """The exit statuses, once all have ended."""
    for rank in ranks:
        rank.process.join(LONGEST)
        if rank.process.is_alive():
            rank.process.kill()
            rank.process.join()
    return [rank.status for rank in ranks]


def _tokens(text: str) -> list[dict[str, object]]:
    """What decides a text, of each line of results; how long drafts take decides which one is done first."""
    names = ("index", "token_ids", "text", "logprobs", "seed", "tokens", "token_logprobs")
    lines = sorted(map(json.loads, text.splitlines()), key=lambda line: line.get("index", 0))
    return [{name: line[name] for name in names if name in line} for line in lines]


def assert_as_one(whole: Path, slices: Sequence[Path], place: Path, *arguments: str | Path) -> None:
    """The text is that of one machine; the processor of the last one has the fewest means."""
    command, *rest = arguments
    alone = run(command, whole, *rest)
    assert alone.returncode == 0, alone.stderr
    last = {ENVIRONMENT: usable_variants()[0]}
    ranks = start(place, slices, lambda number, directory: [command, directory, *rest], of_last=last)
    assert finish(ranks) == [0] * len(slices), [rank.errors for rank in ranks]
    assert _tokens(ranks[0].out) == _tokens(alone.stdout) != []
    assert [rank.out for rank in ranks[1:]] == [""] * (len(slices) - 1)
    assert not any(rank.errors for rank in ranks[1:])


def _run(variables: dict[str, str], arguments: list[str], output: Path) -> None:
    from toolkit.cli import app

    os.environ.update(variables)
    # Of these small models a prompt's rows go in several pieces then, and a token's in one.
    gather.PIECE_BYTES = 512
    with output.with_suffix(".out").open("w") as out, output.with_suffix(".err").open("w") as errors:
        # What torch writes itself as well.
        os.dup2(errors.fileno(), 2)
        with redirect_stdout(out), redirect_stderr(errors):
            status = app.run(arguments)
            out.flush()
            errors.flush()
    os._exit(status)
