"""The command `plan`: what a model takes of this machine's disk, RAM and time, before it is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.cli.report import Row, forecast_fields, print_rows, rates_row
from runner.format.hyperparameters import Hyperparameters
from runner.generation.options import DEFAULT_NEW_TOKENS
from runner.units import duration, parse_size, size

if TYPE_CHECKING:
    from runner.estimate.forecast import Forecast
    from runner.estimate.plan import Form, Plan
    from runner.generation.memory_plan import MemoryPlan


@dataclass(frozen=True)
class PlanOptions:
    """What `plan` is asked for; `ram` is a size like 12GB, `model` a name of the family."""

    directory: Path = Path()
    ram: str | None = None
    model: str | None = None
    tokens: int = DEFAULT_NEW_TOKENS
    prompt_tokens: int = 16
    as_json: bool = False


def plan(options: PlanOptions, space_to_prepare: Callable[[Hyperparameters], int]) -> int:
    """Exit status, 1 if the disk is too small, after the report was printed.

    `space_to_prepare` gives the bytes of disk that preparing a model takes.
    """
    from runner.estimate.plan import plan

    ram = parse_size(options.ram) if options.ram else None
    found = plan(options.directory, ram, options.model, options.prompt_tokens, options.tokens)
    needed = space_to_prepare(found.model) if found.name else found.form.disk_bytes
    fits = found.name is None or found.free_bytes >= needed
    print_rows(_rows(options, found, needed, fits), as_json=options.as_json)
    return 0 if fits else 1


def _rows(options: PlanOptions, found: Plan, needed: int, fits: bool) -> Iterator[Row]:
    form, forecast = found.form, found.form.forecast
    memory = forecast.memory_plan
    yield Row(
        "model",
        f"{found.name or 'the prepared one'}, in {options.directory}",
        {
            "directory": str(options.directory),
            "prepared": found.name is None,
            "model": {"name": found.name, **asdict(found.model)},
            "prompt_tokens": options.prompt_tokens,
            "tokens": options.tokens,
        },
    )
    disk = f"{size(form.disk_bytes)}, which are there"
    if found.name:
        verdict = "it fits" if fits else f"{size(needed - found.free_bytes)} too little"
        disk = f"{size(form.disk_bytes)}, and {size(needed)} while it is prepared; "
        disk += f"{size(found.free_bytes)} are free: {verdict}"
    yield Row("disk", disk, {"free_bytes": found.free_bytes, "bytes_to_prepare": needed, "fits": fits})
    yield rates_row(found.rates)
    yield Row("RAM", _memory_words(memory), _form_fields(form))
    read = "all weights stay"
    if memory.streamed_bytes:
        read = f"{size(memory.streamed_bytes)} are read from the disk"
    yield Row("each token", f"{duration(forecast.seconds_per_token)}; {read}")
    prompt = f"{duration(forecast.prompt_seconds)} for {options.prompt_tokens} tokens"
    yield Row("prompt", f"{prompt}, while all weights are read from the disk once")
    if other := found.lossless:
        words = f"{duration(other.forecast.seconds_per_token)} a token, {size(other.disk_bytes)} of disk; "
        words += f"here the {found.advice} form is faster"
        words += ": prepare it with --lossless" if found.advice != form.form else ""
        yield Row("lossless", words)
    yield Row(fields={"lossless": other and _form_fields(other), "advice": found.advice})
    yield from _table(found)


def _memory_words(plan: MemoryPlan) -> str:
    parts = {
        "program": plan.request.process,
        "KV cache": plan.request.cache,
        "a pass": plan.request.activations,
        "reading ahead": plan.read_ahead,
        "weights that stay": plan.resident_bytes,
    }
    used = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
    return f"{size(plan.request.ram)}: {used}"


def _table(found: Plan) -> Iterator[Row]:
    """What other amounts of RAM would give."""

    def row(label: str, *cells: str) -> Row:
        return Row(label, "".join(f"{cell:>12}" for cell in cells))

    yield row("with RAM of", "stays", "streamed", "a token", "prompt", *["lossless"] * bool(found.lossless))
    for ram, forecast in found.form.others.items():
        cells = ["too little", "", "", ""]
        if forecast:
            cells = [size(forecast.memory_plan.resident_bytes), size(forecast.memory_plan.streamed_bytes)]
            cells += [duration(forecast.seconds_per_token), duration(forecast.prompt_seconds)]
        if found.lossless:
            coded = found.lossless.with_ram(ram)
            cells.append(duration(coded.seconds_per_token) if coded else "")
        yield row(size(ram), *cells)


def _form_fields(form: Form) -> dict[str, Any]:
    def fields(ram: int, forecast: Forecast | None) -> dict[str, Any]:
        return forecast_fields(forecast) if forecast else {"ram": ram, "too_little": True}

    return {
        "coding": form.form,
        "disk_bytes": form.disk_bytes,
        "forecast": forecast_fields(form.forecast),
        "others": [fields(ram, forecast) for ram, forecast in form.others.items()],
    }
