"""What a model will take of this machine, before it is downloaded: the rates measured, the rest forecast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from runner.errors import BloomdeskError
from runner.estimate import family, rates
from runner.estimate.forecast import (
    BLOOMS_TOKENIZER,
    LOSSLESS_SHARE,
    PLAIN_STORED,
    SECONDS_BY_BLOCK,
    Forecast,
    Stored,
    chunk_bytes,
    disk_bytes,
    forecast,
    limit,
    process_bytes,
    stored_as,
    weight_bytes,
)
from runner.estimate.rates import Rates
from runner.format.coded import CODED_DTYPE, LOSSLESS, PLAIN
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import MANIFEST, MANIFEST_BACKUP
from runner.format.manifest import Manifest
from runner.format.quantised import QUANTISED_FORMS
from runner.format.slice_set import SliceSet, find_all_slices, find_slices, require_all_slices
from runner.format.slices import even
from runner.generation.memory_plan import default_total
from runner.generation.speculation.draft_model import bytes_beside_weights
from runner.system import memory
from runner.system.disk import existing_directory, free_bytes
from runner.weights.checkpoint import TORCH_DTYPES

DEFAULT_MODEL = "bigscience/bloom"
# Processes that run or wait for the disk, for each core, above which the rates are not the machine's.
BUSY = 0.5
OTHER_RAM = tuple(size * 10**9 for size in (1, 2, 4, 8, 16, 32))


@dataclass(frozen=True)
class Form:
    """A model's weights in one form.

    `others` has forecasts for other amounts of RAM, up to the first in which all weights stay; None for too little.
    """

    form: str
    disk_bytes: int
    forecast: Forecast
    others: Mapping[int, Forecast | None]

    def with_ram(self, ram: int) -> Forecast | None:
        """The forecast for one of `OTHER_RAM`; beyond the last of `others`, more RAM changes nothing."""
        return self.others.get(ram, self.others[max(self.others)])


@dataclass(frozen=True)
class Drafting:
    """What a draft model, or another form of the model, takes beside it: bytes of RAM, and seconds of a draft token.

    `forecast` is that of the model in the RAM that is left.
    """

    is_form: bool
    nbytes: int
    seconds: float
    forecast: Forecast

    @classmethod
    def of(
        cls,
        draft: SliceSet,
        held: SliceSet,
        rates: Rates,
        capacity: int,
        expected: Callable[[int], Forecast],
    ) -> Drafting:
        """`expected` forecasts passes of `held` beside a draft of some bytes."""
        model, stored = draft.first.model, stored_as([*draft.manifests.values()])
        is_form = draft.source_fingerprint == held.source_fingerprint != ""
        nbytes = sum(chunk_bytes(model, stored))
        nbytes += bytes_beside_weights(model, 1, capacity, is_form=is_form)
        seconds = limit(weight_bytes(model), 0, rates, stored) + SECONDS_BY_BLOCK * model.n_layer
        return cls(is_form, nbytes, seconds, expected(nbytes))


@dataclass(frozen=True)
class Plan:
    """One model on the disk of a directory; sizes in bytes.

    `name` is None if the directory holds the model already, in `form`; otherwise `form` is the plain one. `others` are
    the other choices by name, none if the directory holds another form than the plain one. `manifest` is that of the
    directory, if it holds this model; it `is_alone` if it has one slice, and the others are elsewhere. `load` is what
    other programs had of each core when the rates were measured.
    """

    name: str | None
    model: Hyperparameters
    free_bytes: int
    rates: Rates
    form: Form
    others: Mapping[str, Form]
    manifest: Manifest | None = None
    load: float = 0.0
    drafting: Drafting | None = None
    is_alone: bool = False

    @property
    def is_busy(self) -> bool:
        """Whether other programs took so much of the machine that the rates are not its own."""
        return self.load > BUSY

    @property
    def advice(self) -> str:
        """The faster one of the forms that keep every bit.

        That is the lossless one, unless decoding takes longer than reading fewer bytes saves.
        """
        lossless = self.others.get(LOSSLESS)
        if lossless is None:
            return self.form.form
        is_faster = lossless.forecast.seconds_per_token < self.form.forecast.seconds_per_token
        return LOSSLESS if is_faster else PLAIN


def plan(
    directory: Path,
    ram: int | None,
    name: str | None,
    prompt_tokens: int,
    tokens: int,
    also: Sequence[Path] = (),
    draft: Path | None = None,
    machines: int = 1,
) -> Plan:
    """Forecasts for the model that `directory` holds, or for `name`, on this machine and the disk of the directory.

    If the directory holds nothing prepared, a file is written there, read and deleted. `also` are directories of a
    model on several disks that have moved; if there are as many `machines` as slices, one may be here alone. Raises
    `BloomdeskError` for an unknown name, a slice that is not found, a disk that cannot be measured, and too little RAM.
    """
    if tokens < 1 or prompt_tokens < 1:
        raise BloomdeskError("there must be at least one token of the prompt, and one to generate")
    has_manifest = any((directory / name).exists() for name in (MANIFEST, MANIFEST_BACKUP))
    slices = find_slices(directory, also) if has_manifest else None
    if slices is not None and slices.count != machines:
        require_all_slices(slices)
    held = slices.first if slices is not None and name is None else None
    if draft and not held:
        raise BloomdeskError(
            f"{draft} drafts for a prepared directory, and there is none", "leave out --draft"
        )
    drafts = find_all_slices(draft) if draft else None
    if not held:
        name = name or DEFAULT_MODEL
    model = held.model if held else family.hyperparameters(name)
    place = existing_directory(directory)
    # Before the rates are measured, which takes all cores itself.
    load = psutil.getloadavg()[0] / (psutil.cpu_count() or 1)
    # Compiled before the process is measured, so that the kernel's memory counts.
    kernel = rates.compiled(model.dtype)
    process = process_bytes(model, memory.memory_in_use(), _tokenizer_bytes(held))
    disk, disks = _disk_rates(place, slices)
    found = Rates(disk, *rates.kernel_rates(kernel, TORCH_DTYPES[model.dtype]), disks)
    chosen = ram or default_total()

    is_alone = slices is not None and bool(slices.missing)
    shares = slices.shares if held and slices is not None and not is_alone else even(1)

    def form(stored: Stored) -> Form:
        def expected(size: int) -> Forecast:
            return forecast(model, size, process, found, prompt_tokens, tokens, stored, shares)

        return Form(stored.form, disk_bytes(model, stored), expected(chosen), _others(expected))

    held_as = stored_as([*slices.manifests.values()]) if held and slices is not None else PLAIN_STORED
    own = form(held_as)
    lossless = (Stored(LOSSLESS, LOSSLESS_SHARE),) if model.dtype == CODED_DTYPE else ()
    choices = (*lossless, *map(Stored, QUANTISED_FORMS)) if own.form == PLAIN else ()
    others = {stored.form: form(stored) for stored in choices}

    def beside(draft_nbytes: int) -> Forecast:
        return forecast(model, chosen, process, found, prompt_tokens, tokens, held_as, shares, draft_nbytes)

    drafting = Drafting.of(drafts, slices, found, prompt_tokens + tokens, beside) if drafts else None
    return Plan(name, model, free_bytes(place), found, own, others, held, load, drafting, is_alone)


def _others(expected: Callable[[int], Forecast]) -> dict[int, Forecast | None]:
    others: dict[int, Forecast | None] = {}
    for size in OTHER_RAM:
        try:
            others[size] = expected(size)
        except BloomdeskError:
            others[size] = None
        if (shown := others[size]) and not shown.memory_plan.streamed_bytes:
            break
    return others


def _disk_rates(place: Path, slices: SliceSet | None) -> tuple[float, tuple[float, ...]]:
    """The rate of the disk, or of several together; and that of each if there are several."""
    if slices is None or len(slices.files) == 1:
        return _disk_rate(place, slices.files[0] if slices is not None else []), ()
    with ThreadPoolExecutor(slices.count) as threads:
        disks = tuple(threads.map(_disk_rate, slices.directories.values(), slices.files))
    return rates.together(disks, slices.shares), disks


def _disk_rate(place: Path, paths: Sequence[Path]) -> float:
    if sum(path.stat().st_size for path in paths) >= rates.SMALLEST_SCRATCH:
        return rates.disk_rate(paths)
    return rates.scratch_rate(place)


def _tokenizer_bytes(held: Manifest | None) -> int:
    record = held.companions.get("tokenizer.json") if held else None
    return record.size if record else BLOOMS_TOKENIZER
