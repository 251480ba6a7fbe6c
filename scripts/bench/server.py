"""Measure the server: clients beside the same prompts as a file, and the first byte while a long pass runs.

    python -m scripts.bench.server --work WORK [--clients 16,64] [--tokens 32] [--rounds 5] [--model DIR] [--json FILE]

`generate_all` continues prompts as those of a file, and as many clients ask a server for the same texts at the same
time. Both have the same RAM, have read their weights, and take turns; texts must be equal. For the first byte, 100
clients ask a server whose pass lasts, since each of its parts waits.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx2

import runner
from runner.generation.model import Model
from runner.generation.options import Sampling
from runner.units import parse_size
from scripts.bench.harness import Column, interleaved, save, table
from scripts.bench.serving import miniature, running_server

COLUMNS = (
    Column("clients", "clients", "d"),
    Column("tokens/s as a file", "file", ".1f"),
    Column("tokens/s of clients", "server", ".1f"),
    Column("share", "share", ".3f"),
)
WAITING_CLIENTS = 100
PROMPTS = [
    json.loads(line)["prompt"] for line in (Path(__file__).parents[2] / "miniature/unseen.jsonl").open()
]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Measure the server.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--clients", default="16,64", metavar="N,N")
    parser.add_argument("--tokens", type=int, default=32, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--ram", default="2GB", metavar="SIZE")
    parser.add_argument("--slow-pass", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    directory = options.model or miniature(options.work)
    rows = [_compared(directory, int(count), options) for count in options.clients.split(",")]
    print(table(COLUMNS, rows))
    first = _first_bytes(directory, options) if options.slow_pass else {}
    if first:
        print(
            f"first byte of {WAITING_CLIENTS} clients while a pass of {first['pass']:.1f} s runs: "
            f"{first['median']:.3f} s in the median, {first['most']:.3f} s at most"
        )
    save(options.json, "server", {"rows": rows, "first_byte": first})


def _compared(directory: Path, count: int, options: argparse.Namespace) -> dict[str, Any]:
    model = runner.load(directory, parse_size(options.ram))
    prompts = (PROMPTS * (1 + count // len(PROMPTS)))[:count]
    with running_server(directory, options.work, "--ram", options.ram) as (url, _):
        texts: dict[str, list[str]] = {}

        def as_file() -> float:
            rate, texts["file"] = _as_file(model, prompts, options.tokens)
            return rate

        def of_clients() -> float:
            rate, texts["server"] = asyncio.run(_of_clients(url, directory.name, prompts, options.tokens))
            return rate

        found = interleaved({"file": as_file, "server": of_clients}, options.rounds, warm_up=1)
    if texts["file"] != texts["server"]:
        raise SystemExit("the texts of clients are not those of the file")
    shares = [server / file for file, server in zip(found["file"], found["server"], strict=True)]
    rates = {name: median(values) for name, values in found.items()}
    return {"clients": count, **rates, "share": median(shares), "rounds": found}


def _as_file(model: Model, prompts: list[str], tokens: int) -> tuple[float, list[str]]:
    """Tokens a second of prompts that share passes from the start, and their texts."""
    began = time.perf_counter()
    sampling = Sampling(ignore_eos=True)
    found = list(model.generate_all(prompts, max_new_tokens=tokens, sampling=sampling))
    seconds = time.perf_counter() - began
    texts = {each.request.number: model.text(each) for each in found}
    return sum(len(each.ids) for each in found) / seconds, [texts[number] for number in sorted(texts)]


async def _of_clients(url: str, model: str, prompts: list[str], tokens: int) -> tuple[float, list[str]]:
    """Tokens a second of as many clients as there are prompts, and their texts."""
    async with httpx2.AsyncClient(
        base_url=url, timeout=None, limits=httpx2.Limits(max_connections=None)
    ) as client:

        async def ask(prompt: str) -> dict[str, Any]:
            body = {
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "cache": False,
            }
            return (await client.post("/v1/completions", json={"model": model, **body})).json()

        began = time.perf_counter()
        found = await asyncio.gather(*map(ask, prompts))
        seconds = time.perf_counter() - began
    new = sum(each["usage"]["completion_tokens"] for each in found)
    return new / seconds, [each["choices"][0]["text"] for each in found]


def _first_bytes(directory: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds to the first byte of a body, while a slow pass runs, and those of the pass."""
    from scripts.bench import slow_server

    command = [sys.executable, "-m", slow_server.__name__, str(options.slow_pass)]
    with running_server(directory, options.work, command=command) as (url, _):
        return asyncio.run(_wait(url, directory.name))


async def _wait(url: str, model: str) -> dict[str, float]:
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=None, limits=limits) as client:

        async def first_byte(number: int) -> float:
            body = {"model": model, "prompt": f"Client {number}", "max_tokens": 1, "stream": bool(number % 2)}
            began = time.perf_counter()
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for _ in response.aiter_raw():
                    return time.perf_counter() - began
            raise RuntimeError("no byte came")

        began = time.perf_counter()
        busy = asyncio.ensure_future(
            client.post("/v1/completions", json={"model": model, "prompt": "Busy", "max_tokens": 1})
        )
        await asyncio.sleep(1)
        found = await asyncio.gather(*map(first_byte, range(WAITING_CLIENTS)))
        await busy
        return {"pass": time.perf_counter() - began, "median": median(found), "most": max(found)}


if __name__ == "__main__":
    main()
