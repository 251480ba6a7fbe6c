"""The others name a machine that ends, freezes or does not fit, and end; a session then gives the same text."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from runner.cluster.joining import PATIENCE_VARIABLE, join
from runner.errors import BloomdeskError
from runner.generation.session_files import CACHE
from tests.support.commands import run
from tests.support.ranks import LONGEST, Rank, finish, start

pytestmark = pytest.mark.slow
PROMPT = "hello there my friend"
# So many that no test sees the end of it.
ENDLESS = ("--max-new-tokens", "100000", "--ignore-eos")
# Seconds within which the others must notice.
SOON = 30.0


def begun(place: Path, slices: Sequence[Path], *options: object, **environment: str) -> list[Rank]:
    """Ranks that are in the middle of a text."""
    ranks = start(
        place, slices, lambda number, path: ["generate", path, PROMPT, *ENDLESS, *options], **environment
    )
    deadline = time.monotonic() + SOON
    while not ranks[0].output.with_suffix(".out").exists() or not ranks[0].out:
        assert time.monotonic() < deadline and ranks[0].process.is_alive(), [rank.errors for rank in ranks]
        time.sleep(0.01)
    return ranks


def one_sentence(rank: Rank) -> str:
    lines = rank.errors.splitlines()
    assert lines[0].startswith("error: ") and "Traceback" not in rank.errors, rank.errors
    assert len(lines) <= 2, rank.errors
    return lines[0]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_machine_is_named_by_all_others(sliced, tmp_path: Path, victim: int) -> None:
    ranks = begun(tmp_path, sliced((1, 1, 1))[1])
    began = time.monotonic()
    ranks[victim].process.kill()
    assert finish(ranks) == [-9 if number == victim else 1 for number in range(3)]
    assert time.monotonic() - began < SOON
    for number in {0, 1, 2} - {victim}:
        assert f"rank {victim} (" in one_sentence(ranks[number])


def test_a_frozen_machine_is_named(sliced, tmp_path: Path) -> None:
    ranks = begun(tmp_path, sliced((1, 1, 1))[1], BLOOMDESK_PATIENCE="2")
    os.kill(ranks[1].process.pid, signal.SIGSTOP)
    for rank in (ranks[0], ranks[2]):
        rank.process.join(SOON)
        assert rank.status == 1
        assert "rank 1 (" in one_sentence(rank)
    os.kill(ranks[1].process.pid, signal.SIGKILL)
    finish(ranks)


def test_a_full_disk_is_named_by_all(sliced, tmp_path: Path) -> None:
    ranks = start(
        tmp_path,
        sliced((1, 1, 1))[1],
        lambda number, path: ["generate", path, PROMPT, *ENDLESS, "--session", tmp_path / f"session{number}"],
    )
    cache = tmp_path / "session2" / CACHE
    while not cache.exists() or not cache.stat().st_size:
        assert ranks[2].process.is_alive(), [rank.errors for rank in ranks]
        time.sleep(0.01)
    full = cache.stat().st_size
    resource.prlimit(ranks[2].process.pid, resource.RLIMIT_FSIZE, (full, full))
    assert finish(ranks) == [1, 1, 1]
    assert all("takes no larger file" in one_sentence(rank) for rank in ranks)
    assert all("rank 2 (" in one_sentence(rank) for rank in ranks[:2])


def test_nothing_listens_on_other_interfaces(sliced, tmp_path: Path) -> None:
    ranks = begun(tmp_path, sliced((1, 1))[1])
    found = [
        connection.laddr.ip
        for rank in ranks
        for connection in psutil.Process(rank.process.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    ranks[0].process.terminate()
    finish(ranks)
    # torch's own store listens on all of them, and can't be told otherwise.
    assert [address for address in found if address != "127.0.0.1"] in (["::"], ["0.0.0.0"])
    assert len(found) == 3


def test_ctrl_c_at_the_first_machine_ends_all(sliced, tmp_path: Path) -> None:
    ranks = begun(tmp_path, sliced((1, 1))[1])
    os.kill(ranks[0].process.pid, signal.SIGINT)
    status, of_other = finish(ranks)
    # It may come after the last pass, or so late that the other sees only the end of the connection.
    assert status == 130 and of_other in (130, 0, 1), [rank.errors for rank in ranks]
    assert ranks[1].errors in ("interrupted\n", "") or "rank 0 (" in one_sentence(ranks[1])


def test_what_does_not_fit_is_named_before_the_first_pass(sliced, prepared, tmp_path: Path) -> None:
    _, slices = sliced((1, 1))
    _, uneven = sliced((3, 1))

    def refused(directories: Sequence[Path], *different: object) -> str:
        more = [(), different]
        ranks = start(tmp_path, directories, lambda number, path: ["generate", path, PROMPT, *more[number]])
        assert finish(ranks) == [1, 1]
        (sentence,) = {one_sentence(rank) for rank in ranks}
        return sentence

    assert "differ in shares: '(3, 1)' and '(1, 1)'" in refused([slices[0], uneven[1]])
    assert "differ in --max-new-tokens: '5' and '64'" in refused(slices, "--max-new-tokens", "5")
    assert "missing: slice 2" in refused([slices[0], slices[0]])


@pytest.mark.parametrize("early", [0, 1, 2])
def test_who_ends_before_all_have_come_is_named(sliced, tmp_path: Path, early: int) -> None:
    slices = list(sliced((1, 1, 1))[1])
    slices[early] = Path(shutil.copytree(slices[early], tmp_path / "without"))
    (slices[early] / "block_01.safetensors").unlink()
    ranks = start(tmp_path, slices, lambda number, path: ["generate", path, PROMPT])
    assert finish(ranks) == [1, 1, 1]
    for number, rank in enumerate(ranks):
        sentence = one_sentence(rank)
        assert "block_01.safetensors" in sentence
        assert ("has ended before all had come together" in sentence) == (number != early)


def test_torchrun_begins_again_after_a_kill(sliced, tmp_path: Path) -> None:
    whole, slices = sliced((1, 1))
    options = (PROMPT, "--max-new-tokens", "60", "--temperature", "1", "--seed", "5", "--json")
    expected = json.loads(run("generate", whole, *options).stdout)["token_ids"]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--max-restarts", "2"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", where, "-m", "toolkit.cli.app", "generate"]

    def begin(number: int) -> subprocess.Popen[str]:
        command = [*launcher, slices[number], *options, "--session", tmp_path / f"session{number}"]
        with (tmp_path / f"errors{number}").open("w") as errors:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)

    agents = [begin(number) for number in range(2)]
    cache = tmp_path / "session0" / CACHE
    while not cache.exists() or not cache.stat().st_size:
        assert agents[0].poll() is None, (tmp_path / "errors0").read_text()
        time.sleep(0.005)
    (worker,) = psutil.Process(agents[1].pid).children()
    worker.kill()
    (out, _), _ = (agent.communicate(timeout=LONGEST) for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0], (tmp_path / "errors0").read_text()
    assert "exitcode: -9" in (tmp_path / "errors1").read_text()
    assert json.loads(out)["token_ids"] == expected


def test_a_file_of_prompts_that_is_done_ends_all(sliced, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}))
    options = ["--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out.jsonl"]

    def begin() -> list[Rank]:
        slices = sliced((1, 1))[1]
        return start(tmp_path, slices, lambda number, path: ["generate", path, *options])

    assert finish(begin()) == [0, 0]
    results = (tmp_path / "out.jsonl").read_bytes()
    ranks = begin()
    assert finish(ranks) == [0, 0] and "results of all 1 prompts" in ranks[0].errors
    assert (tmp_path / "out.jsonl").read_bytes() == results


@pytest.mark.parametrize("patience", ["2 minutes", "nan", "0", "-1"])
def test_a_patience_that_is_no_number_of_seconds_is_refused(
    monkeypatch: pytest.MonkeyPatch, patience: str
) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, patience)
    with pytest.raises(BloomdeskError, match=f"{PATIENCE_VARIABLE} is '{patience}'"):
        join(None)


def test_a_session_goes_on_after_kills_and_without_one_of_the_machines(sliced, tmp_path: Path) -> None:
    whole, slices = sliced((1, 1, 1))
    options = (PROMPT, "--max-new-tokens", "40", "--temperature", "1", "--seed", "5", "--json")
    expected = json.loads(run("generate", whole, *options).stdout)["token_ids"]

    def begin() -> list[Rank]:
        def command(number: int, path: Path) -> list[object]:
            return ["generate", path, *options, "--session", tmp_path / f"session{number}"]

        return start(tmp_path, slices, command)

    def positions() -> int:
        cache = tmp_path / "session0" / CACHE
        return cache.stat().st_size if cache.exists() else 0

    for victim in (0, 1):
        before, ranks = positions(), begin()
        while positions() <= before and ranks[0].process.is_alive():
            time.sleep(0.002)
        ranks[victim].process.kill()
        finish(ranks)
    # Another machine stands in, which has the slice and no session.
    shutil.rmtree(tmp_path / "session2")
    ranks = begin()
    assert finish(ranks) == [0, 0, 0], [rank.errors for rank in ranks]
    found = json.loads(ranks[0].out)
    assert found["token_ids"] == expected
    assert found["passes"] < 40
