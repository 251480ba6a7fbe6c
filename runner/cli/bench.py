"""The command `bench`: what a few tokens took, beside the least time that they could take and the forecast."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from runner.cli.ram import ram_of
from runner.cli.report import Row, print_rows, rates_row
from runner.cli.terminal import StatusLine
from runner.units import duration, number, percent, rate, size

if TYPE_CHECKING:
    from runner.estimate.bench import Bench

DEFAULT_TOKENS, DEFAULT_PROMPT_TOKENS = 4, 16


def bench(
    directory: Path,
    ram: str | None = None,
    tokens: int = DEFAULT_TOKENS,
    prompt_tokens: int = DEFAULT_PROMPT_TOKENS,
    *,
    also: Sequence[Path] = (),
    as_json: bool = False,
) -> int:
    """Exit status, after the report was printed; `ram` is a size like 12GB."""
    from runner.estimate.bench import bench

    line = StatusLine(sys.stderr)
    try:
        found = bench(directory, ram_of(ram), tokens, prompt_tokens, line.show_part, also)
    finally:
        line.clear()
    print_rows(_rows(directory, found), as_json=as_json)
    return 0


def _rows(directory: Path, found: Bench) -> Iterator[Row]:
    run, forecast = found.run, found.forecast
    token, limit = found.seconds_per_token, found.limit_seconds
    yield Row(
        "measured",
        f"{duration(token)} a token, {percent(limit / token)} of the limit",
        {
            "directory": str(directory),
            "seconds_per_token": token,
            "percent_of_limit": 100 * limit / token,
        },
    )
    yield Row("limit", f"{duration(limit)} a token", {"limit_seconds": limit})
    yield rates_row(found.rates)
    yield Row("each token", ", ".join(map(duration, run.pass_seconds)), asdict(run))
    prompt = f"{duration(run.prompt_seconds)} for {run.prompt_tokens} tokens"
    yield Row("prompt", f"{prompt}, while nothing is in the page cache")
    counted = "not counted by this system"
    if run.bytes_read_per_token is not None:
        counted = f"{size(run.bytes_read_per_token)} by the system's count"
    pace = f"; read at {rate(run.stream_rate)}" if run.stream_rate else ""
    yield Row("streamed", f"{size(run.streamed_bytes_per_pass)} a token, {counted}{pace}")
    waited = f"{duration(run.waiting_seconds)} of {duration(sum(run.pass_seconds))} for the disk"
    yield Row("waited", waited)
    peak = "not known" if run.peak_bytes is None else f"{size(run.peak_bytes)} at most"
    yield Row("memory", f"{peak}, of {size(run.ram)}")
    yield Row(
        "forecast",
        f"{duration(forecast.seconds_per_token)} a token, {_compared(token / forecast.seconds_per_token)}; "
        f"{duration(forecast.prompt_seconds)} for the prompt",
        {
            "predicted_seconds_per_token": forecast.seconds_per_token,
            "predicted_prompt_seconds": forecast.prompt_seconds,
            "predicted_to_measured": forecast.seconds_per_token / token,
        },
    )


def _compared(ratio: float) -> str:
    """A measured time divided by the forecast one, in words."""
    if 0.95 < ratio < 1.05:
        return "as measured"
    return f"measured {number(max(ratio, 1 / ratio))} times {'slower' if ratio > 1 else 'faster'}"
