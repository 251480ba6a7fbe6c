"""The command `plan`: what a model takes of this machine's disk, RAM and time, before it is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.cli.bench import DEFAULT_PROMPT_TOKENS
from runner.cli.report import Row, print_rows, rates_row
from runner.format.hyperparameters import Hyperparameters
from runner.format.quantised import FORMS, QUANTISED_FORMS
from runner.generation.options import DEFAULT_NEW_TOKENS
from runner.system.disk import UNKNOWN_SPACE
from runner.units import duration, number, parse_rate, parse_size, rate, size

# Gbit/s, and bytes a second of one.
DEFAULT_NETWORK, GIGABIT = 1.0, 125e6

if TYPE_CHECKING:
    from runner.estimate.forecast import Forecast
    from runner.estimate.plan import Drafting, Form, Plan
    from runner.generation.memory_plan import MemoryPlan


def plan(
    space_to_prepare: Callable[[Hyperparameters], int],
    directory: Path = Path(),
    ram: str | None = None,
    model: str | None = None,
    tokens: int = DEFAULT_NEW_TOKENS,
    prompt_tokens: int = DEFAULT_PROMPT_TOKENS,
    draft: Path | None = None,
    *,
    also: Sequence[Path] = (),
    machines: int = 1,
    network: float = DEFAULT_NETWORK,
    disks: str | None = None,
    as_json: bool = False,
) -> int:
    """Exit status, 1 if the disk is too small, after the report was printed.

    `space_to_prepare` gives the bytes of disk that preparing a model takes; `ram` is a size like 12GB. Beside this
    machine alone it is of several `machines` like it, with a `network` in Gbit/s; then the slice must fit. `disks` are
    rates like 0.4GB/s,0.2GB/s: what this machine would do with disks like that.
    """
    from runner.estimate.plan import plan

    rates = tuple(map(parse_rate, disks.split(","))) if disks else ()
    found = plan(
        directory, parse_size(ram) if ram else None, model, prompt_tokens, tokens, also, draft, machines
    )
    needed = space_to_prepare(found.model) if found.name else found.form.disk_bytes
    fits = found.name is None or found.free_bytes >= needed
    asked = {"prompt_tokens": prompt_tokens, "tokens": tokens}
    rows = list(_rows(directory, asked, found, needed, fits))
    if rates:
        rows += _disks_rows(found, asked, rates)
    if machines > 1:
        rows += _machines_rows(found, asked, machines, network)
        fits = found.name is None or found.free_bytes >= found.form.disk_bytes / machines
    print_rows(rows, as_json=as_json)
    return 0 if fits else 1


def _rows(directory: Path, asked: dict[str, int], found: Plan, needed: int, fits: bool) -> Iterator[Row]:
    form, forecast = found.form, found.form.forecast
    memory = forecast.memory_plan
    yield Row(
        "model",
        f"{found.name or 'the prepared one'}, in {directory}",
        {
            "directory": str(directory),
            "prepared": found.name is None,
            "model": {"name": found.name, **found.model.recorded},
            **asked,
        },
    )
    disk = f"{size(form.disk_bytes)}, which are there"
    if found.manifest is not None and (found.manifest.missing or found.is_alone):
        there, missing = sum(record.size for record in found.manifest.records), found.manifest.missing
        disk = f"{size(there)} of {size(form.disk_bytes)} are there"
        if found.is_alone and found.manifest.slice is not None:
            disk += f", {found.manifest.slice.described}"
        if missing:
            disk += f"; {len(missing)} files are still to be made: {found.manifest.command(directory)}"
    if found.name:
        verdict = "it fits" if fits else f"{size(needed - found.free_bytes)} too little"
        disk = f"{size(form.disk_bytes)}, and {size(needed)} while it is prepared; "
        known = found.free_bytes < UNKNOWN_SPACE
        disk += f"{size(found.free_bytes)} are free: {verdict}" if known else "what is free is not known"
    free = found.free_bytes if found.free_bytes < UNKNOWN_SPACE else None
    yield Row("disk", disk, {"free_bytes": free, "bytes_to_prepare": needed, "fits": fits})
    yield rates_row(found.rates)
    if found.is_busy:
        yield Row("busy", _busy_words(found.load))
    yield Row("RAM", _memory_words(memory), _form_fields(form))
    read = "all weights stay"
    if memory.streamed_bytes:
        read = f"{size(memory.streamed_bytes)} are read from the disk"
    yield Row("each token", f"{duration(forecast.seconds_per_token)}; {read}")
    if found.drafting:
        yield _draft_row(found.drafting)
    prompt = f"{duration(forecast.prompt_seconds)} for {asked['prompt_tokens']} tokens"
    yield Row("prompt", f"{prompt}, while all weights are read from the disk once")
    for name, other in found.others.items():
        words = f"{duration(other.forecast.seconds_per_token)} a token, {size(other.disk_bytes)} of disk; "
        if name in QUANTISED_FORMS:
            words += f"weights rounded to fewer bits: prepare it with --form {name}"
        else:
            words += f"here the {found.advice} form is faster"
            words += f": prepare it with --form {name}" if found.advice != form.form else ""
        yield Row(name, words)
    others = {name: found.others.get(name) for name in FORMS[1:]}
    fields = {name: other and _form_fields(other) for name, other in others.items()}
    yield Row(fields={**fields, "advice": found.advice})
    yield from _table(found)


def _draft_row(found: Drafting) -> Row:
    """What a pass takes beside a draft; how many tokens it gives is known only when it runs."""
    which = ", another form of the same model" if found.is_form else ""
    memory, seconds = found.forecast.memory_plan, found.forecast.seconds_per_token
    words = f"{size(found.nbytes)} of RAM{which}; then a pass takes {duration(seconds)}, "
    words += f"reads {size(memory.streamed_bytes)} and gives several tokens, {duration(found.seconds)} each to draft"
    fields = {"is_form": found.is_form, "bytes": found.nbytes, "seconds": found.seconds}
    return Row("draft", words, {"draft": {**fields, "forecast": _forecast_fields(found.forecast)}})


def _disks_rows(found: Plan, asked: dict[str, int], disks: tuple[float, ...]) -> Iterator[Row]:
    """What this machine would make of each form with other disks, over which the rows are spread by their rates."""
    from runner.estimate.forecast import forecast
    from runner.estimate.rates import shares_of

    rates, shares, request = (
        found.rates.with_disks(disks),
        shares_of(disks),
        found.form.forecast.memory_plan.request,
    )
    words = (
        f"{' and '.join(map(rate, disks))}, {rate(rates.disk)} together" if len(disks) > 1 else rate(disks[0])
    )
    yield Row()
    yield Row(f"{len(disks)} disks" if len(disks) > 1 else "such a disk", words)
    fields = {}
    for form in (found.form, *found.others.values()):
        lengths = asked["prompt_tokens"], asked["tokens"]
        each = forecast(
            found.model, request.ram, request.process, rates, *lengths, form.forecast.stored, shares
        )
        fields[form.form] = _forecast_fields(each)
        words = (
            f"{duration(each.seconds_per_token)} a token, {duration(each.prompt_seconds)} for the prompt; "
        )
        parts = " and ".join(size(form.disk_bytes * share / sum(shares)) for share in shares)
        yield Row(f"  {form.form}", f"{words}{parts} of disk")
    about = {"rates": disks, "shares": shares, "bytes_per_second": rates.disk}
    yield Row(fields={"disks": {**about, **fields}})


def _machines_rows(found: Plan, asked: dict[str, int], machines: int, network: float) -> Iterator[Row]:
    """What several machines like this one would make of each form, on paper."""
    from runner.estimate.machines import Network, forecast_machines

    wire, request = Network(machines, network * GIGABIT), found.form.forecast.memory_plan.request
    gathers = wire.gather_seconds(found.model, 1)
    words = f"{network:g} Gbit/s: {duration(gathers)} a token in gathers, "
    yield Row(f"{machines} machines", f"{words}{size(wire.bytes_sent(found.model, 1))} sent by each")
    fields = {}
    for form in (found.form, *found.others.values()):
        stored = form.forecast.stored
        lengths = asked["prompt_tokens"], asked["tokens"]
        each = forecast_machines(
            found.model, request.ram, request.process, found.rates, *lengths, wire, stored
        )
        fields[form.form] = _forecast_fields(each)
        read = size(each.memory_plan.streamed_bytes) if each.memory_plan.streamed_bytes else "nothing"
        words = (
            f"{duration(each.seconds_per_token)} a token, {duration(each.prompt_seconds)} for the prompt; "
        )
        words += f"{size(form.disk_bytes // machines)} of disk on each, which reads {read} a token"
        yield Row(f"  {form.form}", words)
    about = {"count": machines, "network_bytes_per_second": wire.rate, "gather_seconds": gathers}
    yield Row(fields={"machines": {**about, **fields}})


def _busy_words(load: float) -> str:
    programs = f"a load of {number(load)} for each core: other programs are at work"
    return f"{programs}, so rates and times can't be trusted; run it again when they are done"


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

    yield row("with RAM of", "stays", "streamed", "a token", "prompt", *found.others)
    for ram, forecast in found.form.others.items():
        cells = ["too little", "", "", ""]
        if forecast:
            cells = [size(forecast.memory_plan.resident_bytes), size(forecast.memory_plan.streamed_bytes)]
            cells += [duration(forecast.seconds_per_token), duration(forecast.prompt_seconds)]
        for other in found.others.values():
            coded = other.with_ram(ram)
            cells.append(duration(coded.seconds_per_token) if coded else "")
        yield row(size(ram), *cells)


def _form_fields(form: Form) -> dict[str, Any]:
    return {
        "coding": form.form,
        "disk_bytes": form.disk_bytes,
        "forecast": _forecast_fields(form.forecast),
        "others": [
            _forecast_fields(forecast) if forecast else {"ram": ram, "too_little": True}
            for ram, forecast in form.others.items()
        ],
    }


def _forecast_fields(found: Forecast) -> dict[str, Any]:
    """A forecast for --json, in bytes and seconds."""
    plan, request = found.memory_plan, found.memory_plan.request
    return {
        "ram": request.ram,
        "process": request.process,
        "cache": request.cache,
        "activations": request.activations,
        "read_ahead": plan.read_ahead,
        "resident_bytes": plan.resident_bytes,
        "streamed_bytes_per_pass": plan.streamed_bytes,
        "limit_seconds": found.limit_seconds,
        "seconds_per_token": found.seconds_per_token,
        "prompt_seconds": found.prompt_seconds,
    }
