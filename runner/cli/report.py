"""What the commands say of a generation, a bench and a plan, in lines of text; `cli` prints them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from runner.generation.memory_plan import shown_size

if TYPE_CHECKING:
    from runner.estimate.bench import Bench
    from runner.estimate.forecast import Forecast
    from runner.estimate.plan import Plan
    from runner.estimate.rates import Rates
    from runner.generation.batch import Batch
    from runner.generation.decode import Generation


def chosen(batch: Batch) -> str:
    """What a generation makes of the RAM and its options."""
    capacity = batch.capacity
    shares = capacity.memory_plan
    kept = "all weights stay"
    if shares.streamed_bytes:
        kept = f"{shown_size(shares.resident_bytes)} of weights stay, "
        kept += f"{shown_size(shares.streamed_bytes)} are read in each pass"
    return (
        f"RAM {shown_size(shares.total)}: {kept}; batch {capacity.batch}; speculation {batch.speculation}; "
        "set them with --ram, --batch, --speculate"
    )


def summary(generation: Generation, seconds: float) -> str:
    """What one prompt's tokens took, and why there are no more."""
    tokens = len(generation.ids)
    pace = f"{seconds / tokens:.3g} s a token, " if tokens else ""
    reason = {"eos": "the model ended its text", "length": "the limit of new tokens was reached"}
    end = reason.get(generation.stop_reason or "", "interrupted")
    return f"{tokens} tokens, {pace}{work(generation.batch)}; {end}"


def work(batch: Batch) -> str:
    """Passes, what they read, and what speculation came to."""
    traffic = batch.model.weights.stream.traffic
    text = f"{batch.bytes_read / 1e9:,.1f} GB of weights read in {batch.passes} passes"
    if traffic.reading_seconds:
        text += f" at {traffic.bytes_fetched / traffic.reading_seconds / 1e9:,.2f} GB/s"
    if batch.proposed:
        text += f", {batch.tokens / batch.passes:.2f} tokens a pass, "
        text += f"{batch.accepted} of {batch.proposed} proposed tokens right"
    if batch.drafting_seconds:
        text += f", {batch.drafting_seconds:.3g} s of drafting"
    return text


def bench_lines(found: Bench) -> Iterator[str]:
    """What a few tokens took, beside the least that they could and what was forecast."""
    run, predicted = found.run, found.forecast
    each = ", ".join(_shown_seconds(seconds) for seconds in run.pass_seconds)
    counted = "not counted by this system"
    if run.bytes_read_per_token is not None:
        counted = f"{shown_size(round(run.bytes_read_per_token))} by the system's count"
    saw = f"; it came at {_shown_rate(run.stream_rate)}" if run.stream_rate else ""
    waited = _shown_seconds(run.waiting_seconds)
    peak = f"{shown_size(run.peak_bytes)} at most" if run.peak_bytes is not None else "not known"
    rows = {
        "measured": f"{_shown_seconds(found.seconds_per_token)} a token, {found.percent_of_limit:.0f}% of the limit",
        "limit": f"{_shown_seconds(found.limit_seconds)} a token",
        "rates": _shown_rates(found.rates),
        "each token": each,
        "prompt": f"{_shown_seconds(run.prompt_seconds)} for {run.prompt_tokens} tokens, everything cold",
        "streamed": f"{shown_size(round(run.streamed_bytes_per_pass))} a token, {counted}{saw}",
        "waited": f"{waited} of {_shown_seconds(sum(run.pass_seconds))} for the disk",
        "memory": f"{peak}, of {shown_size(run.ram)}",
        "forecast": f"{_shown_seconds(predicted.seconds_per_token)} a token, "
        f"{predicted.seconds_per_token / found.seconds_per_token:.2f} of what was measured; "
        f"{_shown_seconds(predicted.prompt_seconds)} for the prompt",
    }
    return _rows(rows)


def plan_lines(found: Plan, room: int, fits: bool) -> Iterator[str]:
    """What a model takes of the machine; `room` bytes of disk to prepare it, and whether they are free."""
    form, expected = found.form, found.form.forecast
    disk = f"{shown_size(form.disk_bytes)} there"
    if found.name:
        verdict = "it fits" if fits else f"{shown_size(room - found.free_bytes)} too little"
        disk = f"{shown_size(form.disk_bytes)}, and {shown_size(room)} while it is prepared"
        disk += f"; {shown_size(found.free_bytes)} are free: {verdict}"
    shares = expected.shares
    parts = {
        "program": shares.process,
        "KV cache": shares.cache,
        "a pass": shares.activations,
        "reading ahead": shares.read_ahead,
        "weights that stay": shares.resident_bytes,
    }
    used = ", ".join(f"{name} {shown_size(count)}" for name, count in parts.items())
    rows = {
        "model": f"{found.name or 'the one that is there'}, in {found.directory}",
        "disk": disk,
        "rates": _shown_rates(found.rates),
        "RAM": f"{shown_size(shares.total)}: {used}",
        "each token": f"{_shown_seconds(expected.seconds_per_token)}, "
        f"with {shown_size(shares.streamed_bytes)} from the disk",
        "prompt": f"{_shown_seconds(expected.prompt_seconds)} for {found.prompt_tokens} tokens, "
        "with all weights from the disk",
    }
    if found.lossless:
        other = found.lossless
        rows["lossless"] = (
            f"{_shown_seconds(other.forecast.seconds_per_token)} a token, {shown_size(other.disk_bytes)} of disk; "
            f"here the {found.advice} form is the faster one"
            + (": prepare it with --lossless" if found.advice != form.form else "")
        )
    yield from _rows(rows)
    columns = [
        "with RAM of",
        "stays",
        "streamed",
        "a token",
        "prompt",
        *(["lossless"] if found.lossless else []),
    ]
    yield ""
    yield "".join(f"{column:>12}" for column in columns)
    for ram, forecast in form.others.items():
        line = f"{shown_size(ram):>12}" + _forecast_cells(forecast)
        if found.lossless:
            line += _token_cell(found.lossless.with_ram(ram))
        yield line


def _forecast_cells(found: Forecast | None) -> str:
    if found is None:
        return f"{'too little':>12}{'':>36}"
    sizes = (found.shares.resident_bytes, found.shares.streamed_bytes)
    cells = "".join(f"{shown_size(size):>12}" for size in sizes)
    return cells + _token_cell(found) + f"{_shown_seconds(found.prompt_seconds):>12}"


def _token_cell(found: Forecast | None) -> str:
    return f"{_shown_seconds(found.seconds_per_token) if found else '':>12}"


def _rows(rows: Mapping[str, str]) -> Iterator[str]:
    for name, value in rows.items():
        yield f"{name:>12}  {value}"


def _shown_seconds(seconds: float) -> str:
    """ "0.123 s", "1.23 s", "12.3 s", "123 s"."""
    digits = max(0, 3 - len(str(int(seconds)))) if seconds >= 1 else 3
    return f"{seconds:,.{digits}f} s"


def _shown_rate(rate: float) -> str:
    return f"{rate / 1e9:,.2f} GB/s"


def _shown_rates(rates: Rates) -> str:
    return (
        f"disk {_shown_rate(rates.disk)}, memory {_shown_rate(rates.memory)}, "
        f"lossless {_shown_rate(rates.decoded)}, {rates.compute / 1e9:,.1f} billion multiply-adds/s"
    )
