"""A server under clients that hang up, and under bodies of any kind, for as long as it takes.

    python -m scripts.torture.server --work WORK [--requests 10000] [--bodies 100000] [--schemathesis] [--model DIR]

First come requests, one in ten of which hangs up at a random time: afterwards no text may be left in a pass or
waiting, and the RAM over the last tenth must be that over the first after a warm-up. Then come bodies of Hypothesis's:
no answer may be a 500, take longer than a minute, or have another shape than it should, and the RAM may grow by no
more than what a memory plan keeps for clients. `--schemathesis` adds what
schemathesis makes of the server's own description. Exit status 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import httpx2
import psutil
from hypothesis import HealthCheck, Phase, given, settings

from runner.server.engine import CLIENTS_NBYTES
from scripts.bench.serving import running_server
from scripts.torture.bodies import ASKING, BATCHES, FILES, GENERATING, KNOWN_FILE, Sent, bodies, fault

AT_A_TIME = 32
HANGS_UP = 0.1
SECONDS = 60.0
# How much more RAM the last tenth may take than the second.
GROWTH = 1.05
# Of the bodies, how many go to which path. What they leave behind for an hour, or for good, counts as RAM of clients.
SHARES = dict(zip((*GENERATING, *ASKING, FILES, BATCHES), (0.5, 0.25, 0.05, 0.05, 0.1, 0.05), strict=True))
# Bodies between two looks at the RAM.
LOOK = 20
LINE = {"custom_id": "a", "method": "POST", "url": GENERATING[0], "body": {"prompt": "a", "max_tokens": 1}}
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(description="Torture a server.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=10_000, metavar="N")
    parser.add_argument("--bodies", type=int, default=100_000, metavar="N")
    parser.add_argument("--schemathesis", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    template = options.work / "chat.jinja"
    template.write_text(TEMPLATE)
    more = ["--model-name", "bloom", "--chat-template", str(template), "--ram", "2GB"]
    more += ["--data", str(options.work / "data")]
    with running_server(options.model, options.work, *more) as (url, process):
        faults = []
        if options.requests:
            faults += asyncio.run(_hang_up(url, process, options.requests, random.Random(options.seed)))
        if options.bodies:
            faults += _send_bodies(url, process, options.bodies)
        if options.schemathesis:
            faults += _by_description(url)
        faults += _left_over(url)
    for line in faults:
        print(f"FAULT {line}")
    return 1 if faults else 0


async def _hang_up(url: str, process: psutil.Process, count: int, chance: random.Random) -> list[str]:
    """Faults of `count` requests, one in ten of which hangs up."""
    sizes, gone, began = [], 0, time.perf_counter()
    limits = httpx2.Limits(max_connections=AT_A_TIME)
    async with httpx2.AsyncClient(base_url=url, limits=limits, timeout=SECONDS) as client:
        places = asyncio.Semaphore(AT_A_TIME)

        async def ask(number: int, leaves_after: float | None, stream: bool) -> str | None:
            body = {"prompt": f"Text number {number}", "max_tokens": 4, "temperature": 1, "stream": stream}
            async with places:
                try:
                    async with asyncio.timeout(leaves_after):
                        found = await client.post("/v1/completions", json=body)
                except TimeoutError:
                    return None
                except httpx2.HTTPError as error:
                    return f"request {number}: {error!r}"
                finally:
                    if not number % 10:
                        sizes.append(process.memory_info().rss)
                why = fault(found.status_code, found.content, found.headers["content-type"])
                return f"request {number}: {why}" if why else None

        tasks = []
        for number in range(count):
            leaves = chance.uniform(0, 0.5) if chance.random() < HANGS_UP else None
            gone += leaves is not None
            tasks.append(asyncio.ensure_future(ask(number, leaves, chance.random() < 0.5)))
        faults = [why for why in await asyncio.gather(*tasks) if why]
    seconds, tenth = time.perf_counter() - began, max(1, len(sizes) // 10)
    # While it warms up, weights come to stay.
    first, last = median(sizes[tenth : 2 * tenth]), median(sizes[-tenth:])
    print(
        f"{count} requests, {gone} of which hung up, in {seconds:.0f} s; RAM {first / 1e6:.0f} MB at first, "
        f"{last / 1e6:.0f} MB at last; {len(faults)} faults"
    )
    return faults + [f"the RAM grew from {first} to {last} bytes"] * (last > GROWTH * first)


def _send_bodies(url: str, process: psutil.Process, count: int) -> list[str]:
    """The first fault that Hypothesis finds on each path, with its body."""
    faults, began, sizes, statuses = [], time.perf_counter(), [], Counter()
    with httpx2.Client(base_url=url, timeout=SECONDS) as client:
        known = client.post(
            FILES, data={"purpose": "batch"}, files={"file": ("in", json.dumps(LINE))}
        ).json()["id"]

        def send(path: str, sent: Sent) -> None:
            data = sent.data.replace(KNOWN_FILE.encode(), known.encode())
            found = client.post(path, content=data, headers={"Content-Type": sent.kind})
            statuses[path, found.status_code] += 1
            if not statuses.total() % LOOK:
                sizes.append(process.memory_info().rss)
            why = fault(found.status_code, found.content, found.headers["content-type"])
            assert why is None, f"{path} {sent}: {why}"

        for path, share in SHARES.items():
            try:
                _sender(send, path, max(1, int(share * count)))()
            except Exception as error:
                faults.append(f"{type(error).__name__}: {error}")
    tenth = max(1, len(sizes) // 10)
    # While it warms up, weights come to stay.
    first, last = median(sizes[tenth : 2 * tenth] or sizes), median(sizes[-tenth:])
    print(
        f"{statuses.total()} bodies in {time.perf_counter() - began:.0f} s; RAM {first / 1e6:.0f} MB at first, "
        f"{last / 1e6:.0f} MB at last; {len(faults)} faults"
    )
    for (path, status), number in sorted(statuses.items()):
        print(f"  {path} {status}: {number}")
    return faults + [f"the RAM grew from {first} to {last} bytes"] * (last > first + CLIENTS_NBYTES)


def _sender(send_one: Callable[[str, Sent], None], path: str, count: int) -> Callable[[], None]:
    """Sends `count` bodies, and raises AssertionError for the smallest that is answered wrongly."""

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(bodies(path))
    def send(sent: Sent) -> None:
        send_one(path, sent)

    return send


def _by_description(url: str) -> list[str]:
    """What schemathesis finds."""
    command = shutil.which("schemathesis")
    if command is None:
        return ["schemathesis is not installed: pip install 'bloomdesk[fuzzing]'"]
    run = subprocess.run(
        [
            command,
            "run",
            f"{url}/openapi.json",
            "--checks",
            "not_a_server_error",
            "--phases",
            "examples,fuzzing",
        ],
        capture_output=True,
        text=True,
    )
    print(run.stdout[-600:])
    return ["schemathesis found a fault"] if run.returncode else []


def _left_over(url: str) -> list[str]:
    """What is still in a pass, or waits for one, a while after everybody has gone."""
    deadline = time.monotonic() + SECONDS
    while True:
        text = httpx2.get(f"{url}/metrics").text
        lines = [line.split() for line in text.splitlines() if line.startswith("bloomdesk_")]
        left = {
            line[0]: float(line[1]) for line in lines if line[0].endswith(("active_texts", "waiting_texts"))
        }
        if not any(left.values()):
            return []
        if time.monotonic() > deadline:
            return [f"left over: {json.dumps(left)}"]
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
